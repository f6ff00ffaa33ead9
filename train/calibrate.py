"""Make confidences mean what they say, and measure it: ``python -m train.calibrate --model DIR --dev SET --test SET``.

Confidences are probabilities to the power of 1 / temperature. The temperature is fitted on the dev sets, by the
likelihood of what is right and wrong, and written to the checkpoint. The test sets tell how good confidences are
without and with it. The answers about finished sets are kept in ``answers.jsonl`` of the out folder: an interrupted
calibration goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import jiwer
import numpy as np
import typer

from speechllm.checkpoint_settings import SETTINGS, read_settings
from speechllm.data.corpus import manifest_of, read_corpus
from speechllm.data.manifest import Split
from speechllm.errors import InputError
from speechllm.metrics import normalize_text
from speechllm.tasks import TASKS, Task
from speechllm.tasks.labels import Label
from train.asking import Server
from train.calibration import Judgements, fit_temperature, negative_log_likelihood
from train.calibration_report import Report, make_row, write_report
from train.commands import plain_errors
from train.kept import Kept, file_digest, weights_fingerprint
from train.loop import progress_bar
from train.output import output_folder, write_whole
from train.questions import Question, pose, spread
from train.scoring import words
from train.suite import set_name

KEPT = "answers.jsonl"
LEAST = 1e-300  # of a confidence: that of nothing is 0, which has no logarithm
HALF_DIGIT = 0.5e-4  # confidences are written with four digits that count: 1 is within this of the true value

Row = tuple[float, int, int, int]  # of Judgements: log-probability, errors, total, clip


@dataclass(frozen=True)
class Judged:
    """What of an answer is right, and how sure the model was: log-probabilities, those of the judged words too.

    errors: of words, as WER counts them, among ``total`` reference words; of a label 0 or 1 of 1.
    label: whether the answer is a label.
    """

    log_prob: float
    words: tuple[tuple[float, bool], ...]
    errors: int
    total: int
    label: bool


@dataclass(frozen=True)
class Answers:
    """The judged answers to the questions of one task about one set."""

    judged: tuple[Judged, ...]


@dataclass(frozen=True)
class Posed:
    """The questions of one task about the split of one set."""

    path: Path
    split: Split
    task: Task
    questions: list[Question]

    @property
    def set(self) -> str:
        """The name of the set."""
        return set_name(self.path)

    @property
    def key(self) -> str:
        """What its answers are kept under."""
        return f"{self.split} {self.set} {self.task.name}"

    def fingerprint(self, weights: str) -> str:
        """Of all that the answers depend on. weights: fingerprint of the checkpoint."""
        asked = [(q.item.utterance.id, q.instruction, repr(q.answer)) for q in self.questions]
        told = json.dumps([weights, file_digest(manifest_of(self.path)), asked])
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def align(reference: str, hypothesis: Sequence[str]) -> tuple[list[bool | None], int, int]:
    """Which words of an answer are right, errors and reference words.

    Compared is what WER compares. A word that has a hyphen may be two there, and is right when both are; one without a
    letter or digit is none, and gets None.
    """
    pieces = [normalize_text(word).split() for word in hypothesis]
    said = list(chain.from_iterable(pieces))
    right = [False] * len(said)
    true = normalize_text(reference)
    if not true:  # jiwer takes no empty reference
        errors = len(said)
    else:
        out = jiwer.process_words(true, " ".join(said))
        errors = out.substitutions + out.deletions + out.insertions
        for chunk in out.alignments[0]:
            if chunk.type == "equal":
                right[chunk.hyp_start_idx : chunk.hyp_end_idx] = [True] * (chunk.hyp_end_idx - chunk.hyp_start_idx)
    rest = iter(right)
    judged = [all(list(islice(rest, len(piece)))) if piece else None for piece in pieces]
    return judged, errors, len(true.split())


def judge(question: Question, task: Task, answer: dict[str, Any], temperature: float) -> Judged:
    """An answer of the server compared with the right one. temperature: of the confidences in it."""

    def log_prob(confidence: float) -> float:
        return temperature * math.log(min(max(confidence, LEAST), 1 - HALF_DIGIT))

    true = task.read(question.answer)
    whole = log_prob(answer["confidence"])
    if isinstance(task, Label):
        # the confidence is that of all that is said, which may be more than the label
        alone = answer["label"] is not None and task.answers.keys() == {*task.labels}
        return Judged(whole, (), int(answer["label"] != true.label), 1, alone)
    right, errors, total = align(words(true, task), [word["text"] for word in answer["words"]])
    judged = zip(answer["words"], right, strict=True)
    own = tuple((log_prob(word["confidence"]), same) for word, same in judged if same is not None)
    return Judged(whole, own, errors, total, False)


def word_rows(answers: Sequence[Judged]) -> Iterator[Row]:
    """Of each judged word."""
    return ((log_prob, not right, 1, n) for n, answer in enumerate(answers) for log_prob, right in answer.words)


def answer_rows(answers: Sequence[Judged]) -> Iterator[Row]:
    """Of each answer as a whole."""
    return ((answer.log_prob, answer.errors, answer.total, n) for n, answer in enumerate(answers))


def to_fit(answers: Sequence[Judged]) -> Judgements:
    """What has a confidence that is a probability to be right: words, and labels that are all that is said.

    Of a transcript there are its words, and more of them than of answers.
    """
    labels = ((answer.log_prob, answer.errors, 1, n) for n, answer in enumerate(answers) if answer.label)
    return judgements(chain(word_rows(answers), labels))


def judgements(rows: Iterable[Row]) -> Judgements:
    """The rows as arrays."""
    log_probs, *counts = np.array(list(rows), dtype=np.float64).reshape(-1, 4).T
    return Judgements(log_probs, *(count.astype(np.int64) for count in counts))


def questions_of(sets: Sequence[Path], split: Split, tasks: Sequence[str], limit: int | None) -> list[Posed]:
    """What is asked about the sets: every task with words or labels whose answers they hold."""
    chosen = [TASKS[name] for name in tasks if name in TASKS]
    able = [task for task in chosen if task.listens and (task.metric == "wer" or isinstance(task, Label))]
    found = []
    for path in sets:
        items = read_corpus([path], split)
        found += [Posed(path, split, task, spread(pose(items, task), limit)) for task in able]
    found = [posed for posed in found if posed.questions]
    if not found:
        names = ", ".join(task.name for task in able) or "none"
        raise InputError(
            f"--{split}: no {split} set holds an answer that can be judged: the checkpoint's tasks with words or "
            f"labels are {names}; name other sets"
        )
    return found


def read_answers(told: dict[str, Any]) -> Answers:
    """What JSON holds of them. Raises KeyError or TypeError where it is none."""
    own = [one | {"words": tuple((log_prob, right) for log_prob, right in one["words"])} for one in told["judged"]]
    return Answers(tuple(Judged(**one) for one in own))


def ask_and_judge(asked: Sequence[Posed], model: Path, out: Path) -> list[tuple[Judged, ...]]:
    """The judged answers to each of ``asked``; those that are finished are kept in ``out``. Raises InputError."""
    settings = read_settings(model)
    weights, kept = weights_fingerprint(model, settings, None), Kept(out / KEPT, read_answers)
    prints = [posed.fingerprint(weights) for posed in asked]
    found = [kept.found(posed.key, own) for posed, own in zip(asked, prints, strict=True)]
    judged = []
    with progress_bar() as bar, Server(model) as server:
        for posed, own, answers in zip(asked, prints, found, strict=True):
            if answers is None:
                line = bar.add_task(posed.key, total=len(posed.questions))
                said = server.ask(posed.questions, lambda number: bar.advance(line, number))  # noqa: B023
                pairs = zip(posed.questions, said, strict=True)
                answers = Answers(tuple(judge(q, posed.task, a, settings.confidence_temperature) for q, a in pairs))
                kept.keep(posed.key, own, answers)
            judged.append(answers.judged)
    return judged


def calibrate(model: Path, dev: Sequence[Path], test: Sequence[Path], limit: int | None, out: Path) -> Report:
    """Ask about all sets what is not kept in ``out`` yet, fit the temperature on ``dev``, measure on ``test``.

    Raises InputError, before anything is asked where a set holds nothing to ask.
    """
    settings = read_settings(model)
    learnt = questions_of(dev, "dev", settings.tasks, limit)
    tested = questions_of(test, "test", settings.tasks, limit)
    judged = ask_and_judge(learnt + tested, model, out)
    fitting = to_fit(list(chain(*judged[: len(learnt)])))
    temperature = fit_temperature(fitting)
    rows = []
    for posed, answers in zip(tested, judged[len(learnt) :], strict=True):
        measure = "WER %" if posed.task.metric == "wer" else "wrong %"
        if (own := judgements(word_rows(answers))).right.size:
            rows.append(make_row(posed.set, posed.task.name, "words", own, temperature, "wrong %"))
        whole = judgements(answer_rows(answers))
        rows.append(make_row(posed.set, posed.task.name, "answers", whole, temperature, measure))
    return Report(
        model=settings.name,
        fingerprint=weights_fingerprint(model, settings, None),
        temperature=temperature,
        dev_sets=tuple(dict.fromkeys(posed.set for posed in learnt)),
        fitted_on=fitting.right.size,
        likelihood_before=-negative_log_likelihood(fitting, 1.0),
        likelihood_after=-negative_log_likelihood(fitting, temperature),
        rows=tuple(rows),
    )


def write_temperature(model: Path, temperature: float) -> None:
    """Into the checkpoint's settings: they are whole at any time. Raises InputError."""
    settings = read_settings(model).model_copy(update={"confidence_temperature": temperature})
    path = model / SETTINGS
    try:
        write_whole(path, settings.model_dump_json(indent=1) + "\n")
    except OSError as error:
        fault = f"cannot be written ({error.strerror})"
        raise InputError(f"{path}: {fault}; the temperature {temperature:.4f} is not set") from error


def main(
    model: Annotated[Path, typer.Option(help="checkpoint folder; its confidence_temperature is set")],
    dev: Annotated[list[Path], typer.Option(help="manifest.jsonl, or its folder, to fit on; repeatable")],
    test: Annotated[list[Path], typer.Option(help="manifest.jsonl, or its folder, to measure on; repeatable")],
    out: Annotated[Path, typer.Option(help="folder for calibration.json, .md and .png, and answers.jsonl")],
    limit: Annotated[int | None, typer.Option(min=1, help="so many clips of each set, from all over it")] = None,
) -> None:
    """Fit the temperature of a checkpoint's confidences on dev sets; measure calibration on test sets."""
    with plain_errors("stopped: finished sets are kept; run the same command to go on"), output_folder(out):
        report = calibrate(model, dev, test, limit, out)
        write_temperature(model, report.temperature)
        typer.echo(write_report(report, out))


if __name__ == "__main__":
    typer.run(main)
