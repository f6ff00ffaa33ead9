"""Copy a checkpoint to where it is to be released: ``python -m train.assemble runs/tiny/checkpoint --out DIR``."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from speechllm.checkpoint import load_checkpoint
from speechllm.errors import InputError
from speechllm.folders import replaced
from train.commands import plain_errors


def megabytes(paths: Sequence[Path]) -> float:
    """Size of all files in the folders, in 10^6 bytes."""
    return sum(file.stat().st_size for path in paths for file in path.rglob("*") if file.is_file()) / 1e6


def assemble(checkpoint: Path, out: Path, beside: Sequence[Path], at_most_mb: float | None) -> float:
    """Put ``checkpoint`` in the place of ``out``, which is whole at any time; its size with ``beside``, in MB.

    Raises:
        InputError: it is no whole checkpoint, a folder is missing, all of it is too large, or nothing can be written.
    """
    if out.resolve() in (checkpoint.resolve(), *checkpoint.resolve().parents):
        raise InputError(f"--out {out}: holds what is to be copied; give another folder")
    load_checkpoint(checkpoint)
    if missing := [path for path in beside if not path.is_dir()]:
        raise InputError(f"--beside {missing[0]}: no such folder")
    size = megabytes([checkpoint, *beside])
    if at_most_mb is not None and size > at_most_mb:
        told = " and ".join(f"{path} ({megabytes([path]):.1f})" for path in (checkpoint, *beside))
        raise InputError(
            f"{told} are {size:.1f} MB together, more than --at-most-mb {at_most_mb:g}: train a smaller one"
        )
    try:
        with replaced(out) as new:
            shutil.copytree(checkpoint, new, dirs_exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error})") from error
    return size


def main(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder")],
    out: Annotated[Path, typer.Option(help="folder; what was in it is replaced")],
    beside: Annotated[list[Path] | None, typer.Option(help="folder that counts too; repeatable")] = None,
    at_most_mb: Annotated[float | None, typer.Option(help="refuse when all is larger, in 10^6 bytes")] = None,
) -> None:
    """Check that a checkpoint is whole, and not too large, and copy it."""
    with plain_errors():
        size = assemble(checkpoint, out, beside or [], at_most_mb)
    typer.echo(f"{out}: {size:.1f} MB{' with what is beside it' if beside else ''}")


if __name__ == "__main__":
    typer.run(main)
