"""The command line: standard output holds answers alone, every error is one line, and the exit code tells."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner, Result

from serve.cli import app
from speechllm import __version__

ROOT = Path(__file__).resolve().parent.parent
RATE = 16000
ASK = "Transcribe this audio"


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE)).astype(np.float32)


@pytest.fixture
def good(tmp_path: Path) -> list[str]:
    files = [tmp_path / "one.wav", tmp_path / "two.flac"]
    for seed, file in enumerate(files):
        soundfile.write(file, noise(1.0 + seed, seed), RATE)
    return [str(file) for file in files]


@pytest.fixture
def silent(tmp_path: Path) -> str:
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE), RATE)
    return str(tmp_path / "silent.wav")


@pytest.fixture
def bad(tmp_path: Path) -> dict[str, str]:
    """Files that cannot be answered, and what must be said about each."""
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("This is no audio at all.\n" * 20)
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), RATE)
    with_nan = noise(1.0)
    with_nan[8000] = np.nan
    soundfile.write(tmp_path / "nan.wav", with_nan, RATE, subtype="FLOAT")
    said = {
        "empty.wav": "the file is empty",
        "text.wav": "not audio",
        "nothing.wav": "0 samples",
        "nan.wav": "NaN or infinite samples, the first at 0.500 s",
        "missing.wav": "no such file",
        "new\nline.wav": "no such file",
    }
    return {str(tmp_path / name): words for name, words in said.items()}


def run(*arguments: str, stdin: bytes | None = None) -> Result:
    result = CliRunner().invoke(app, list(arguments), input=stdin)
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def ask(folder: Path, *arguments: str, stdin: bytes | None = None) -> Result:
    return run("ask", "--model", str(folder), "--device", "cpu", *arguments, stdin=stdin)


def test_text_is_one_line_per_file(tiny_checkpoint: Path, good: list[str]) -> None:
    result = ask(tiny_checkpoint, ASK, *good)
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 2
    warned = result.stderr.splitlines()  # random weights never stop: said, once a file
    assert [line.startswith(f"warning: {file}: the answer was cut") for file, line in zip(good, warned, strict=True)]


def test_json_is_the_contract_in_order(tiny_checkpoint: Path, good: list[str], silent: str) -> None:
    files = [good[1], silent, good[0]]
    result = ask(tiny_checkpoint, ASK, *files, "--format", "json", "--batch", "2")
    assert result.exit_code == 0
    assert result.stderr == ""
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["file"] for answer in answers] == files
    assert [answer["seconds_in"] for answer in answers] == [2.0, 1.0, 1.0]
    assert [answer["seconds_consumed"] for answer in answers] == [2.0, 1.0, 1.0]
    assert [answer["finish_reason"] for answer in answers] == ["length", "no_speech", "length"]
    for answer in answers:
        assert list(answer) == [
            "file", "instruction", "task", "text", "segments", "words", "label", "slots", "confidence", "seconds_in",
            "seconds_consumed", "finish_reason", "model", "tokens_in", "tokens_out", "timings",
        ]  # fmt: skip
        assert answer["instruction"] == ASK
        assert 0 <= answer["confidence"] <= 1
        assert list(answer["timings"]) == ["read", "encode", "queue", "first", "generate"]


def test_both_formats_give_the_same_text(tiny_checkpoint: Path, good: list[str]) -> None:
    lines = ask(tiny_checkpoint, ASK, *good).stdout.splitlines()
    answers = [json.loads(line) for line in ask(tiny_checkpoint, ASK, *good, "-f", "json").stdout.splitlines()]
    assert lines == [" ".join(answer["text"].split()) for answer in answers]
    assert any(lines)


def test_silence_is_no_error(tiny_checkpoint: Path, silent: str) -> None:
    result = ask(tiny_checkpoint, ASK, silent)
    assert result.exit_code == 0
    assert result.stdout == "\n"
    assert result.stderr == f"note: {silent}: no speech\n"


@pytest.mark.parametrize("format", ["text", "json"])
def test_bad_files_are_named_and_the_others_answered(
    tiny_checkpoint: Path, good: list[str], silent: str, bad: dict[str, str], format: str
) -> None:
    files = [good[0], *bad, silent, good[1]]
    result = ask(tiny_checkpoint, ASK, *files, "--format", format)
    assert result.exit_code == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(bad)
    for (file, words), line in zip(bad.items(), errors, strict=True):
        assert file.replace("\n", " ") in line
        assert words in line
    if format == "text":
        assert len(result.stdout.splitlines()) == 3
        return
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["file"] for answer in answers] == files
    for answer in answers:
        if answer["file"] in bad:
            assert list(answer) == ["file", "error"]
            assert bad[answer["file"]] in answer["error"]
        else:
            assert answer["finish_reason"] in ("length", "no_speech")


def test_every_bad_file_fails_alone_too(tiny_checkpoint: Path, bad: dict[str, str]) -> None:
    for file, words in bad.items():
        result = ask(tiny_checkpoint, ASK, file)
        assert (result.exit_code, result.stdout) == (2, "")
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_standard_input(tiny_checkpoint: Path, good: list[str]) -> None:
    result = ask(tiny_checkpoint, ASK, "-", "-f", "json", stdin=Path(good[1]).read_bytes())
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    named = json.loads(ask(tiny_checkpoint, ASK, good[1], "-f", "json").stdout)
    assert (answer["file"], answer["seconds_in"]) == ("-", 2.0)
    assert answer["text"] == named["text"]
    nothing = ask(tiny_checkpoint, ASK, "-", stdin=b"")
    assert nothing.exit_code == 2
    assert nothing.stderr == "error: standard input: no audio, the input is empty (0 bytes)\n"


def damaged(folder: Path, tmp_path: Path, name: str, keep: float) -> Path:
    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    (file,) = copy.glob(name)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    return copy


@pytest.mark.parametrize(
    "name", ["lm/*.safetensors", "codec/*.safetensors", "lm/config.json", "codec/config.json", "text.model", "*.json"]
)
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_damaged_checkpoints(tiny_checkpoint: Path, tmp_path: Path, good: list[str], name: str, keep: float) -> None:
    folder = damaged(tiny_checkpoint, tmp_path, name, keep)
    for result in (ask(folder, ASK, *good), run("info", "--model", str(folder))):
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("error: ")
        assert str(folder) in result.stderr
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["nowhere", "a file", "."])
def test_unknown_checkpoints(tmp_path: Path, good: list[str], name: str) -> None:
    (tmp_path / "a file").write_text("no folder")
    result = ask(tmp_path / name, ASK, *good)
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert "not a checkpoint folder" in result.stderr


def test_instructions_that_cannot_be_used(tiny_checkpoint: Path, good: list[str]) -> None:
    for instruction, words in (("  ", "instruction is empty"), ("word " * 600, "a shorter instruction")):
        result = ask(tiny_checkpoint, instruction, *good)
        assert (result.exit_code, result.stdout) == (2, "")
        *notes, error = result.stderr.splitlines()
        assert words in error
        assert all("is no wording that a task is known by" in note for note in notes) and len(notes) < 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("ask", ASK),
        ("ask", ASK, "a.wav", "--format", "yaml"),
        ("ask", ASK, "a.wav", "--batch", "0"),
        ("ask", ASK, "a.wav", "--nonsense"),
        ("serve", "--api-key", ""),
        ("serve", "--name", "a", "--name", " "),
        ("nonsense",),
    ],
)
def test_bad_usage(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")


def test_a_task_it_was_not_trained_on_is_told(tiny_checkpoint: Path, good: list[str]) -> None:
    result = ask(tiny_checkpoint, "Translate this audio to French", good[0])
    assert result.exit_code == 0
    assert "warning: this checkpoint was not trained on the task translate_fr; it knows transcribe" in result.stderr
    for instruction in (ASK, "Hum along."):
        assert "not trained" not in ask(tiny_checkpoint, instruction, good[0]).stderr


def test_info_says_what_the_checkpoint_is(tiny_checkpoint: Path) -> None:
    result = run("info", "--model", str(tiny_checkpoint))
    assert (result.exit_code, result.stderr) == (0, "")
    for words in ("tiny random", "mixtral, 2 layers", "16000 Hz, 25 frames a second", "8 s", "task transcribe"):
        assert words in result.stdout


def test_what_is_no_checkpoint_is_told_before_torch_is_loaded(tmp_path: Path, good: list[str]) -> None:
    code = """
