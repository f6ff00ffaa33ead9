"""`speechllm`: questions about audio files from the shell, or over HTTP; the commands put together."""

from __future__ import annotations

from typing import Annotated

import typer

from serve.ask import ask
from serve.codes import app as codes_app
from serve.export import export
from serve.loading import Device, ModelOption, load
from serve.plain_errors import plain_errors
from serve.prompts import app as prompts_app
from serve.server import serve
from speechllm import __version__

app = typer.Typer(
    name="speechllm",
    help="Ask questions about speech, in plain words.",
    epilog='Start with: speechllm ask "Transcribe this audio" recording.wav',
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,
)
app.add_typer(codes_app)
app.add_typer(prompts_app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"speechllm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(ask)
app.command()(serve)
app.command()(export)


@app.command()
def info(model: ModelOption = None) -> None:
    """Say what a checkpoint is.

    Its model, codec, vocabulary, limits, tasks and adapters, one a line.
    """
    with plain_errors():
        checkpoint = load(model, Device.cpu)
        from serve.decoder import MAX_POSITIONS
        from speechllm.adapter import adapter_names, describe_adapter
        from speechllm.model import parameter_counts
        from speechllm.tasks import FEW_SHOT, TRAINABLE

        lm, codec, vocabulary, settings = checkpoint.lm, checkpoint.codec, checkpoint.vocabulary, checkpoint.settings
        total, used = parameter_counts(lm)
        controls, codes = vocabulary.num_controls, vocabulary.n_q * vocabulary.card
        width, layers = lm.config.hidden_size, lm.config.num_hidden_layers
        rows = {
            "name": settings.name,
            "folder": str(checkpoint.folder),
            "model": f"{lm.config.model_type}, {layers} layers of width {width}",
            "parameters": f"{total:,}, of which {used:,} at work on any one position",
            "positions": f"{min(lm.config.max_position_embeddings, MAX_POSITIONS):,}",
            "codec": f"{codec.sample_rate} Hz, {codec.frame_rate:g} frames a second, "
            f"{codec.n_q} codebooks of {codec.card} codes",
            "vocabulary": f"{vocabulary.size:,} ids: {vocabulary.text_size:,} text, {controls} control, "
            f"{codes:,} audio",
            "audio is heard as": vocabulary.heard(),
            "longest clip": f"{settings.max_audio_seconds:g} s; longer audio is answered piece by piece",
            "longest answer": f"{settings.max_answer_tokens} text pieces for each piece of audio",
        }
        taught: list[str] = []
        for name in settings.tasks:
            if name in FEW_SHOT:
                taught.append(name.removeprefix("few_shot_"))
                continue
            known = TRAINABLE.get(name)
            wording = known.wordings[0].replace("{}", "…") if known else "(unknown to this version)"
            rows[f"task {name}"] = f'"{wording}", or other words for it'
        if taught:
            rows["by examples"] = f"{', '.join(taught)}: what solved examples say of them, see speechllm prompts"
        for name in adapter_names(checkpoint.folder):
            rows[f"adapter {name}"] = describe_adapter(checkpoint.folder, name)
        width = max(map(len, rows))
        for name, value in rows.items():
            print(f"{name:<{width}}  {value}", flush=True)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
