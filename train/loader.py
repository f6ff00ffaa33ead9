"""Batches made in worker processes, and a meter of what they hold: speed, padding, share of each task, experts."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random

import matplotlib
import torch
from torch.utils.data import Dataset

from speechllm.data.mixture import Draw, Mixture, TrainingBatch
from speechllm.data.schedule import Schedule
from speechllm.tasks import TASKS
from train.expert_load import ExpertLoad
from train.footprint import Speed

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C is for the process that trains, and so is a SIGTERM to its group: it finishes its step and saves."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how a loader ends its workers


def micro_batches(schedule: Schedule, steps: range, lanes: range) -> Iterator[tuple[int, int, list[Draw]]]:
    """The step, lane and draws of each micro batch in turn."""
    for step, plan in zip(steps, schedule.steps(steps, lanes), strict=True):
        for lane, draws in zip(lanes, plan, strict=True):
            yield step, lane, draws


@dataclass(frozen=True, eq=False)
class MeteredBatch(TrainingBatch):
    """A batch, and for the meter the seconds of audio that its examples hear."""

    audio_seconds: float


class BatchMaker(Dataset):
    """Indexed by what :func:`micro_batches` gives; a batch follows from it and the seed, whatever process makes it."""

    def __init__(self, mixture: Mixture, row_length: int, seed: int):
        self.mixture, self.row_length, self.seed = mixture, row_length, seed

    def __getitem__(self, plan: tuple[int, int, list[Draw]]) -> MeteredBatch:
        step, lane, draws = plan
        batch = self.mixture.batch(draws, self.row_length, Random(f"{self.seed} lane {lane} step {step}"))
        heard = sum(self.mixture.facts(draw.row).duration for draw in draws if TASKS[draw.task].listens)
        return MeteredBatch(**{f.name: getattr(batch, f.name) for f in fields(batch)}, audio_seconds=heard)


class Meter:
    """Means since the last reading, and what share each task had of all examples next to what was asked for.

    experts: counts that are read with the rest. flops: what ``mfu`` is measured by; None leaves it out.
    """

    def __init__(self, schedule: Schedule, world: int, experts: ExpertLoad, flops: Speed | None):
        self.schedule, self.world, self.experts, self.flops = schedule, world, experts, flops
        self.asked: Counter[str] = Counter()
        self.drawn: Counter[str] = Counter()
        self._reset()

    def _reset(self) -> None:
        self._sums: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()  # the losses of a task are there only where the task is
        self._ids = self._positions = 0
        self._audio = self._least = self._waited = self._making = 0.0  # seconds
        self._mark = time.monotonic()

    def state(self) -> dict:
        """What :meth:`restore` needs, ready for JSON."""
        return {"asked": dict(self.asked), "drawn": dict(self.drawn)}

    def restore(self, state: Mapping) -> None:
        """Go on counting where the run that gave ``state`` was."""
        self.asked, self.drawn = Counter(state["asked"]), Counter(state["drawn"])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile is no training: its time does not count."""
        begun = time.monotonic()
        yield
        self._mark += time.monotonic() - begun

    def timed(self, batches: Iterable[list[MeteredBatch]]) -> Iterator[list[MeteredBatch]]:
        """The micro batches of each step; the time spent waiting for them is counted."""
        begun = time.monotonic()
        for batch in batches:
            self._waited += time.monotonic() - begun
            yield batch
            begun = time.monotonic()

    def add(self, step: int, batch: MeteredBatch, losses: dict[str, float]) -> None:
        """Count a micro batch of this rank."""
        self._sums.update(losses)
        self._seen.update(losses.keys())
        self._ids += int(batch.lm.attention_mask.sum())
        self._positions += batch.lm.attention_mask.numel()
        self._audio += batch.audio_seconds
        if self.flops:
            self._least += self.flops.least_seconds(torch.bincount(batch.example_ids[batch.example_ids >= 0]))
        self._making += batch.seconds
        self.drawn.update(batch.tasks)
        for task, share in self.schedule.shares(step).items():
            self.asked[task] += share * len(batch.tasks)  # type: ignore[assignment]

    def read(self) -> dict[str, float]:
        """Mean losses; ``tokens_per_second`` of all ranks (padding not counted), ``audio_hours_per_hour`` of all ranks,
        ``mfu`` (model FLOPs utilization, a fraction), ``loader_tokens_per_second`` of one worker, ``waiting`` (share of
        the time in which no batch was ready), ``padding`` (share of the positions), and :meth:`ExpertLoad.read`.

        All ranks must call it.
        """
        passed = time.monotonic() - self._mark
        values = {name: total / self._seen[name] for name, total in self._sums.items()} | {
            "tokens_per_second": self.world * self._ids / passed,
            "audio_hours_per_hour": self.world * self._audio / passed,
            "loader_tokens_per_second": self._ids / self._making,
            "waiting": self._waited / passed,
            "padding": 1 - self._ids / self._positions,
        }
        if self.flops:
            values["mfu"] = self._least / passed
        self._reset()
        return values | self.experts.read()

    def plot(self, out: Path) -> None:
        """``shares.json`` and ``shares.png``: the share of each task in this rank's examples, asked and realised."""
        if not self.drawn:  # a finished run was resumed
            return
        shares = {
            task: {"asked": asked / self.asked.total(), "realised": self.drawn[task] / self.drawn.total()}
            for task, asked in self.asked.items()
        }
        (out / "shares.json").write_text(json.dumps(shares, indent=1) + "\n", encoding="utf-8")
        figure, axis = plt.subplots(figsize=(0.5 * len(shares) + 2, 3.6))
        for offset, kind in ((-0.2, "asked"), (0.2, "realised")):
            axis.bar([n + offset for n in range(len(shares))], [s[kind] for s in shares.values()], 0.4, label=kind)
        axis.set_xticks(range(len(shares)), list(shares), rotation=60, ha="right")
        axis.set(ylabel="share of examples")
        axis.legend()
        figure.tight_layout()
        figure.savefig(out / "shares.png", dpi=110)
        plt.close(figure)
