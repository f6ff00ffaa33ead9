"""Scores come from the command line's own answers."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from speechllm.audio import write_audio
from speechllm.data.corpus import Item
from speechllm.data.manifest import Utterance, write_manifest
from speechllm.tasks import TASKS
from train import evaluate


def utterance(number: int, text: str, speaker: str) -> Utterance:
    return Utterance(
        id=f"u{number}",
        audio=f"{number}.wav",
        duration=0.5,
        text=text,
        language="en",
        speaker=speaker,
        translations={"de": "ein Hund"},
        split="test",
        source="made",
    )


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        write_audio(tmp_path / f"{number}.wav", 0.1 * torch.randn(1, 8000, generator=generator), 16000)
    path = tmp_path / "manifest.jsonl"
    write_manifest(path, [utterance(0, "a dog", "ann"), utterance(1, "a cat", "ann"), utterance(2, "two cows", "bob")])
    return path


def test_results_are_hand_computed(manifest: Path) -> None:
    task = TASKS["transcribe"]
    items = evaluate.read_corpus([manifest], "test")
    questions = evaluate.pose(items, task)
    said = [task.read((text,) if text else ()) for text in ("a dog", "a hat", "")]
    (result,) = evaluate.results_of("made", task, None, questions, said)
    assert result.value == pytest.approx(100 * 3 / 6)  # one substitution and two deletions in six words
    assert result.low is not None
    assert result.high is not None
    assert result.low <= result.value <= result.high
    german = TASKS["translate_de"]
    questions = evaluate.pose(items, german)
    (exact,) = evaluate.results_of("made", german, None, questions, [german.read(("ein Hund",))] * 3)
    assert exact.metric == "BLEU"
    assert exact.low is None


def test_what_may_be_answered_with_no_is_asked_of_clips_that_have_an_answer() -> None:
    items = [
        Item(utterance(n, "a dog", "ann").model_copy(update={"labels": labels}), Path())
        for n, labels in enumerate([{"emotion": "anger"}, {"emotion": "fear"}] * 15 + [{}] * 300)
    ]
    questions = evaluate.pose(items, TASKS["is_emotion"])
    assert len(questions) == 30
    assert 8 < sum(q.answer == ("no",) for q in questions) < 22


def test_whole_command(manifest: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    app = evaluate.typer.Typer()
    app.command()(evaluate.main)
    out = tmp_path / "results"
    arguments = [str(manifest), "--task", "transcribe", "--model", str(tiny_checkpoint), "--out", str(out)]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    results = json.loads((out / "results.json").read_text())
    assert [(r["speaker"], r["clips"]) for r in results] == [(None, 3), ("ann", 2), ("bob", 1)]
    assert (out / "results.png").stat().st_size > 1000
    assert "ann" in (out / "results.md").read_text()


def test_a_missing_clip_is_an_error(manifest: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (manifest.parent / "1.wav").unlink()
    app = evaluate.typer.Typer()
    app.command()(evaluate.main)
    done = CliRunner().invoke(app, [str(manifest), "--model", str(tiny_checkpoint), "--out", str(tmp_path / "r")])
    assert done.exit_code == 2
    assert "1.wav: no such file" in done.output
