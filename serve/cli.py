"""`speechllm`: ask a question about audio files, from the shell. This module parses and prints; see serve.answer."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serve.codes import app as codes_app
from serve.plain_errors import USER_ERROR, complain, plain_errors
from speechllm import __version__
from speechllm.errors import InputError

# Commands import torch and transformers themselves: --help and usage errors do not wait for them.
if TYPE_CHECKING:
    from serve.answer import Answer, Failure
    from speechllm.checkpoint import Checkpoint


class Format(str, Enum):
    text = "text"
    json = "json"


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Model = Annotated[
    Path | None,
    typer.Option("--model", "-m", metavar="FOLDER", help="Checkpoint folder; without it, the one that is built in."),
]

app = typer.Typer(
    name="speechllm",
    help="Ask questions about speech, in plain words.",
    epilog='Start with: speechllm ask "Transcribe this audio" recording.wav',
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,
)
app.add_typer(codes_app)


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


@app.command()
def ask(
    instruction: Annotated[
        str, typer.Argument(metavar="INSTRUCTION", help='What to do, e.g. "Translate this audio to German".')
    ],
    audio: Annotated[
        list[str],
        typer.Argument(metavar="AUDIO", help="Audio files (wav, flac, ogg, opus, mp3); - reads standard input."),
    ],
    model: Model = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="NAME",
            help="Adapter by train/finetune.py: its name in the checkpoint, or a folder.",
        ),
    ] = None,
    format: Annotated[
        Format, typer.Option("--format", "-f", help="text: one line per file. json: one object per file.")
    ] = Format.text,
    device: Annotated[Device, typer.Option(help="Where the language model runs; auto takes a GPU if any.")] = (
        Device.auto
    ),
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Pieces of audio answered at once.")] = 8,
) -> None:
    """Ask something about audio files.

    Answers go to standard output, in the order of the files. Audio longer than the model was
    trained on is cut at pauses and answered piece by piece, to the end.

    Exit code: 0 when every file was answered; 2 when one was not (the others still are), or the command cannot be
    used as given.

    \b
    Examples:
      speechllm ask "Transcribe this audio" a.wav b.mp3
      speechllm ask "Translate this audio to French" --format json *.flac
      ffmpeg -i talk.mp4 -f wav - | speechllm ask "Transcribe this audio" -
    """
    with plain_errors():
        checkpoint = _load(model, device, adapter)
        from serve.answer import Answerer, Failure
        from speechllm.tasks import find_task

        task = find_task(instruction)
        if task is not None and task.name not in checkpoint.settings.tasks:
            known = ", ".join(checkpoint.settings.tasks)
            complain(f"warning: this checkpoint was not trained on the task {task.name}; it knows {known}")
        failed = False
        for answer in _with_progress(Answerer(checkpoint, batch).ask(audio, instruction), len(audio)):
            failed = failed or isinstance(answer, Failure)
            _show(answer, format, checkpoint.settings.max_answer_tokens)
        if failed:
            raise typer.Exit(USER_ERROR)


@app.command()
def info(model: Model = None) -> None:
    """Say what a checkpoint is.

    Its model, codec, vocabulary, limits, tasks and adapters, one a line.
    """
    with plain_errors():
        checkpoint = _load(model, Device.cpu)
        from speechllm.adapter import adapter_names, describe_adapter
        from speechllm.model import parameter_counts
        from speechllm.tasks import TASKS

        lm, codec, vocabulary, settings = checkpoint.lm, checkpoint.codec, checkpoint.vocabulary, checkpoint.settings
        total, used = parameter_counts(lm)
        controls, codes = vocabulary.num_controls, vocabulary.n_q * vocabulary.card
        width, layers = lm.config.hidden_size, lm.config.num_hidden_layers
        merged = ", repeats merged" if vocabulary.merge_repeats else ""
        rows = {
            "name": settings.name,
            "folder": str(checkpoint.folder),
            "model": f"{lm.config.model_type}, {layers} layers of width {width}",
            "parameters": f"{total:,}, of which {used:,} at work on any one position",
            "positions": f"{lm.config.max_position_embeddings:,}",
            "codec": f"{codec.sample_rate} Hz, {codec.frame_rate:g} frames a second, "
            f"{codec.n_q} codebooks of {codec.card} codes",
            "vocabulary": f"{vocabulary.size:,} ids: {vocabulary.text_size:,} text, {controls} control, "
            f"{codes:,} audio (codebooks seen: {vocabulary.n_q} of {codec.n_q}{merged})",
            "longest clip": f"{settings.max_audio_seconds:g} s; longer audio is answered piece by piece",
            "longest answer": f"{settings.max_answer_tokens} text pieces for each piece of audio",
        }
        for name in settings.tasks:
            wording = TASKS[name].wordings[0].replace("{}", "…") if name in TASKS else "(unknown to this version)"
            rows[f"task {name}"] = f'"{wording}", or other words for it'
        for name in adapter_names(checkpoint.folder):
            rows[f"adapter {name}"] = describe_adapter(checkpoint.folder, name)
        width = max(map(len, rows))
        for name, value in rows.items():
            print(f"{name:<{width}}  {value}", flush=True)


def main() -> None:
    """The console script."""
    app()


def _load(model: Path | None, device: Device, adapter: str | None = None) -> Checkpoint:
    """The checkpoint, without a word from the libraries. Raises InputError."""
    warnings.simplefilter("ignore")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch

    from speechllm.checkpoint import DEFAULT, load_checkpoint

    if device is Device.cuda and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available; use --device auto or cpu")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    gpu = device is Device.cuda or (device is Device.auto and torch.cuda.is_available())
    return load_checkpoint(DEFAULT if model is None else model, "cuda" if gpu else "cpu", adapter)


def _with_progress(answers: Iterator[Answer | Failure], files: int) -> Iterator[Answer | Failure]:
    """The same answers, with a bar on standard error while they are made, if someone is there to see it."""
    if files < 2 or not sys.stderr.isatty():
        yield from answers
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # rich prints redirected output on its own console, standard error: answers may go there on a terminal only.
    with Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()
    ) as progress:
        bar = progress.add_task("", total=files)
        for answer in answers:
            progress.advance(bar)
            yield answer


def _show(answer: Answer | Failure, format: Format, max_answer_tokens: int) -> None:
    from serve.answer import Failure

    if isinstance(answer, Failure):
        complain(f"error: {answer.error}")
    elif answer.finish_reason == "length" and format is Format.text:
        complain(
            f"warning: {answer.file}: the answer was cut: the model writes at most {max_answer_tokens} text pieces "
            "for one piece of audio"
        )
    elif answer.finish_reason == "no_speech" and format is Format.text:
        complain(f"note: {answer.file}: no speech")
    if format is Format.json:
        print(json.dumps(answer.to_dict(), ensure_ascii=False), flush=True)
    elif not isinstance(answer, Failure):
        print(" ".join(answer.text.split()), flush=True)


if __name__ == "__main__":
    main()
