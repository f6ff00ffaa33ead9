"""Which items make a batch, and making batches ahead of their use."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from random import Random
from typing import TypeVar

Batch = TypeVar("Batch")


def short_first(step: int, steps: int) -> float:
    """The shortest share of a corpus to draw from, growing from a tenth to all of it over ``steps``."""
    return 1.0 if step >= steps else 0.1 + 0.9 * step / steps


class LengthSampler:
    """The items of any step, computed from (seed, step) alone, so that a resumed run sees the same batches.

    Batches hold items of like length, at most ``budget`` in all (seconds or tokens, as ``lengths`` are). Every
    second or token of the corpus is equally likely.
    """

    RESHUFFLE = 100  # steps after which neighbours in length are mixed anew
    JITTER = 0.05  # share of its length by which an item may be taken for longer or shorter in that

    def __init__(self, lengths: list[float], budget: float, most: int, seed: int):
        self.lengths, self.budget, self.most, self.seed = lengths, budget, most, seed
        self._epoch = -1
        self._order: list[int] = []
        self._ends: list[float] = []

    def __call__(self, step: int, share: float = 1.0) -> list[int]:
        """Indices for ``step``; the batch starts among the shortest ``share`` of the items."""
        epoch = step // self.RESHUFFLE
        if epoch != self._epoch:
            rng = Random(f"{self.seed} order {epoch}")
            jittered = [n * rng.uniform(1 - self.JITTER, 1 + self.JITTER) for n in self.lengths]
            self._order = sorted(range(len(jittered)), key=jittered.__getitem__)
            self._ends = list(accumulate(self.lengths[i] for i in self._order))
            self._epoch = epoch
        limit = self._ends[max(1, round(share * len(self._order))) - 1]
        start = bisect_left(self._ends, Random(f"{self.seed} step {step}").random() * limit)
        chosen: list[int] = []
        total = 0.0
        for index in self._order[start:]:
            total += self.lengths[index]
            if chosen and (total > self.budget or len(chosen) == self.most):
                break
            chosen.append(index)
        return chosen


def prefetch(make: Callable[[int], Batch], steps: range, ahead: int = 4) -> Iterator[Batch]:
    """``make(step)`` for each step in order, computed in a thread while the caller works."""
    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(make, step) for step in steps[:ahead]]
        for step in steps:
            yield pending.pop(0).result()
            if step + ahead < steps.stop:
                pending.append(pool.submit(make, step + ahead))
