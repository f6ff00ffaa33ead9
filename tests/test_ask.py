"""`speechllm ask`: several questions, formats and folders, examples, streaming, and what does not go together."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import clip, table
from test_cli import ask

from serve.answer import Answer, Failure
from serve.answerer import Answerer
from serve.ask import BEAMS
from serve.formats import Format
from serve.inputs import NO_AUDIO
from serve.printing import Printer
from speechllm.checkpoint import load_checkpoint
from speechllm.options import Options

ASK, OTHER = "Transcribe this audio", "Translate this audio to German"


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """In natural order."""
    return [str(clip(tmp_path / "in" / name, seconds)) for name, seconds in (("2.wav", 0.5), ("10.wav", 0.9))]


def answers(folder: Path, files: list[str], instructions: list[str], beams: int) -> list[Answer]:
    found = Answerer(load_checkpoint(folder)).ask(files, instructions, options=Options(beams=beams))
    return [answer for answer in found if isinstance(answer, Answer)]


def line(answer: Answer) -> str:
    return " ".join(answer.text.split())


def test_the_command_says_what_the_answerer_does(tiny_checkpoint: Path, files: list[str]) -> None:
    """Of a folder, several questions, and word by word."""
    folder, expected = str(Path(files[0]).parent), answers(tiny_checkpoint, files, [ASK, OTHER], BEAMS)
    assert len(expected) == 4 and any(map(line, expected))
    assert ask(tiny_checkpoint, ASK, folder, "--also", OTHER).stdout.splitlines() == [*map(line, expected)]
    streamed = ask(tiny_checkpoint, ASK, *files, "--also", OTHER, "--stream").stdout.splitlines()
    assert streamed == [*map(line, answers(tiny_checkpoint, files, [ASK, OTHER], 1))]


@pytest.mark.parametrize(
    ("options", "beams"),
    [
        ((), BEAMS),
        (("--batch", "2"), 2),
        (("--beams", "1"), 1),
        (("--beams", "3"), 3),
        (("--temperature", "1e-9"), 1),
        (("--temperature", "1e-9", "--top-p", "0.5"), 1),
    ],
)
def test_hypotheses(tiny_checkpoint: Path, files: list[str], options: tuple[str, ...], beams: int) -> None:
    """That there were several shows in how sure the best one is."""
    single, expected = (
        [answer.confidence for answer in answers(tiny_checkpoint, files, [ASK], width)] for width in (1, beams)
    )
    assert (single == expected) == (beams == 1)
    told = ask(tiny_checkpoint, ASK, *files, "-f", "json", *options).stdout.splitlines()
    assert [json.loads(answer)["confidence"] for answer in told] == pytest.approx(expected, abs=1e-4)


def test_a_file_for_each_recording(tiny_checkpoint: Path, tmp_path: Path, files: list[str]) -> None:
    out = tmp_path / "out"
    result = ask(tiny_checkpoint, ASK, *files, "missing.wav", "--also", OTHER, "-f", "json", "-o", str(out))
    assert (result.exit_code, result.stdout) == (2, "")
    assert sorted(path.name for path in out.iterdir()) == ["10.json", "2.json"]
    for file, path in zip(files, (out / "2.json", out / "10.json"), strict=True):
        answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert [(answer["file"], answer["instruction"]) for answer in answers] == [(file, ASK), (file, OTHER)]


def test_a_file_that_failed_once_takes_no_answer_from_another(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["a.wav", "b.wav", "c.wav"]
    (answer,) = answers(tiny_checkpoint, [NO_AUDIO], [ASK], 1)
    printer = Printer(Format.text, files, 2, tmp_path, silent=False)
    printer.take(Failure("a.wav", "a.wav: gone"))
    for text in ("A2", "B1", "B2", "C1", "C2"):
        printer.take(replace(answer, file=f"{text[0].lower()}.wav", text=text))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"b.txt": "B1\nB2\n", "c.txt": "C1\nC2\n"}
    assert capsys.readouterr().out == ""


def test_examples_and_labels(tiny_checkpoint: Path, tmp_path: Path, files: list[str]) -> None:
    shot, file = files
    prompt = table(
        tmp_path / "in" / "prompt.yaml",
        "instruction: Is it?",
        "labels: [yes, no]",
        "shots: [{audio: 2.wav, answer: yes}]",
    )
    given = ("--shot", f"{shot}=yes", "--label", "yes", "--label", "no")
    by_hand = json.loads(ask(tiny_checkpoint, "Is it?", file, *given, "-f", "json").stdout)
    by_file = json.loads(ask(tiny_checkpoint, "Is it?", file, "--shots", str(prompt), "-f", "json").stdout)
    alone = json.loads(ask(tiny_checkpoint, "Is it?", file, "-f", "json").stdout)
    assert by_hand["label"] in ("yes", "no")
    for answer in (by_hand, by_file, alone):
        del answer["timings"]
    assert by_hand == by_file
    assert by_hand["tokens_in"] > alone["tokens_in"] + 10


def test_what_is_withheld_is_asked_elsewhere(tiny_checkpoint: Path, tmp_path: Path, files: list[str]) -> None:
    options = ("--min-confidence", "0.9")
    withheld = ask(tiny_checkpoint, ASK, *files, *options)
    assert withheld.exit_code == 0 and withheld.stdout == "\n\n"
    assert withheld.stderr.count("withheld, its confidence is") == 2
    assert ask(tiny_checkpoint, ASK, *files, *options, "--fallback", str(tiny_checkpoint)).stdout == "\n\n", (
        "unsure too"
    )
    sure = tmp_path / "sure"
    shutil.copytree(tiny_checkpoint, sure)
    settings = json.loads((sure / "speechllm.json").read_text(encoding="utf-8"))
    (sure / "speechllm.json").write_text(json.dumps(settings | {"confidence_temperature": 1e6}), encoding="utf-8")
    again = ask(tiny_checkpoint, ASK, *files, *options, "--fallback", str(sure))
    assert again.stdout.splitlines() == [*map(line, answers(tiny_checkpoint, files, [ASK], BEAMS))]


def test_an_instruction_that_is_no_known_wording_is_told(tiny_checkpoint: Path, files: list[str]) -> None:
    told = "'Was wird gesagt?' is no wording that a task is known by"
    assert told in ask(tiny_checkpoint, "Was wird gesagt?", *files).stderr
    for given in (("--label", "a"), ("--shot", f"{files[0]}=a")):
        assert told not in ask(tiny_checkpoint, "Was wird gesagt?", *files, *given).stderr
    assert "no wording" not in ask(tiny_checkpoint, ASK, *files).stderr


def test_a_task_that_is_named_decides_what_answers_are(tiny_checkpoint: Path, files: list[str]) -> None:
    named = ask(
        tiny_checkpoint, "Was ist los?", files[1], "--task", "gender", "--shot", f"{files[0]}=male", "-f", "json"
    )
    assert named.stderr == ""
    answer = json.loads(named.stdout)
    assert (answer["task"], answer["label"]) in (("gender", "male"), ("gender", "female"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--stream", "-f", "json"], "not as json"),
        (["--stream", "-o", "out"], "leave --output-dir out"),
        (["--stream", "--min-confidence", "0.5"], "leave --beams, --min-confidence, --fallback out"),
        (["--also", OTHER, "-f", "srt"], "room for one answer"),
        (["--also", OTHER, "--label", "a"], "are for one question"),
        (["--also", OTHER, "--task", "turns"], "are for one question"),
        (["--label", "a", "--task", "turns"], "give one of them"),
        (["--task", "sing"], "task must be one of transcribe, "),
        (["--microphone"], "leave one of them out"),
        (["--beams", "2", "--temperature", "1"], "give one of them"),
        (["--temperature", "-1"], "temperature must be from 0 to 2"),
        (["--label", "a", "--label", " a"], "labels must be names, each once"),
        (["--fallback", "x", "--shot", "a.wav=b"], "examples are encoded for one checkpoint"),
        (["--fallback", "x"], "--fallback: it answers what is withheld, and nothing is without --min-confidence"),
        (["--top-p", "0.9"], "--top-p: nothing is drawn without --temperature"),
        (["--shots", "none.yaml"], "cannot read the prompt file"),
    ],
)
def test_contradictions_are_one_line(tiny_checkpoint: Path, files: list[str], options: list[str], told: str) -> None:
    result = ask(tiny_checkpoint, ASK, *files, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert told in result.stderr and len(result.stderr.splitlines()) == 1


def test_nothing_to_listen_to(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert ask(tiny_checkpoint, ASK).stderr.startswith("error: no audio: name files or folders")
    assert "--fallback: standard input" in ask(tiny_checkpoint, ASK, "-", "--fallback", "x").stderr
    (tmp_path / "file").touch()
    result = ask(tiny_checkpoint, ASK, "a.wav", "-o", str(tmp_path / "file"))
    assert "is not a folder" in result.stderr
