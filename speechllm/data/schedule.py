"""Which utterance teaches which task at each step, in each of its micro batches.

Tasks are drawn with p ∝ weight · n^(1/T) among those that have entered, n being the recordings that have an answer for
the task; within a task, corpora likewise (temperature sampling, Arivazhagan et al. 2019). Within a corpus every
recording comes once before any comes again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from speechllm.data.mixture import Draw
from speechllm.data.pools import Pools
from speechllm.data.sampling import short_first

Plan = list[list[list[Draw]]]  # of a window and some of its lanes: [step][lane][example]

WINDOW = 50  # steps that are planned together, so that examples of like length meet
KEPT = 4  # windows whose beginnings are remembered: batches are planned and made before they are trained on


def share(sizes: np.ndarray, weights: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities ∝ ``weights · sizes^(1 / temperature)``, all ``[n]``."""
    scores = weights * sizes ** (1 / temperature)
    return np.asarray(scores / scores.sum())


@dataclass
class Schedule:
    """Draws of a run; what a step sees follows from the seed, the step and the state alone, whatever
    ranks there are.

    pools: task -> corpus -> recordings. weights: of tasks. corpus_weights: of corpora, 1 where not given.
    task_corpora: task -> the corpora that teach it and their weights, for tasks that not all are to teach. enters: task
    -> the step from which it is drawn, 0 where not given; it counts from the next window of ``WINDOW`` steps.
    temperature: T. batch_tokens: ids of a micro batch, about. short: steps over which longer utterances come in;
    until then recordings may come again early. lanes: micro batches of a step, of all ranks together.
    """

    pools: Pools
    weights: Mapping[str, float]
    batch_tokens: float
    seed: int = 0
    lanes: int = 1
    temperature: float = 5.0
    corpus_weights: Mapping[str, float] = field(default_factory=dict)
    task_corpora: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    enters: Mapping[str, int] = field(default_factory=dict)
    short: int = 0

    def __post_init__(self) -> None:
        self.pools = {
            task: {name: pools[name] for name in self.task_corpora.get(task, pools)}
            for task, pools in self.pools.items()
        }
        self._window = 0  # the next to be planned
        self._drawn: dict[str, int] = {}  # "task/corpus" -> recordings drawn in the windows before it
        self._orders: dict[str, tuple[int, np.ndarray]] = {}
        self._starts: dict[int, dict[str, int]] = {}

    def shares(self, step: int) -> dict[str, float]:
        """Task -> its probability at ``step``."""
        start = step // WINDOW * WINDOW
        names = [name for name in self.pools if self.enters.get(name, 0) <= start]
        sizes = np.array(
            [sum(len(pool.rows) for pool in self.pools[name].values()) for name in names], dtype=np.float64
        )
        weights = np.array([self.weights[name] for name in names])
        return dict(zip(names, share(sizes, weights, self.temperature).tolist(), strict=True))

    def chances(self, step: int) -> dict[tuple[str, str], float]:
        """Task and corpus -> their probability at ``step``."""
        return {
            (task, corpus): asked * part
            for task, asked in self.shares(step).items()
            for corpus, part in self._corpora(task).items()
        }

    def steps(self, steps: range, lanes: range) -> Iterator[list[list[Draw]]]:
        """For each step in turn the draws of some lanes."""
        if steps.start // WINDOW < self._window:  # planned already: once more
            self.restore(self.state(steps.start))
        plan: Plan = []
        for step in steps:
            window, place = divmod(step, WINDOW)
            if not plan or place == 0:
                while self._window <= window:  # windows that the state does not cover are gone through again
                    self._starts = {number: state for number, state in self._starts.items() if number > window - KEPT}
                    self._starts[self._window] = dict(self._drawn)
                    plan = self._plan(self._window, lanes)
                    self._window += 1
            yield plan[place]

    def state(self, step: int) -> dict:
        """What :meth:`restore` needs to go on with ``step``, ready for JSON."""
        window = step // WINDOW
        assert window <= self._window, f"step {step} lies beyond what is planned"
        return {"window": window, "drawn": dict(self._drawn if window == self._window else self._starts[window])}

    def restore(self, state: Mapping) -> None:
        """Go on where the run that gave ``state`` was. Its lanes may have been of another number."""
        self._window, self._drawn, self._starts = state["window"], dict(state["drawn"]), {}

    def _plan(self, window: int, lanes: range) -> Plan:
        """Draw for a window, sort by length, cut into batches of like size, shuffle the steps."""
        rng = np.random.default_rng([self.seed, window])
        step, batches = window * WINDOW, WINDOW * self.lanes
        planned = self.chances(step)
        pools, chances = [*planned], np.array([*planned.values()])
        lengths_of = [self.pools[task][corpus].lengths[: self._size(task, corpus, step)] for task, corpus in pools]
        mean = float(chances @ [lengths.mean() for lengths in lengths_of])
        drawn = rng.choice(len(pools), max(batches, round(batches * self.batch_tokens / mean)), p=chances)  # [draws]
        rows, lengths = np.empty_like(drawn), np.empty(len(drawn))
        for number, (task, corpus) in enumerate(pools):
            here = drawn == number
            places = self._next(task, corpus, int(here.sum()), step, rng)
            rows[here] = self.pools[task][corpus].rows[places]
            lengths[here] = lengths_of[number][places]
        order = np.argsort(lengths, kind="stable")
        ends = np.cumsum(lengths[order])
        # each batch begins where its share of all ids does, and has one example at least
        place_of = np.arange(batches - 1)
        cuts = np.searchsorted(ends, ends[-1] * (1 + place_of) / batches)
        cuts = np.maximum.accumulate(cuts - place_of) + place_of
        cuts = np.clip(cuts, 1 + place_of, len(drawn) - batches + 1 + place_of)
        parts = np.split(order, cuts)
        return [
            [
                [Draw(pools[n][0], row) for n, row in zip(drawn[part].tolist(), rows[part].tolist(), strict=True)]
                for part in (parts[place * self.lanes + lane] for lane in lanes)
            ]
            for place in rng.permutation(WINDOW).tolist()
        ]

    def _corpora(self, task: str) -> dict[str, float]:
        pools = self.pools[task]
        sizes = np.array([len(pool.rows) for pool in pools.values()], dtype=np.float64)
        asked = self.task_corpora.get(task, self.corpus_weights)
        weights = np.array([asked.get(name, 1.0) for name in pools])
        return dict(zip(pools, share(sizes, weights, self.temperature).tolist(), strict=True))

    def _size(self, task: str, corpus: str, step: int) -> int:
        """How many recordings of a pool are short enough for this step."""
        return max(1, round(short_first(step, self.short) * len(self.pools[task][corpus].rows)))

    def _next(self, task: str, corpus: str, count: int, step: int, rng: np.random.Generator) -> np.ndarray:
        """Places in the pool of the ``count`` recordings that are next."""
        size, whole = self._size(task, corpus, step), len(self.pools[task][corpus].rows)
        if step < self.short:
            return rng.integers(size, size=count)
        key = f"{task}/{corpus}"
        first = self._drawn.get(key, 0)
        self._drawn[key] = first + count
        parts = [np.empty(0, dtype=np.int64)]
        for epoch in range(first // whole, -(-(first + count) // whole)):
            if self._orders.get(key, (-1,))[0] != epoch:
                self._orders[key] = epoch, np.random.default_rng([self.seed, epoch, *key.encode()]).permutation(whole)
            start = epoch * whole
            parts.append(self._orders[key][1][max(0, first - start) : first + count - start])
        return np.concatenate(parts)
