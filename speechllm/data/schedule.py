"""Which utterance teaches which task at each step, in each of its micro batches.

Tasks are drawn with p ∝ weight · n^(1/T) among those that have entered, n being the recordings that have an answer for
the task; within a task, corpora likewise (temperature sampling, Arivazhagan et al. 2019). Within a corpus every
recording is drawn once before any is drawn again. What is heard may be asked about further: that costs the ids of a
question and its answer, and the audio, which is most of a sequence, is computed once for all.
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
    task_corpora: task -> weights of the corpora that teach it, where they are of its own. enters: task
    -> the step from which it is drawn, 0 where not given; it counts from the next window of ``WINDOW`` steps.
    temperature: T. batch_tokens: ids of a micro batch, about. short: steps over which longer utterances come in;
    until then recordings may come again early. lanes: micro batches of a step, of all ranks together. questions: asked
    of a recording that is heard, on average at most: each other task is added with a chance of ``questions - 1`` times
    its share of what the corpus is drawn for, 1 at most. So what is frequent is asked nearly always and the rest in
    proportion; episodes and tasks on text lose share, and further questions are not counted as draws.
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
    questions: int = 1

    def __post_init__(self) -> None:
        self._window = 0  # the next to be planned
        self._drawn: dict[str, int] = {}  # "task/corpus" -> recordings drawn in the windows before it
        self._orders: dict[str, tuple[int, np.ndarray]] = {}
        self._starts: dict[int, dict[str, int]] = {}
        self._further = self._find_further() if self.questions > 1 else {}
        self._added: dict[tuple[str, str, int], np.ndarray] = {}  # what _mean_added found

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
        added = self._chances_added(planned)  # [pools, tasks]
        means = [lengths.mean() for lengths in lengths_of]
        if self._further:
            costs = [self._mean_added(*pool, step) for pool in pools]
            means = [mean + more @ cost for mean, more, cost in zip(means, added, costs, strict=True)]
        mean = float(chances @ means)
        drawn = rng.choice(len(pools), max(batches, round(batches * self.batch_tokens / mean)), p=chances)  # [draws]
        rows, lengths = np.empty_like(drawn), np.empty(len(drawn))
        for number, (task, corpus) in enumerate(pools):
            here = drawn == number
            places = self._next(task, corpus, int(here.sum()), step, rng)
            rows[here] = self.pools[task][corpus].rows[places]
            lengths[here] = lengths_of[number][places]
        also, more = self._ask_further(rows, added[drawn], rng)
        lengths += more
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
                [Draw(pools[drawn[n]][0], int(rows[n]), also[n]) for n in part.tolist()]
                for part in (parts[place * self.lanes + lane] for lane in lanes)
            ]
            for place in rng.permutation(WINDOW).tolist()
        ]

    def _find_further(self) -> dict[str, np.ndarray]:
        """Task -> ids [rows] of a further question about each recording, inf where it cannot be asked."""
        every = [pool for pools in self.pools.values() for pool in pools.values()]
        rows = 1 + max(int(pool.rows.max()) for pool in every)
        found: dict[str, np.ndarray] = {}
        for task, pools in self.pools.items():
            ids = np.full(rows, np.inf)
            for pool in pools.values():
                ids[pool.rows] = pool.further
            if np.isfinite(ids).any():
                found[task] = ids
        return found

    def _chances_added(self, planned: Mapping[tuple[str, str], float]) -> np.ndarray:
        """[pools, tasks]: chance that a task is asked further of what is drawn from a pool."""
        tasks = [*self._further]
        chances = np.zeros((len(planned), len(tasks)))
        for number, (task, corpus) in enumerate(planned):
            if task in self._further:
                own = np.array([planned.get((other, corpus), 0.0) for other in tasks])
                chances[number] = np.minimum(1, (self.questions - 1) * own / own.sum())
                chances[number, tasks.index(task)] = 0
        return chances

    def _ask_further(
        self, rows: np.ndarray, chances: np.ndarray, rng: np.random.Generator
    ) -> tuple[list[tuple[str, ...]], np.ndarray]:
        """For each draw the tasks that are asked further, and how many ids they add ``[draws]``.

        rows: recordings ``[draws]``. chances: ``[draws, tasks]``.
        """
        if not self._further:
            return [()] * len(rows), np.zeros(len(rows))
        ids = np.stack([further[rows] for further in self._further.values()], 1)  # [draws, tasks]
        asked = (rng.random(ids.shape) < chances) & np.isfinite(ids)
        names = np.array([*self._further])
        return [tuple(names[own].tolist()) for own in asked], np.where(asked, ids, 0).sum(1)

    def _mean_added(self, task: str, corpus: str, step: int) -> np.ndarray:
        """[tasks]: ids that a task adds where it is asked further, the mean over a pool; 0 where it cannot be."""
        size = self._size(task, corpus, step)
        if (task, corpus, size) not in self._added:
            rows = self.pools[task][corpus].rows[:size]
            ids = np.stack([further[rows] for further in self._further.values()], 1)
            self._added[task, corpus, size] = np.where(np.isfinite(ids), ids, 0).mean(0)
        return self._added[task, corpus, size]

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
