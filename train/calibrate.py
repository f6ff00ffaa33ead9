"""Make confidences mean what they say, and measure it: ``python -m train.calibrate --model DIR --dev SET --test SET``.

Confidences are probabilities to the power of 1 / temperature. The temperature is fitted on the dev sets, by the
likelihood of what is right and wrong, and written to the checkpoint. The test sets tell how good confidences are
without and with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import jiwer
import numpy as np
import typer

from speechllm.checkpoint_settings import SETTINGS, read_settings
from speechllm.data.corpus import read_corpus
from speechllm.data.manifest import Split
from speechllm.errors import InputError
from speechllm.metrics import normalize_text
from speechllm.tasks import TASKS, Task
from speechllm.tasks.labels import Label
from train.asking import Server
from train.calibration import Judgements, fit_temperature, negative_log_likelihood
from train.calibration_report import Report, make_row, write_report
from train.kept import weights_fingerprint
from train.loop import progress_bar
from train.questions import Question, pose, spread
from train.scoring import words
from train.suite import set_name

HALF_DIGIT = 0.5e-4  # confidences are written with four digits: 0 and 1 are within this of their true values

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
class Posed:
    """The questions of one task about one set."""

    set: str
    task: Task
    questions: list[Question]


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
        return temperature * math.log(min(max(confidence, HALF_DIGIT), 1 - HALF_DIGIT))

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
        found += [Posed(set_name(path), task, spread(pose(items, task), limit)) for task in able]
    found = [posed for posed in found if posed.questions]
    if not found:
        names = ", ".join(task.name for task in able) or "none"
        raise InputError(
            f"--{split}: no {split} set holds an answer that can be judged: the checkpoint's tasks with words or "
            f"labels are {names}; name other sets"
        )
    return found


def ask_and_judge(
    asked: Sequence[Posed], model: Path, temperature: float, advance: Callable[[int], None]
) -> list[list[Judged]]:
    """The judged answers to each of ``asked``."""
    everything = [question for posed in asked for question in posed.questions]
    with Server(model) as server:
        answers = iter(server.ask(everything, advance))
    return [
        [judge(question, posed.task, next(answers), temperature) for question in posed.questions] for posed in asked
    ]


def calibrate(model: Path, dev: Sequence[Path], test: Sequence[Path], limit: int | None) -> Report:
    """Ask about all sets, fit the temperature on ``dev``, measure on ``test``. Raises InputError."""
    settings = read_settings(model)
    learnt = questions_of(dev, "dev", settings.tasks, limit)
    tested = questions_of(test, "test", settings.tasks, limit)
    with progress_bar() as bar:
        line = bar.add_task("ask", total=sum(len(posed.questions) for posed in learnt + tested))
        judged = ask_and_judge(
            learnt + tested, model, settings.confidence_temperature, lambda number: bar.advance(line, number)
        )
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
    new = model / f"{SETTINGS}.new"
    try:
        new.write_text(settings.model_dump_json(indent=1) + "\n", encoding="utf-8")
        new.replace(model / SETTINGS)
    except OSError as error:
        fault = f"cannot be written ({error.strerror})"
        raise InputError(f"{new}: {fault}; the temperature {temperature:.4f} is not set") from error


def main(
    model: Annotated[Path, typer.Option(help="checkpoint folder; its confidence_temperature is set")],
    dev: Annotated[list[Path], typer.Option(help="manifest.jsonl, or its folder, to fit on; repeatable")],
    test: Annotated[list[Path], typer.Option(help="manifest.jsonl, or its folder, to measure on; repeatable")],
    out: Annotated[Path, typer.Option(help="folder for calibration.json, calibration.md and calibration.png")],
    limit: Annotated[int | None, typer.Option(min=1, help="so many clips of each set, from all over it")] = None,
) -> None:
    """Fit the temperature of a checkpoint's confidences on dev sets; measure calibration on test sets."""
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)  # before the work, not after it
        except OSError as error:
            raise InputError(f"--out {out}: cannot be made ({error.strerror}); give another folder") from error
        report = calibrate(model, dev, test, limit)
        typer.echo(write_report(report, out))
        write_temperature(model, report.temperature)
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
