"""Make a codec folder of somebody else's codec: ``python -m train.import_codec SOURCE --out DIR``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from speechllm.codec import EncodecCodec, EncodecConfig, HuggingFaceCodec, HuggingFaceConfig, save_codec
from speechllm.codec.load import CONFIG
from speechllm.errors import InputError, first_problem
from train.commands import plain_errors
from train.output import output_folder

ENCODEC = "encodec_24khz"


def import_codec(source: str, out: Path, n_q: int | None, repository: Path | None) -> EncodecCodec | HuggingFaceCodec:
    """Write the codec at ``source``, cut to ``n_q`` codebooks, to the folder ``out``, and return it.

    Raises:
        InputError: ``out`` holds a codec already or cannot be written to, the weights cannot be had, or there are fewer
            codebooks.
    """
    if (out / CONFIG).exists():
        raise InputError(f"{out}: holds a codec or model already; give another --out, or remove it")
    codec: EncodecCodec | HuggingFaceCodec
    if source == ENCODEC:
        try:
            config = EncodecConfig(n_q=n_q or EncodecConfig().codebooks)
        except ValidationError as error:
            raise InputError(f"{source}: {first_problem(error)}") from error
        codec = EncodecCodec.pretrained(config, repository)
    elif repository:
        raise InputError(f"--repository is for {ENCODEC} alone; name the folder of any other codec as SOURCE")
    else:
        codec = HuggingFaceCodec.pretrained(source, HuggingFaceConfig(n_q=n_q))
    with output_folder(out):
        save_codec(codec, out)
    return codec


def main(
    source: Annotated[
        str,
        typer.Argument(
            help="Mimi, DAC, EnCodec or X-codec of transformers: a folder, or a name on the hub such as kyutai/mimi; "
            f"or {ENCODEC} of the package encodec"
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder for the codec: what --codec and the setting 'codec' take")],
    n_q: Annotated[int | None, typer.Option(help="codebooks to use, from the first; all unless given", min=1)] = None,
    repository: Annotated[
        Path | None,
        typer.Option(help=f"folder with the weights of {ENCODEC} (.th), which are downloaded unless given"),
    ] = None,
) -> None:
    """Make a codec folder that needs nothing outside itself."""
    with plain_errors():
        codec = import_codec(source, out, n_q, repository)
    what = f"{codec.frame_rate:g} frames a second, {codec.n_q} codebooks of {codec.card} codes"
    typer.echo(f"{out}: {codec.sample_rate} Hz, {what}")


if __name__ == "__main__":
    typer.run(main)
