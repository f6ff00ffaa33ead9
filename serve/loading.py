"""What commands share that load a checkpoint: their options, and loading without a word from the libraries.

Commands import torch and transformers when they run: --help and usage errors do not wait for them.
"""

from __future__ import annotations

import os
import warnings
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from speechllm.errors import InputError

if TYPE_CHECKING:
    from serve.answerer import Answerer
    from speechllm.checkpoint import Checkpoint


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Quantize(str, Enum):
    int8 = "int8"


ModelOption = Annotated[
    Path | None,
    typer.Option("--model", "-m", metavar="FOLDER", help="Checkpoint folder; without it, the one that is built in."),
]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter", "-a", metavar="NAME", help="Adapter by train/finetune.py: its name in the checkpoint, or a folder."
    ),
]
DeviceOption = Annotated[Device, typer.Option(help="Where the language model runs; auto takes a GPU if any.")]
QuantizeOption = Annotated[
    Quantize | None,
    typer.Option(help="Round the weights: for larger language models on CPUs; a little less exact."),
]
BatchOption = Annotated[
    int, typer.Option("--batch", "-b", min=1, help="Pieces of audio answered at once, times their beams.")
]


def check_folder(model: Path | None) -> Path:
    """The checkpoint that is meant. Raises InputError for a folder that is none, before torch has been waited for."""
    from speechllm.checkpoint_settings import DEFAULT, read_settings

    folder = DEFAULT if model is None else model
    read_settings(folder)
    return folder


def load(model: Path | None, device: Device, adapter: str | None = None) -> Checkpoint:
    """The checkpoint. Raises InputError."""
    folder = check_folder(model)
    warnings.simplefilter("ignore")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch

    from speechllm.checkpoint import load_checkpoint

    if device is Device.cuda and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available; use --device auto or cpu")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    gpu = device is Device.cuda or (device is Device.auto and torch.cuda.is_available())
    return load_checkpoint(folder, "cuda" if gpu else "cpu", adapter)


def make_answerer(
    model: Path | None, device: Device, adapter: str | None, batch: int, quantize: Quantize | None
) -> Answerer:
    """A checkpoint ready to answer. Raises InputError."""
    check_folder(model)
    import torch

    try:
        checkpoint = load(model, device, adapter)
        from serve.answerer import Answerer

        return Answerer(checkpoint, batch, "int8" if quantize else None)
    except torch.OutOfMemoryError as error:
        raise InputError(f"the GPU has no room for the model and {batch} answers at once: lower --batch") from error
