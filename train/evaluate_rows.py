"""The parts of an evaluation: one row of a suite asked of one system, scored, and kept in ``rows.jsonl``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from speechllm.data.corpus import Item, read_corpus
from speechllm.data.manifest import Split
from speechllm.errors import InputError
from speechllm.tasks import ParsedAnswer, Task
from speechllm.tasks.labels import Label
from train.baseline_system import System
from train.breakdown import groups_of
from train.kept import file_digest
from train.questions import Advance, Noise, Question, noise_of, pose, spread
from train.results import LOWER_IS_BETTER, OURS, Confusion, Result, read_confusion, read_rows
from train.scoring import Measure, confusion, measures
from train.suite import Kind, Row, Suite

CASCADE = "cascade"  # the baseline that stands on our own answers
NOISE = "noise"  # the set of recorded noises, where there is one
MEAN, WORST = "held-out mean", "held-out worst"


@dataclass(frozen=True)
class Part:
    """One row asked of one system. wordings: those that are asked, all held-out ones or the first trained one."""

    row: Row
    system: str
    questions: tuple[tuple[Question, ...], ...]  # of each wording
    wordings: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Unlike any other of the suite."""
        more = ["held-out wordings"] * bool(self.wordings) + [self.system] * (self.system != OURS)
        return " / ".join([self.row.key, *more])

    @property
    def total(self) -> int:
        """Questions."""
        return sum(map(len, self.questions))


@dataclass(frozen=True)
class Found:
    """What came of a part. seconds: that answering took."""

    results: tuple[Result, ...]
    confusion: Confusion | None
    seconds: float


def parts_of_row(row: Row, suite: Suite, split: Split, limit: int | None) -> list[Part]:
    """Ours, ours with other wordings, and the baselines. Raises InputError where its sets hold no answer."""
    items = read_corpus(suite.manifests(row), split)
    noise = None if row.noise_db is None else Noise(row.noise_db, recorded_noise(suite))

    def questions(wording: str | None = None) -> tuple[Question, ...]:
        return tuple(spread(pose(items, row.asks, wording, noise), limit))

    plain = (questions(),)
    if not plain[0]:
        raise InputError(f"{row.key}: no {split} clip holds an answer to this task: name another set")
    parts = [Part(row, OURS, plain)]
    if row.wordings:
        parts.append(Part(row, OURS, tuple(map(questions, row.asks.held_out)), row.asks.held_out))
    return parts + [Part(row, name, plain) for name in row.baselines]


def recorded_noise(suite: Suite) -> tuple[Item, ...]:
    """None where the suite's folders hold none: noise is white then."""
    return next(filter(None, map(noise_of, (suite.corpus / NOISE, suite.source / NOISE))), ())


def measure(part: Part, system: System, advance: Advance, clock: Callable[[], float]) -> Found:
    """Ask and score. Raises InputError."""
    row, task, begun = part.row, part.row.asks, clock()
    asked = [question for own in part.questions for question in own]
    answers = system.answer(asked, task, advance)
    seconds = clock() - begun
    if part.wordings:
        count = len(part.questions[0])
        said = [answers[start : start + count] for start in range(0, len(answers), count)]
        return Found(tuple(held_out_results(row.name, task, part.wordings, part.questions[0], said)), None, seconds)
    kinds = row.groups if part.system == OURS else ()
    results = results_of(row.name, task, asked, answers, kinds, part.system)
    true = [task.read(question.answer) for question in asked]
    matrix = confusion(true, answers) if part.system == OURS and isinstance(task, Label) else None
    return Found(tuple(results), matrix, seconds)


def results_of(
    name: str,
    task: Task,
    questions: Sequence[Question],
    said: Sequence[ParsedAnswer],
    kinds: Sequence[Kind] = (),
    system: str = OURS,
) -> list[Result]:
    """All scores of a task on these questions with their intervals, and on the groups of the clips."""
    everything = _measures(task, questions, said)
    groups = {"": np.ones(len(questions), dtype=bool)} | groups_of(kinds, [question.item for question in questions])
    return [
        result
        for group, chosen in groups.items()
        for own in everything
        if (result := _result(own, chosen, questions, name, task, system, group)) is not None
    ]


def held_out_results(
    name: str,
    task: Task,
    wordings: Sequence[str],
    questions: Sequence[Question],
    said: Sequence[Sequence[ParsedAnswer]],
) -> list[Result]:
    """The mean over wordings and the worst one, of each metric. said: the answers to each wording."""
    every = np.ones(len(questions), dtype=bool)
    found = []
    for same in zip(*(_measures(task, questions, own) for own in said), strict=True):
        values = [measure.value() for measure in same]
        worst = int((np.nanargmax if same[0].metric in LOWER_IS_BETTER else np.nanargmin)(values))
        note = f"of {len(wordings)} wordings"
        for own, wording, told in ((_mean(same), MEAN, note), (same[worst], WORST, wordings[worst])):
            result = _result(own, every, questions, name, task, OURS, "", wording, told)
            found += [] if result is None else [result]
    return found


def _measures(task: Task, questions: Sequence[Question], said: Sequence[ParsedAnswer]) -> list[Measure]:
    durations = [question.item.utterance.duration for question in questions]
    return measures(task, [task.read(question.answer) for question in questions], said, durations)


def _mean(same: Sequence[Measure]) -> Measure:
    """The mean of a score over wordings; a clip is drawn with its answers to all of them."""

    def of(sums: np.ndarray) -> float:
        return float(np.mean([own.of(part) for own, part in zip(same, np.split(sums, len(same)), strict=True)]))

    return Measure(same[0].metric, np.concatenate([own.counts for own in same], axis=1), of, same[0].applies)


def _result(
    measure: Measure,
    chosen: np.ndarray,
    questions: Sequence[Question],
    name: str,
    task: Task,
    system: str,
    group: str,
    wording: str = "",
    note: str | None = None,
) -> Result | None:
    """None where the chosen clips tell nothing about the score."""
    value = measure.value(chosen)
    if np.isnan(value):
        return None
    places = np.flatnonzero(measure.applies & chosen).tolist()
    seconds = sum(questions[place].item.utterance.duration for place in places)
    noise = questions[0].noise
    told = [measure.note if note is None else note] + ([noise.told] if noise else [])
    low, high = measure.interval(chosen)
    joined = "; ".join(filter(None, told))
    return Result(
        set=name,
        task=task.name,
        metric=measure.metric,
        value=value,
        clips=len(places),
        seconds=seconds,
        low=None if np.isnan(low) else low,
        high=None if np.isnan(high) else high,
        system=system,
        group=group,
        wording=wording,
        note=joined,
    )


def read_found(told: dict[str, Any]) -> Found:
    """A part as JSON holds it. Raises KeyError, TypeError or InputError where it is none."""
    matrix = None if told["confusion"] is None else read_confusion(told["confusion"])
    return Found(read_rows(told["results"]), matrix, told["seconds"])


def fingerprint(part: Part, suite: Suite, weights: str) -> str:
    """Of all that a part's results depend on.

    weights: the checkpoint's, and how it answers; most baselines do not ask it.
    """
    told: list[object] = [
        part.key,
        part.row.groups if part.system == OURS else (),
        part.wordings,
        weights if part.system in (OURS, CASCADE) else "",
        [(q.item.utterance.id, q.instruction, repr(q.answer), q.task) for own in part.questions for q in own],
    ]
    told += [file_digest(manifest) for manifest in suite.manifests(part.row)]
    if part.row.noise_db is not None:
        told.append([item.utterance.id for item in recorded_noise(suite)])
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
