"""How a training command starts and ends: its processes, its exit code, and what it prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import distributed

from speechllm.errors import InputError

if TYPE_CHECKING:
    from train.trainer import Trainer


def prepare_environment() -> None:
    """Make a start with plain ``python`` like one by the launcher, and any start like one in an activated environment.

    Sets the launcher's variables that are missing, and puts the environment's programs first on the path: whenever
    DeepSpeed finds another ninja than before, it compiles its C++ part anew.
    """
    programs, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    if path.split(os.pathsep)[0] != programs:
        os.environ["PATH"] = os.pathsep.join(filter(None, (programs, path)))
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 0,  # any free one
    }.items():
        os.environ.setdefault(name, str(value))


def share_cores() -> None:
    """Ranks of one machine divide its cores among them: threads beyond that wait for one another, which is slow.

    ``OMP_NUM_THREADS`` says otherwise.
    """
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # of torchrun, and of DeepSpeed's launcher
    ranks = next((int(os.environ[name]) for name in names if name in os.environ), 1)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))


@contextmanager
def command() -> Iterator[None]:
    """An InputError within ends the process with one line and exit code 2; no process group is left behind."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def train(trainer: Trainer) -> None:
    """Say what is trained, and train it; ends the process with exit code 1 when that was stopped early."""
    if trainer.rank == 0:
        total, active = trainer.parameters
        used, rows = trainer.mixture.used, len(trainer.mixture.rows)
        left = f", {rows - used} more left out: too long, or without an answer to any task" if used < rows else ""
        print(f"{total / 1e6:.1f} M parameters, {active / 1e6:.1f} M active; {used} utterances{left}")
    if not trainer.run():
        sys.exit(f"stopped after step {trainer.step}; go on with --resume")
