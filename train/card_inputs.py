"""What a model card is made from: files that other commands leave, each of which may be missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechllm.checkpoint import Checkpoint
from speechllm.errors import InputError
from train.calibration import Kept
from train.calibration_report import Measures
from train.calibration_report import Report as Calibration
from train.calibration_report import Row as CalibrationRow
from train.codec import CodecTraining
from train.icl_report import Report as Icl
from train.icl_report import read_row
from train.licences import Licences
from train.pretrain_config import Pretraining
from train.results import Evaluation
from train.stage_costs import Cost
from train.suite import set_name


@dataclass(frozen=True)
class Amounts:
    """What a training came to, by its ``metrics.jsonl``. ids, hours: trained on, padding not counted; None: not told.

    seconds: of wall clock, with validation.
    """

    name: str
    steps: int
    ids: float | None
    hours: float | None
    seconds: float


@dataclass(frozen=True)
class Inputs:
    """All that is known. corpus: the report of train.corpus. pretrain: the configs of the trainings, in their order."""

    checkpoint: Checkpoint
    licences: Licences
    results: Evaluation | None = None
    icl: Icl | None = None
    calibration: Calibration | None = None
    costs: tuple[Cost, ...] = ()
    corpus: dict[str, Any] | None = None
    pretrain: tuple[Pretraining, ...] = ()
    codec: CodecTraining | None = None
    pictures: tuple[str, ...] = ()

    def heard_by_lm(self) -> list[str]:
        """Names of the corpora that the language model was trained on."""
        if self.pretrain:
            return list(dict.fromkeys(folder.name for config in self.pretrain for folder in config.corpora))
        corpora = self.corpus["corpora"] if self.corpus else {}
        return [name for name, corpus in corpora.items() if corpus["encoded"] and "train" in corpus["splits"]]

    def heard_by_codec(self) -> list[str]:
        """Names of the corpora that the codec was trained on."""
        return [set_name(path) for path in self.codec.manifests] if self.codec else []

    def heard(self) -> list[str]:
        return list(dict.fromkeys([*self.heard_by_lm(), *self.heard_by_codec()]))

    @property
    def all_heard_known(self) -> bool:
        """Whether :meth:`heard` is all that the weights learnt from: the codec's data are known, and no training
        started from weights of which nothing is told.
        """
        made = [config.out / "checkpoint" for config in self.pretrain]
        started = [config.start_from for config in self.pretrain if config.start_from]
        own = all(start in made for start in started) and not any(config.init_from for config in self.pretrain)
        return bool(self.heard_by_lm() and self.heard_by_codec()) and own

    def runs(self) -> list[Amounts]:
        """The trainings whose metrics are there."""
        return [amounts(name, path) for name, path in self._logs() if path.is_file()]

    def unlogged(self) -> list[str]:
        """The others."""
        return [name for name, path in self._logs() if not path.is_file()]

    def _logs(self) -> list[tuple[str, Path]]:
        folders = [self.codec.out / stage for stage in ("semantic", "acoustic")] if self.codec else []
        named = [(f"codec, {folder.name}", folder) for folder in folders]
        named += [(config.out.name, config.out) for config in self.pretrain]
        return [(name, folder / "metrics.jsonl") for name, folder in named]


@contextmanager
def of_file(path: Path, command: str) -> Iterator[None]:
    """Raises InputError for a file that is missing or not what ``command`` writes."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {command} writes it") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not what {command} writes ({type(error).__name__}: {error})") from error


def read_icl(path: Path) -> Icl:
    """The report of train.evaluate_icl. Raises InputError."""
    with of_file(path, "python -m train.evaluate_icl"):
        told = json.loads(path.read_text(encoding="utf-8"))
        return Icl(told["model"], told["fingerprint"], told["asked"], told["seed"], tuple(map(read_row, told["rows"])))


def read_calibration(path: Path) -> Calibration:
    """The report of train.calibrate, its bins as they are in JSON. Raises InputError."""
    with of_file(path, "python -m train.calibrate"):
        told = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(
            CalibrationRow(
                **row
                | {name: Measures(**row[name]) for name in ("before", "after")}
                | {"kept": tuple(Kept(**point) for point in row["kept"])}
            )
            for row in told["rows"]
        )
        return Calibration(**told | {"dev_sets": tuple(told["dev_sets"]), "rows": rows})


def read_corpus_report(path: Path) -> dict[str, Any]:
    """The report of train.corpus. Raises InputError."""
    with of_file(path, "python -m train.corpus"):
        told = json.loads(path.read_text(encoding="utf-8"))
        for corpus in told["corpora"].values():
            corpus["kind"], corpus["encoded"], corpus["splits"]
        return dict(told)


def amounts(name: str, path: Path) -> Amounts:
    """Add up a ``metrics.jsonl``, whose seconds begin anew whenever the run is taken up. Raises InputError."""
    with of_file(path, "a training"):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        spans = [record["seconds"] - begun for record, begun in zip(records, begins(records), strict=True)]
        return Amounts(
            name,
            max(record["step"] for record in records),
            weighted(records, spans, "tokens_per_second"),
            None if (hours := weighted(records, spans, "audio_hours_per_hour")) is None else hours / 3600,
            sum(spans),
        )


def begins(records: Iterable[dict[str, float]]) -> Iterator[float]:
    """When what each record tells of began, on the clock of its start of the run."""
    last = 0.0
    for record in records:
        yield last if record["seconds"] >= last else 0.0
        last = record["seconds"]


def weighted(records: list[dict[str, float]], spans: list[float], rate: str) -> float | None:
    """A rate times the seconds of each record that has it; None when none has."""
    found = [record[rate] * span for record, span in zip(records, spans, strict=True) if rate in record]
    return sum(found) if found else None
