"""Prompt files: what people write is read as they mean it, or told what is wrong."""

from pathlib import Path

import pytest
from conftest import table

from speechllm.errors import InputError
from speechllm.prompt_file import read_prompt_file


def test_what_is_written_is_text(tmp_path: Path) -> None:
    path = table(
        tmp_path / "prompts" / "angry.yaml",
        "instruction: Is the speaker angry?",
        "labels: [yes, no, 42]",
        "shots:",
        "  - {audio: clips/a.wav, answer: yes}",
        "  - {audio: b.wav, answer: 42}",
    )
    prompt = read_prompt_file(path)
    assert prompt.instruction == "Is the speaker angry?"
    assert prompt.labels == ("yes", "no", "42"), "not True, False and a number"
    assert prompt.shots == ((path.parent / "clips" / "a.wav", "yes"), (path.parent / "b.wav", "42"))


def test_an_instruction_is_enough(tmp_path: Path) -> None:
    prompt = read_prompt_file(table(tmp_path / "p.yaml", "instruction: Transcribe this audio"))
    assert (prompt.labels, prompt.shots) == ((), ())


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], "instruction: Field required"),
        (["labels: [a]"], "instruction: Field required"),
        (["instruction: x", "shot: []"], "shot: Extra inputs are not permitted"),
        (["instruction: x", "shots: [{audio: a.wav}]"], r"shots\.0\.answer: Field required"),
        (["instruction: [x"], "not YAML"),
        (["- x"], "not a prompt file"),
    ],
)
def test_mistakes_are_named_with_their_file(tmp_path: Path, lines: list[str], told: str) -> None:
    path = table(tmp_path / "p.yaml", *lines)
    with pytest.raises(InputError, match=told) as caught:
        read_prompt_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: cannot read the prompt file \(No such file"):
        read_prompt_file(tmp_path / "none.yaml")
