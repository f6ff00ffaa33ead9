"""What is said about a corpus: numbers counted by hand, and sequences that show what their ids hold."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import TEXT_MODEL
from typer import Typer
from typer.testing import CliRunner

from speechllm.data.manifest import Utterance, read_manifest, write_manifest
from speechllm.prompt import Example, Rendered, render
from speechllm.tasks import TASKS, Speaker, Time
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train import inspect_data

TEXT = TextTokenizer.load(TEXT_MODEL)


def test_a_sequence_shows_its_ids() -> None:
    vocabulary = Vocabulary(TEXT.size, n_q=2, card=16)
    codes = torch.tensor([[1, 2, 3], [4, 5, 6]])
    sequence = render(Example(codes, "Say it", 'He said "<end>"'), vocabulary, TEXT)
    assert inspect_data.readable(sequence, vocabulary, TEXT) == (
        "<audio_begin> <code 1> <code 4> <code 2> … (6 codes) <audio_end> "
        '"Say it" <answer> ⟦"He said \\"<end>\\"" <end>⟧'
    )
    short = render(Example(codes[:, :1], "Say it"), vocabulary, TEXT)
    assert inspect_data.readable(short, vocabulary, TEXT) == (
        '<audio_begin> <code 1> <code 4> (2 codes) <audio_end> "Say it" <answer>'
    )
    timed = replace(vocabulary, times=10)
    marks = render(Example(codes[:, :1], "Who?", (Speaker(2), Time(0.12), "Yes.", Time(0.2))), timed, TEXT)
    assert inspect_data.readable(marks, timed, TEXT).endswith('⟦<speaker 2> <0.12> "Yes." <0.20> <end>⟧')
    spare = torch.tensor([vocabulary.text_size + 31, vocabulary.pad])
    odd = Rendered(spare, torch.zeros(2, dtype=torch.bool), 2)
    assert inspect_data.readable(odd, vocabulary, TEXT) == "<control 31> <pad>"


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Three utterances of 1, 2 and 3 s: one translated to German, one without words known."""
    utterances = []
    for seconds, text, split, speaker in ((1, "One.", "train", "ann"), (2, "Two dogs run.", "train", "bob"), (3, None, "dev", None)):  # fmt: skip  # noqa: E501
        soundfile.write(tmp_path / f"{seconds}.wav", np.random.default_rng(0).normal(0, 0.1, seconds * 16000), 16000)
        utterances.append(
            Utterance(
                id=f"u{seconds}",
                audio=f"{seconds}.wav",
                duration=seconds,
                text=text,
                language="en",
                speaker=speaker,
                split=split,
                source="made",
                translations={"de": "Zwei Hunde rennen."} if seconds == 2 else {},
            )
        )
    write_manifest(tmp_path / "manifest.jsonl", utterances)
    return tmp_path / "manifest.jsonl"


def run(*arguments: object) -> tuple[int, str]:
    app = Typer()
    app.command()(inspect_data.main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_numbers(manifest: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tools = ("--text-model", TEXT_MODEL, "--codec", tiny_checkpoint / "codec")
    code, output = run(manifest, *tools, "--out", out, "--examples", 7)
    assert code == 0, output
    report = json.loads((out / "inspect.json").read_text())
    assert (report["utterances"], report["hours"]) == (3, pytest.approx(6 / 3600, abs=1e-6))
    assert report["durations"] == {"min": 1, "median": 2, "mean": 2, "max": 3, "sum": 6}
    counts = {column: {k: v["utterances"] for k, v in table.items()} for column, table in report["by"].items()}
    assert counts == {
        "split": {"train": 2, "dev": 1},
        "language": {"en": 3},
        "speaker": {"ann": 1, "bob": 1, "(unknown)": 1},
        "source": {"made": 3},
    }
    tasks = {name: of["utterances"] for name, of in report["tasks"].items()}
    assert tasks.keys() == TASKS.keys()
    assert (tasks["transcribe"], tasks["translate_de"], tasks["translate_fr"]) == (2, 1, 0)
    assert [tasks[name] for name in ("language", "spoken_word", "next_text", "translate_text_de")] == [3, 2, 1, 1]
    assert sum(tasks.values()) == 10
    expected = []
    for utterance in read_manifest(manifest):
        for task, (asked, (said,)) in inspect_data.questions(utterance).items():
            frames = 25 * utterance.duration if task.listens else 0
            expected.append(4 + frames + len(TEXT.encode(asked)) + len(TEXT.encode(said)))
    ids = report["sequence_ids"]
    assert (ids["min"], ids["max"], ids["sum"]) == (min(expected), max(expected), sum(expected))
    examples = {example["task"]: example["sequence"] for example in report["examples"]}
    assert examples.keys() == {name for name, found in tasks.items() if found}
    for example in report["examples"]:
        assert example["ids"] in expected
        assert example["sequence"] in output
        assert example["sequence"] in (out / "inspect.md").read_text()
    assert '<answer> ⟦"Zwei Hunde rennen." <end>⟧' in examples["translate_de"]
    assert "(50 codes)" in examples["translate_de"]
    assert examples["translate_text_de"].startswith('<audio_begin> <audio_end> "Translate to German: Two dogs run."')
    shown = {line.split()[1] for line in output.splitlines() if line.startswith("│")}
    assert TASKS.keys() <= shown, "also those that nothing answers"
    assert all(f"| {name} |" in (out / "inspect.md").read_text() for name in TASKS)
    assert "3 utterances, 6.0 s" in output and "| en | 3 | 6.0 s |" in (out / "inspect.md").read_text()
    assert all((out / f"{name}.png").stat().st_size > 1000 for name in ("durations", "sequences", "tasks"))

    code, of_folder = run(manifest.parent, *tools, "--examples", 7)
    assert (code, of_folder) == (0, output)
    before = sorted(tmp_path.iterdir())
    code, again = run(manifest, *tools, "--examples", 0)
    assert code == 0, again
    assert "<answer>" not in again
    assert sorted(tmp_path.iterdir()) == before


def test_a_text_alone_is_shown_without_audio(manifest: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    written = Utterance(id="t", text="Yes.", language="en", translations={"de": "Ja."}, split="train", source="made")
    write_manifest(manifest, [*read_manifest(manifest), written])
    tools = ("--text-model", TEXT_MODEL, "--codec", tiny_checkpoint / "codec")
    code, output = run(manifest, *tools, "--out", tmp_path / "out", "--examples", 30)
    assert code == 0, output
    report = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert report["utterances"] == 4 and report["durations"]["min"] == 1
    shown = [example["sequence"] for example in report["examples"] if example["id"] == "t"]
    assert any(sequence.startswith('<audio_begin> <audio_end> "Translate to German: Yes."') for sequence in shown)


def test_bad_input(manifest: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((tmp_path / "none.jsonl",), "no such manifest"),
        ((manifest, "--text-model", tmp_path / "none.model"), "cannot read the text model"),
        ((manifest, "--text-model", TEXT_MODEL, "--codec", tmp_path / "none"), "none"),
    ):
        code, output = run(*arguments)
        assert code == 2, output
        assert message in output
        assert len(output.splitlines()) == 1
