"""What an evaluation finds, and the file it is kept in: ``results.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from speechllm.errors import InputError

OURS = "speechllm"
LOWER_IS_BETTER = frozenset({"wer", "cer", "der", "cpwer", "invented", "malformed"})
NAMES = {  # of metrics, in tables
    "wer": "WER %",
    "cer": "CER %",
    "bleu": "BLEU",
    "chrf": "chrF",
    "invented": "invented words, % of clips without speech",
    "uar": "UAR %",
    "accuracy": "accuracy %",
    "der": "DER %",
    "cpwer": "cpWER %",
    "f1": "speech F1 %",
    "slot_f1": "slot F1 %",
    "intent_accuracy": "intent accuracy %",
    "all_slots": "intent and all slots right %",
    "malformed": "malformed %",
}


@dataclass(frozen=True)
class Result:
    """One score of one system on a test set, or on a group of its clips.

    set: name of the test set. task: of ``speechllm.tasks.TASKS``. metric: of ``NAMES``. value: percent; BLEU and chrF
    from 0 to 100. seconds: of audio. low, high: 95 % bootstrap interval over clips. system: ours, or a baseline. group:
    "" for all clips, else as in "speaker=ann". wording: "" for the first trained one, else "held-out mean" or
    "held-out worst". note: signature, normaliser, collar, the wording.
    """

    set: str
    task: str
    metric: str
    value: float
    clips: int
    seconds: float
    low: float | None
    high: float | None
    system: str = OURS
    group: str = ""
    wording: str = ""
    note: str = ""


@dataclass(frozen=True)
class Confusion:
    """How often a label of ``labels`` (row) was answered with another (column)."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Target:
    """A row of a suite: the score it is judged by, and what it must reach, and should; None where nothing is asked.

    trained: whether the checkpoint was trained on the task; otherwise it was not asked.
    """

    set: str
    task: str
    label: str
    metric: str
    at_least: float | None = None
    aim: float | None = None
    trained: bool = True

    @property
    def key(self) -> str:
        """Unlike any other of the suite."""
        return f"{self.set} {self.task}"

    def reached(self, value: float, wanted: float) -> bool:
        """Whether a score is as good as ``wanted``."""
        return value <= wanted if self.metric in LOWER_IS_BETTER else value >= wanted

    def unsure(self, own: Result, wanted: float) -> bool:
        """Whether the interval of a score holds both: that it is reached, and that it is not."""
        edges = [edge for edge in (own.low, own.high) if edge is not None]
        return len({self.reached(value, wanted) for value in (own.value, *edges)}) > 1


@dataclass(frozen=True)
class Evaluation:
    """Everything in ``results.json``.

    checkpoint: its name. fingerprint: of its weights and settings. confusions: by "SET TASK". seconds: that answering
    took, by part of the work. targets: those of the suite, with the metric that each row is judged by.
    """

    checkpoint: str
    fingerprint: str
    command: str
    results: tuple[Result, ...]
    confusions: Mapping[str, Confusion] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()

    def whole(self, target: Target, system: str = OURS, metric: str | None = None) -> Result | None:
        """The score of a system on all clips of a row, asked the first trained wording; None where there is none."""
        wanted = (target.set, target.task, metric or target.metric, system, "", "")
        found = (r for r in self.results if (r.set, r.task, r.metric, r.system, r.group, r.wording) == wanted)
        return next(found, None)


def normalised(metric: str, value: float) -> float:
    """A score from 0 to 100 of which more is better: max(0, 100 - x) where less is."""
    return max(0.0, 100.0 - value) if metric in LOWER_IS_BETTER else value


def write_results(path: Path, evaluation: Evaluation) -> None:
    """Raises OSError where the file cannot be written."""
    path.write_text(json.dumps(asdict(evaluation), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_results(path: Path) -> Evaluation:
    """What ``write_results`` wrote. Raises InputError for a file that is not there, or is none."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        known = {name: value for name, value in told.items() if name in {f.name for f in fields(Evaluation)}}
        known["results"] = read_rows(told["results"])
        known["targets"] = tuple(Target(**target) for target in told.get("targets", ()))
        known["confusions"] = {key: read_confusion(one) for key, one in told.get("confusions", {}).items()}
        return Evaluation(**known)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); python -m train.evaluate writes it") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not what train.evaluate writes ({error}); evaluate again") from error


def read_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[Result, ...]:
    """Results as they are in JSON. Raises KeyError or TypeError for others."""
    return tuple(Result(**row) for row in rows)


def read_confusion(told: Mapping[str, Any]) -> Confusion:
    """A confusion as it is in JSON. Raises KeyError or TypeError for another."""
    return Confusion(tuple(told["labels"]), tuple(map(tuple, told["counts"])))
