"""Processes that work for a command."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker
from multiprocessing.pool import Pool
from typing import Any

from tqdm import tqdm


def _begin(start: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    # Libraries draw bars by tqdm, whose usual lock is a semaphore that a worker who is stopped would leave behind.
    tqdm.set_lock(threading.RLock())
    if start is not None:
        start(*arguments)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """A Ctrl-C is heard at the end; processes that are started meanwhile hear none at all."""
    resource_tracker.ensure_running()  # which would undo the mask if it was started later
    heard: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # processes inherit it, from their birth on
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if heard:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def worker_pool(jobs: int, start: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()) -> Iterator[Pool]:
    """``jobs`` processes that call ``start`` first. Ctrl-C is the command's to handle, and ends them without a word."""
    with ExitStack() as stack:
        with _interrupts_wait():
            context = multiprocessing.get_context("spawn")  # a forked torch may hang
            pool = context.Pool(jobs, _begin, (start, arguments))
            stack.enter_context(pool)
        yield pool
        pool.close()  # what is done ends by itself, and leaves nothing behind
        pool.join()
