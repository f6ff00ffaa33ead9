"""What the ranks of a run tell one another beside gradients. All of them must ask, each time."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError
from torch import distributed

from speechllm.errors import InputError

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # with work of hours in rank 0; when that dies, the wait ends at once


class SavingError(Exception):
    """A file cannot be written, on this rank or on another; the message is one line."""


def forget_shared_memory() -> None:
    """Unlink the buffer through which DeepSpeed adds up gradients on CPUs: 67 MB of shared memory for each process,
    which it never gives back. Who has opened it keeps it; all have, once DeepSpeed is initialized.
    """
    distributed.barrier()
    place = f"{os.getuid()}_{os.environ.get('MASTER_ADDR')}_{os.environ.get('MASTER_PORT')}_{distributed.get_rank()}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{place}").unlink(missing_ok=True)


def anywhere(value: bool) -> bool:
    """Whether it is true on any rank."""
    flag = torch.tensor(float(value), device=get_accelerator().current_device_name())
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)


def everywhere(value: bool) -> bool:
    """Whether it is true on all ranks."""
    return not anywhere(not value)


def gather(value: T, group: distributed.ProcessGroup | None = None) -> list[T]:
    """``value`` of every rank, in their order. group: of all ranks, instead of the one that they have anyway."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value, group)
    return values


def by_first(work: Callable[[], T]) -> T:
    """What ``work`` gives in rank 0, on all ranks, which wait for as long as it takes.

    Raises:
        InputError: on all ranks, when ``work`` does.
    """
    group: distributed.ProcessGroup | None = None
    if distributed.is_initialized():  # in the group of training, ranks give one another up after minutes
        group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    outcome: tuple[Any, str | None] = (None, None)  # what it gives, or what is wrong
    if group is None or distributed.get_rank() == 0:
        try:
            outcome = (work(), None)
        except InputError as error:
            outcome = (None, str(error))
    result, problem = gather(outcome, group)[0]
    if problem is not None:
        raise InputError(problem)
    return result


def write_together(write: Callable[[], object]) -> None:
    """Call ``write``, and wait until all ranks have. It may ask the others only before it can fail on one alone.

    Raises:
        SavingError: on all ranks, when it failed on one.
    """
    failure: Exception | None = None
    try:
        write()
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save tells of a full disk by a RuntimeError
        failure = error
    reasons = gather(None if failure is None else (str(failure) or type(failure).__name__).splitlines()[0])
    if reason := next((reason for reason in reasons if reason is not None), None):
        raise SavingError(reason) from failure


def nothing() -> None:
    """What the other ranks do while the first writes."""
