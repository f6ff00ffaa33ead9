"""Batches made in worker processes, and a meter of what they hold: speed, padding, share of each task, experts."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
from threading import Thread

import matplotlib
import torch
from torch import distributed
from torch.utils.data import Dataset

from speechllm.data.mixture import Draw, Mixture, TrainingBatch
from speechllm.data.schedule import Schedule
from train.expert_load import ExpertLoad
from train.footprint import Speed
from train.ranks import gather

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C is for the process that trains, and so is a SIGTERM to its group: it finishes its step and saves."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # DeepSpeed's launcher sends SIGTERM to each process it finds; from the parent it is how a loader ends its workers
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def micro_batches(schedule: Schedule, steps: range, lanes: range) -> Iterator[tuple[int, int, list[Draw]]]:
    """The step, lane and draws of each micro batch in turn."""
    for step, plan in zip(steps, schedule.steps(steps, lanes), strict=True):
        for lane, draws in zip(lanes, plan, strict=True):
            yield step, lane, draws


class BatchMaker(Dataset):
    """Indexed by what :func:`micro_batches` gives; a batch follows from it and the seed, whatever process makes it."""

    def __init__(self, mixture: Mixture, row_length: int, seed: int):
        self.mixture, self.row_length, self.seed = mixture, row_length, seed

    def __getitem__(self, plan: tuple[int, int, list[Draw]]) -> TrainingBatch:
        step, lane, draws = plan
        return self.mixture.batch(draws, self.row_length, Random(f"{self.seed} lane {lane} step {step}"))


Amounts = dict[str, float]  # by name


def add(to: Amounts, amounts: Mapping[str, float]) -> None:
    """Each to that of its name."""
    for name, amount in amounts.items():
        to[name] = to.get(name, 0) + amount


def added(parts: Iterable[Mapping[str, float]]) -> Amounts:
    """All of them together."""
    sums: Amounts = {}
    for part in parts:
        add(sums, part)
    return sums


class Meter:
    """Means since the last reading, and what share each task had of all draws next to what was asked for, and of all
    answers, those of further questions too.

    Counts what this rank trains on; what is read, saved and drawn is of all ranks, which must all ask for it.

    experts: counts that are read with the rest. flops: what ``mfu`` is measured by; None leaves it out.
    """

    def __init__(self, schedule: Schedule, experts: ExpertLoad, flops: Speed | None):
        self.schedule, self.experts, self.flops = schedule, experts, flops
        self._asked: Amounts = {}  # draws of each task, on all ranks
        self._drawn: Amounts = {}
        self._answered: Amounts = {}
        self._own_asked: Amounts = {}  # those of this rank that are not among them yet
        self._own_drawn: Amounts = {}
        self._own_answered: Amounts = {}
        self._reset()

    def _reset(self) -> None:
        self._sums: Amounts = {}
        self._seen: Amounts = {}  # the losses of a task are there only where the task is
        self._amounts: Amounts = dict.fromkeys(("ids", "positions", "audio", "making", "waited", "least"), 0)
        self._mark = time.monotonic()

    def _share(self) -> None:
        for asked, drawn, answered in gather((self._own_asked, self._own_drawn, self._own_answered)):
            add(self._asked, asked)
            add(self._drawn, drawn)
            add(self._answered, answered)
        self._own_asked, self._own_drawn, self._own_answered = {}, {}, {}

    def state(self) -> dict:
        """What :meth:`restore` needs, ready for JSON."""
        self._share()
        return {"asked": self._asked, "drawn": self._drawn, "answered": self._answered}

    def restore(self, state: Mapping) -> None:
        """Go on counting where the run that gave ``state`` was."""
        self._asked, self._drawn = dict(state["asked"]), dict(state["drawn"])
        self._answered = dict(state.get("answered", state["drawn"]))  # a draw was an answer before there were others

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile is no training: its time does not count."""
        begun = time.monotonic()
        yield
        self._mark += time.monotonic() - begun

    def timed(self, batches: Iterable[list[TrainingBatch]]) -> Iterator[list[TrainingBatch]]:
        """The micro batches of each step; the time spent waiting for them is counted."""
        begun = time.monotonic()
        for batch in batches:
            add(self._amounts, {"waited": time.monotonic() - begun})
            yield batch
            begun = time.monotonic()

    def add(self, step: int, batch: TrainingBatch, losses: Mapping[str, float]) -> None:
        """Count a micro batch of this rank."""
        add(self._sums, losses)
        add(self._seen, dict.fromkeys(losses, 1))
        mask = batch.lm.attention_mask
        amounts = {"ids": int(mask.sum()), "positions": mask.numel()}
        add(self._amounts, amounts | {"audio": batch.audio_seconds, "making": batch.seconds})
        if self.flops:
            lengths = torch.bincount(batch.example_ids[batch.example_ids >= 0])
            add(self._amounts, {"least": self.flops.least_seconds(lengths)})
        add(self._own_drawn, Counter(draw.task for draw in batch.draws))
        add(self._own_answered, Counter(batch.tasks))
        shares = self.schedule.shares(step)
        add(self._own_asked, {task: share * len(batch.draws) for task, share in shares.items()})

    def read(self) -> dict[str, float]:
        """Mean losses; ``tokens_per_second`` (padding not counted) and ``audio_hours_per_hour``, both of all ranks
        together; ``mfu`` (model FLOPs utilization, a fraction), ``loader_tokens_per_second`` of one worker, ``waiting``
        (share of the time in which no batch was ready), ``padding`` (share of the positions), and
        :meth:`ExpertLoad.read`.
        """
        add(self._amounts, {"passed": time.monotonic() - self._mark})  # seconds, as waited, making, audio and least
        told = gather((self._sums, self._seen, self._amounts))
        sums, seen, amounts = (added(parts) for parts in zip(*told, strict=True))
        values = {name: total / seen[name] for name, total in sums.items()} | {
            "tokens_per_second": len(told) * amounts["ids"] / amounts["passed"],
            "audio_hours_per_hour": len(told) * amounts["audio"] / amounts["passed"],
            "loader_tokens_per_second": amounts["ids"] / amounts["making"],
            "waiting": amounts["waited"] / amounts["passed"],
            "padding": 1 - amounts["ids"] / amounts["positions"],
        }
        if self.flops:
            values["mfu"] = amounts["least"] / amounts["passed"]
        self._reset()
        return values | self.experts.read()

    def plot(self, out: Path) -> None:
        """``shares.json`` and ``shares.png``: the share of each task in what is drawn, asked and realised, and in all
        answers; and :meth:`ExpertLoad.plot`.
        """
        self.experts.plot(out)
        self._share()
        if not self._drawn or (distributed.is_initialized() and distributed.get_rank()):  # a finished run was resumed
            return
        counts = {"asked": self._asked, "realised": self._drawn, "answers": self._answered}
        shares = {
            task: {kind: of.get(task, 0) / sum(of.values()) for kind, of in counts.items()} for task in self._asked
        }
        (out / "shares.json").write_text(json.dumps(shares, indent=1) + "\n", encoding="utf-8")
        figure, axis = plt.subplots(figsize=(0.5 * len(shares) + 2, 3.6))
        for offset, kind in ((-0.27, "asked"), (0.0, "realised"), (0.27, "answers")):
            axis.bar([n + offset for n in range(len(shares))], [s[kind] for s in shares.values()], 0.27, label=kind)
        axis.set_xticks(range(len(shares)), list(shares), rotation=60, ha="right")
        axis.set(ylabel="share of draws, and of answers")
        axis.legend()
        figure.tight_layout()
        figure.savefig(out / "shares.png", dpi=110)
        plt.close(figure)
