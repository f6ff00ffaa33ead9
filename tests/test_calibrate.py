"""Confidences: what counts as right, the measures by hand, a temperature found again, and the whole command."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RATE, command
from typer import Typer
from typer.testing import CliRunner

from serve.answer import Answer
from serve.answerer import Answerer
from speechllm.audio import write_audio
from speechllm.checkpoint import load_checkpoint
from speechllm.checkpoint_settings import SETTINGS, read_settings
from speechllm.data.corpus import Item
from speechllm.data.manifest import Split, Utterance, write_manifest
from speechllm.errors import InputError
from speechllm.metrics import wer
from speechllm.tasks import TASKS
from train import calibrate
from train.asking import Server
from train.calibrate import Judged, align, judge, to_fit
from train.calibration import (
    Judgements,
    abstention,
    at_coverage,
    auroc,
    brier,
    error_interval,
    fit_temperature,
    negative_log_likelihood,
    reliability,
)
from train.calibration_report import floored
from train.questions import Question


def judged(confidences: list[float], errors: list[int], totals: list[int] | None = None) -> Judgements:
    return Judgements(
        np.log(confidences), np.array(errors), np.array(totals or [1] * len(errors)), np.arange(len(errors))
    )


def utterance(number: int, text: str, split: Split = "test") -> Utterance:
    return Utterance(
        id=f"u{number}", audio=f"{number}.wav", duration=0.5, text=text, language="en", split=split, source="made"
    )


def test_words_are_right_where_wer_finds_no_error() -> None:
    assert align("Two well-known dogs run.", ["two", "WELL-KNOWN", "dogs", "–", "run!"]) == ([1, 1, 1, None, 1], 0, 5)
    assert align("a well known dog", ["a", "well-knows", "dog"]) == ([True, False, True], 1, 4)
    assert align("a dog runs", ["a", "big", "dog"]) == ([True, False, True], 2, 3)
    assert align("the dog the cat", ["the", "cat"])[0].count(True) == 2
    assert align("", ["a", "b-c"]) == ([False, False], 3, 0)
    assert align("a dog", []) == ([], 2, 2)
    assert align("", []) == ([], 0, 0)


def test_errors_are_those_of_wer() -> None:
    rng = Random(0)
    words = ["a", "dog", "dog's", "well-known", "-", "…", "Straße", "½", "e\u0301", "´", "x´y", "ΑΣ", "\u0301b"]
    for _ in range(100):
        reference, said = (" ".join(rng.choices(words, k=rng.randrange(1, 8))) for _ in range(2))
        right, errors, total = align(reference, said.split())
        assert len(right) == len(said.split())
        if total:
            assert errors / total == wer([reference], [said])


def test_answers_are_judged_at_temperature_1() -> None:
    question = Question(Item(utterance(0, "a dog"), Path()), "", ("a dog",))
    words = [{"text": "a", "confidence": 1.0}, {"text": "hat", "confidence": 0.5}, {"text": "!", "confidence": 0.5}]
    found = judge(question, TASKS["transcribe"], {"confidence": 0.25, "words": words}, 2.0)
    assert (found.errors, found.total, found.label) == (1, 2, False)
    assert found.log_prob == pytest.approx(2 * math.log(0.25))
    (sure, unsure) = found.words
    assert sure == (pytest.approx(2 * math.log(0.99995)), True)
    assert unsure == (pytest.approx(2 * math.log(0.5)), False)

    question = Question(Item(utterance(0, "a dog"), Path()), "", ("male",))
    given = [
        judge(question, TASKS["gender"], {"confidence": 0.5, "label": label}, 1.0) for label in ("male", "female", None)
    ]
    assert [(answer.errors, answer.total, answer.label) for answer in given] == [
        (0, 1, True),
        (1, 1, True),
        (1, 1, False),
    ]
    fitted = to_fit([found, *given])
    assert fitted.right.tolist() == [True, False, True, False]  # two words, two labels
    assert fitted.log_probs[2] == pytest.approx(math.log(0.5))


def test_measures_are_hand_computed() -> None:
    four = judged([0.9, 0.9, 0.3, 0.3], [0, 1, 1, 2])
    bins = reliability(four, 1.0)
    assert bins.counts.tolist() == [0] * 4 + [2] + [0] * 8 + [2, 0]
    assert bins.right.tolist() == [0] * 13 + [1, 0]
    assert bins.error == pytest.approx((0.8 + 0.6) / 4)
    assert brier(four, 1.0) == pytest.approx((0.01 + 0.81 + 0.09 + 0.09) / 4)
    assert auroc(four) == pytest.approx(2.5 / 3)
    assert auroc(judged([0.9, 0.8], [0, 0])) is None
    assert reliability(four, 2.0).confidence.sum() == pytest.approx(2 * math.sqrt(0.9) + 2 * math.sqrt(0.3))
    edges = reliability(judged([1 / 15, 14 / 15, 1.0, 1e-9], [0, 0, 0, 1]), 1.0)
    assert edges.counts.tolist() == [2] + [0] * 12 + [1, 1]


def test_the_interval_is_over_clips() -> None:
    rng = np.random.default_rng(0)
    many = judged(rng.uniform(0.01, 0.99, 300).tolist(), rng.integers(0, 2, 300).tolist())
    low, high = error_interval(many, 1.0)
    assert low < reliability(many, 1.0).error < high
    one_clip = Judgements(many.log_probs, many.errors, many.totals, np.zeros(300, dtype=np.int64))
    assert error_interval(one_clip, 1.0) == (pytest.approx(reliability(many, 1.0).error),) * 2


def test_confidences_are_told_with_four_digits_that_count_and_never_above() -> None:
    for confidence, told in ((1.0, 1.0), (0.98765, 0.9876), (3.45678e-9, 3.456e-9), (0.0, 0.0), (1e-320, 1e-320)):
        assert told == floored(confidence) <= confidence


def test_what_is_kept_is_hand_computed() -> None:
    curve = abstention(judged([0.2, 0.8, 0.8, 0.9], [3, 1, 0, 0], [4, 5, 5, 0]), 1.0)
    assert [(kept.coverage, kept.risk) for kept in curve] == [(0.25, None), (0.75, 0.1), (1.0, 4 / 14)]
    assert [kept.confidence for kept in curve] == pytest.approx([0.9, 0.8, 0.2])
    assert at_coverage(curve, 0.5) == curve[1]
    assert at_coverage(curve, 1.0) == curve[2]


@pytest.mark.parametrize("true", [0.3, 1.0, 2.5])
def test_a_temperature_is_found_again(true: float) -> None:
    log_probs, errors = [], []
    for log_prob in np.log(np.linspace(0.02, 0.98, 40)):
        right = round(1000 * math.exp(log_prob / true))
        log_probs += [log_prob] * 1000
        errors += [0] * right + [1] * (1000 - right)
    many = judged(np.exp(log_probs).tolist(), errors)
    found = fit_temperature(many)
    assert found == pytest.approx(true, rel=0.01)
    least = negative_log_likelihood(many, found)
    assert least < min(negative_log_likelihood(many, found * factor) for factor in (0.98, 1.02))
    assert reliability(many, found).error < 0.01


@pytest.mark.parametrize(("errors", "which"), [([0, 0], "right"), ([1, 1], "wrong")])
def test_no_temperature_fits_what_is_all_alike(errors: list[int], which: str) -> None:
    with pytest.raises(InputError, match=f"all 2 words and labels answered are {which}"):
        fit_temperature(judged([0.5, 0.6], errors))


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy at temperature 20, where the confidences of random weights do not all round to 0."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    settings = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps(settings | {"confidence_temperature": 20.0}))
    return folder


def test_whole_command(
    tiny_checkpoint: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    files = [str(tmp_path / "set" / f"{number}.wav") for number in range(4)]
    (tmp_path / "set").mkdir()
    for number, file in enumerate(files):
        write_audio(file, 0.1 * torch.randn(1, RATE * (number + 1) // 2, generator=generator), RATE)
    answers = [*Answerer(load_checkpoint(tiny_checkpoint)).ask(files, TASKS["transcribe"].wordings[0])]
    said = [answer for answer in answers if isinstance(answer, Answer) and answer.words]
    assert len(said) == 4
    texts = [said[0].text, "xyz", said[2].text, "xyz"]  # random weights spell one word, whatever they hear
    splits: list[Split] = ["dev", "dev", "test", "test"]
    write_manifest(
        tmp_path / "set" / "manifest.jsonl",
        [utterance(number, text, split) for number, (text, split) in enumerate(zip(texts, splits, strict=True))],
    )
    before = read_settings(checkpoint)
    sets = ("--dev", tmp_path / "set", "--test", tmp_path / "set" / "manifest.jsonl")
    asked: list[int] = []
    ask = Server.ask

    def stopping(server: Server, questions: Sequence[Question], advance: Any) -> Any:
        asked.append(len(questions))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ask(server, questions, advance)

    monkeypatch.setattr(Server, "ask", stopping)
    arguments = ["--model", checkpoint, *sets, "--out", tmp_path / "out"]
    app = Typer()
    app.command()(calibrate.main)
    stopped = CliRunner().invoke(app, [*map(str, arguments)])
    assert stopped.exit_code == 130
    assert "finished sets are kept" in stopped.output
    printed = command(calibrate.main, *arguments)
    assert asked == [2, 2, 2]  # dev, test, and test again

    words = [
        (math.log(word.confidence), right)
        for answer, text in zip(said[:2], texts, strict=False)
        for word, right in zip(answer.words, align(text, [word.text for word in answer.words])[0], strict=True)
        if right is not None
    ]
    assert {right for _, right in words} == {True, False}
    expected = fit_temperature(to_fit([Judged(0.0, tuple(words), 0, 0, False)]))
    after = read_settings(checkpoint)
    assert after.confidence_temperature == pytest.approx(expected, rel=0.02)  # confidences were told with four digits
    assert after == before.model_copy(update={"confidence_temperature": after.confidence_temperature})
    assert not list(checkpoint.glob("*.new"))

    report = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert report["temperature"] == after.confidence_temperature
    assert [(row["set"], row["of"]) for row in report["rows"]] == [("set", "words"), ("set", "answers")]
    assert [sum(row["after"]["bins"]["counts"]) for row in report["rows"]] == [row["count"] for row in report["rows"]]
    assert report["rows"][1]["count"] == 2
    assert report["rows"][1]["kept"][-1]["risk"] == wer(texts[2:], [answer.text for answer in said[2:]]) > 0
    assert (tmp_path / "out" / "calibration.md").read_text() in printed
    assert (tmp_path / "out" / "calibration.png").stat().st_size > 1000


def test_faults_are_told_before_anything_is_asked(checkpoint: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path / "manifest.jsonl", [utterance(0, "a dog", "dev")])
    app = Typer()
    app.command()(calibrate.main)

    def run(model: Path, test: Path, out: Path) -> str:
        options = {"--model": model, "--dev": tmp_path, "--test": test, "--out": out}
        done = CliRunner().invoke(app, [str(word) for pair in options.items() for word in pair])
        assert done.exit_code == 2
        return done.output

    assert "no test utterance" in run(checkpoint, tmp_path, tmp_path / "out")
    assert "not a checkpoint folder" in run(tmp_path, tmp_path, tmp_path / "out")
    assert "cannot be made" in run(checkpoint, tmp_path, tmp_path / "manifest.jsonl")
    spoken = utterance(1, "a dog").model_copy(update={"text": None})
    write_manifest(tmp_path / "manifest.jsonl", [utterance(0, "a dog", "dev"), spoken])
    assert "with words or labels are transcribe" in run(checkpoint, tmp_path, tmp_path / "out")
    assert read_settings(checkpoint).confidence_temperature == 20
