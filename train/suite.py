"""What is evaluated: the YAML of ``train.evaluate --suite``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from speechllm.data.corpus import MANIFEST, manifest_of
from speechllm.errors import InputError, first_error, message_of
from speechllm.tasks import TASKS, Task
from speechllm.tasks.base import Metric
from train.config import Settings, read_config
from train.results import Target

Kind = Literal["speaker", "gender", "accent", "language", "noise", "duration"]
# metric of a task -> the metrics of its results; the first that there is counts, unless a row says otherwise
METRICS: dict[Metric, tuple[str, ...]] = {
    "wer": ("wer", "cer", "invented"),
    "bleu": ("bleu", "chrf", "invented"),
    "accuracy": ("uar", "accuracy"),
    "turns": ("der", "cpwer"),
    "activity": ("f1",),
    "slots": ("slot_f1", "intent_accuracy", "all_slots"),
}


class Row(Settings):
    """One task on the test split of one set, or of several together.

    groups: what scores are broken down by. wordings: whether every held-out wording is asked too. noise_db: SNR of the
    noise that is added. baselines: of train/baselines.py. at_least, aim: the one metric that counts -> what a release
    must reach, and should. label: how tables call the row; by default by set and task.
    """

    set: str | None = None
    sets: tuple[str, ...] = ()
    task: str
    groups: tuple[Kind, ...] = ()
    wordings: bool = False
    noise_db: float | None = None
    baselines: tuple[str, ...] = ()
    at_least: dict[str, float] = Field(default_factory=dict)
    aim: dict[str, float] = Field(default_factory=dict)
    label: str = ""

    @model_validator(mode="after")
    def _fits(self) -> Row:
        if (self.set is None) == (not self.sets):
            raise ValueError(f"{self.label or self.task}: give either set or sets")
        if self.task not in TASKS or not TASKS[self.task].listens:
            known = ", ".join(name for name, task in TASKS.items() if task.listens)
            raise ValueError(f"{self.name}: no task {self.task!r} on audio; there are {known}")
        metrics = METRICS[self.asks.metric]
        if unknown := [metric for metric in (*self.at_least, *self.aim) if metric not in metrics]:
            raise ValueError(f"{self.name}: {self.task} has no metric {unknown[0]!r}; it has {', '.join(metrics)}")
        if len({*self.at_least, *self.aim}) > 1:
            raise ValueError(f"{self.name}: at_least and aim name several metrics; a row is judged by one")
        if self.sets and self.baselines:
            raise ValueError(f"{self.name}: baselines learn from one set; give 'set', or leave 'baselines' out")
        return self

    @property
    def asks(self) -> Task:
        return TASKS[self.task]

    @property
    def every(self) -> tuple[str, ...]:
        """All its sets."""
        return self.sets or (self.set or "",)

    @property
    def name(self) -> str:
        """Of the set in results."""
        noise = "" if self.noise_db is None else f" at {self.noise_db:g} dB"
        return " + ".join(map(set_name, self.every)) + noise

    @property
    def key(self) -> str:
        """Unlike any other of the suite."""
        return f"{self.name} {self.task}"

    def target(self, found: Sequence[str], trained: bool = True) -> Target:
        """What it is judged by. found: metrics that there are results of. Raises InputError where its own has none."""
        metrics = [*self.at_least, *self.aim] or [m for m in METRICS[self.asks.metric] if m in found or not trained]
        metric = metrics[0]
        if trained and metric not in found:
            raise InputError(f"{self.key}: its clips tell nothing about {metric!r}: leave it out of at_least and aim")
        wanted = self.at_least.get(metric), self.aim.get(metric)
        return Target(self.name, self.task, self.label or self.key, metric, *wanted, trained)


class Suite(Settings):
    """corpus, source: folders of sets: ``corpus/NAME``, or else ``source/NAME``."""

    corpus: Path = Path()
    source: Path = Path()
    rows: tuple[Row, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _rows_differ(self) -> Suite:
        if again := [key for key, count in Counter(row.key for row in self.rows).items() if count > 1]:
            raise ValueError(f"{again[0]!r} is there twice: results could not be told apart")
        return self

    def folder(self, name: str) -> Path:
        """Of a set, or its manifest. Raises InputError where there is none."""
        for place in (self.corpus, self.source):
            path = place / name
            if path.is_file() or (path / MANIFEST).is_file():
                return path
        raise InputError(
            f"{name}: neither in {self.corpus} nor in {self.source}: make it (python -m train.corpus), or name other "
            "folders as 'corpus' and 'source' of the suite"
        )

    def manifests(self, row: Row) -> list[Path]:
        """Of the sets of a row. Raises InputError."""
        return [manifest_of(self.folder(name)) for name in row.every]


def set_name(path: str | Path) -> str:
    """Of a set in tables: the name of its folder. path: the folder, or the manifest in it."""
    path = Path(path)
    return path.parent.name if path.suffix == ".jsonl" else path.name


def read_suite(path: Path) -> Suite:
    """Raises InputError, which names the row that is wrong."""
    return read_config(path, Suite)


def make_suite(rows: Sequence[dict[str, Any]]) -> Suite:
    """Of rows whose sets are paths. Raises InputError."""
    try:
        return Suite.model_validate({"rows": rows})
    except ValidationError as error:
        raise InputError(message_of(first_error(error))) from error  # its rows are not the user's