import sys
from serve.cli import app
try:
    app(sys.argv[1:])
except SystemExit as stop:
    print(stop.code, "torch" in sys.modules)
"""
    command = [sys.executable, "-c", code, "ask", ASK, *good, "--model", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "2 False\n", result.stderr


def test_help_and_version_load_no_library() -> None:
    assert run("--version").stdout == f"speechllm {__version__}\n"
    assert 'speechllm ask "Transcribe this audio"' in run("--help").stdout
    assert "- is standard input" in " ".join(run("ask", "--help").stdout.split())
    code = "import sys, serve.cli; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_real_process_says_nothing_more(tiny_checkpoint: Path, good: list[str], bad: dict[str, str]) -> None:
    missing = list(bad)[-2]
    command = [sys.executable, "-c", "from serve.cli import main; main()", "ask", "--model", str(tiny_checkpoint)]
    files = [good[0], missing, good[1]]
    done = subprocess.run([*command, ASK, *files, "-f", "json"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert [json.loads(line)["file"] for line in done.stdout.splitlines()] == files
    assert done.stderr == f"error: {missing}: no such file\n"


COMMAND = """
import sys, time, typer
from serve.plain_errors import plain_errors

def command() -> None:
    with plain_errors():
        for _ in range(1000):
            print("an answer", flush=True)
            time.sleep(0.05)

typer.run(command)
"""


def test_a_reader_that_leaves_early_is_no_error() -> None:
    with subprocess.Popen([sys.executable, "-c", COMMAND], cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True) as running:
        assert running.stdout is not None and running.stderr is not None
        assert running.stdout.readline() == "an answer\n"
        running.stdout.close()
        assert (running.wait(30), running.stderr.read()) == (141, "")


def test_ctrl_c_ends_quietly() -> None:
    with subprocess.Popen([sys.executable, "-c", COMMAND], cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True) as running:
        assert running.stdout is not None and running.stderr is not None
        assert running.stdout.readline() == "an answer\n"
        running.send_signal(signal.SIGINT)
        assert (running.wait(30), running.stderr.read()) == (130, "")
