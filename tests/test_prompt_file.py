"""Prompt files: what people write is read as they mean it, or told what is wrong, and where."""

from pathlib import Path

import pytest
from conftest import clip, table
from hypothesis import given
from hypothesis import strategies as st

from speechllm.errors import InputError
from speechllm.prompt_file import find_prompt_file, prompt_files, prompts_folder, read_prompt_file
from speechllm.tasks import Speaker, Time, shown
from speechllm.tasks.answer import parts_of


def test_what_is_written_is_text(tmp_path: Path) -> None:
    path = table(
        tmp_path / "prompts" / "angry.yaml",
        "description: yes",
        "instruction: Is the speaker  angry?",
        "labels: [yes, no, 42]",
        "shots:",
        "  - {audio: clips/a.wav, answer: yes}",
        "  - audio: b.wav",
        "    answer: >",
        "      42",
        "",
    )
    prompt = read_prompt_file(path)
    assert prompt.instruction == "Is the speaker angry?"
    assert prompt.labels == ("yes", "no", "42"), "not True, False and a number"
    assert prompt.shots == ((path.parent / "clips" / "a.wav", "yes"), (path.parent / "b.wav", "42"))
    assert (prompt.path, prompt.description, prompt.task, prompt.lines) == (path, "yes", None, (5, 6))


def test_an_instruction_is_enough(tmp_path: Path) -> None:
    prompt = read_prompt_file(table(tmp_path / "p.yaml", "instruction: Transcribe this audio", "task: transcribe"))
    assert (prompt.labels, prompt.shots, prompt.task) == ((), (), "transcribe")


@pytest.mark.parametrize(
    ("lines", "line", "told"),
    [
        ([], 1, "instruction: Field required"),
        (["labels: [a]"], 1, "instruction: Field required"),
        (["instruction: x", "", "shot: []"], 3, "shot: Extra inputs are not permitted"),
        (["instruction: ' '"], 1, "instruction: String should have at least 1 character"),
        (["instruction: x", "shots: [{audio: a.wav}]"], 2, r"shots\.0\.answer: Field required"),
        (["instruction: x", "shots:", "- {audio: a, answer: b}", "- audio: a"], 4, r"shots\.1\.answer: Field required"),
        (["instruction: x", "shots:", "- audio: a", "  answer: [b]"], 4, r"shots\.0\.answer: Input should be a valid"),
        (["instruction: x", "shots:", "- audio: a", "  anwser: b"], 4, r"shots\.0\.anwser: Extra inputs are not"),
        (["instruction: x", "description: |", "  a", "  b"], 2, "description: must be one line"),
        (["instruction: x", "labels: [a,", "  b, a]"], 3, r"labels\.2: is there already"),
        (["instruction: x", "labels: ['']"], 2, r"labels\.0: is empty"),
        (["labels: [a, b]", "instruction: x", "shots:", "- audio: a", "  answer: c"], 5, r"'c' is none of the labels"),
        (["instruction: x", "task: sing"], 2, "task: there is no task 'sing'; there are transcribe, "),
        (["instruction: x", "labels: [a]", "task: intent"], 3, "leave one of them out"),
        (["instruction: x", "labels: [a]", "instruction: y"], 3, "instruction: is there already"),
        (["instruction: x", "shots:", "- audio: a", "  audio: b"], 4, "audio: is there already"),
        (["instruction: x", "task: [x"], 3, "not YAML"),
        (["instruction: x", "labels: [*a]"], 2, "not YAML"),
        (["instruction: x", "description: \x07"], 2, "not YAML"),
        (["- x"], 1, "not a prompt file"),
        (["just words"], 1, "not a prompt file"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, lines: list[str], line: int, told: str) -> None:
    path = table(tmp_path / "p.yaml", *lines)
    with pytest.raises(InputError, match=told) as caught:
        read_prompt_file(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ") and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: cannot read the prompt file \(No such file"):
        read_prompt_file(tmp_path / "none.yaml")
    (tmp_path / "p.yaml").write_bytes(b"instruction: \xff")
    with pytest.raises(InputError, match=r"p\.yaml: not a prompt file: not UTF-8"):
        read_prompt_file(tmp_path / "p.yaml")
    with pytest.raises(InputError, match=r"p\.yaml: not a prompt file: there are lists in lists"):
        read_prompt_file(table(tmp_path / "p.yaml", "shots: " + "[" * 5000))


def test_clips_that_are_not_there(tmp_path: Path) -> None:
    clip(tmp_path / "a.wav")
    shots = ("- {audio: a.wav, answer: a}", "- {audio: b.wav, answer: b}")
    prompt = read_prompt_file(table(tmp_path / "p.yaml", "instruction: x", "shots:", *shots))
    with pytest.raises(InputError, match=r"p\.yaml, line 4: shots\.1: .*b\.wav: no such file"):
        prompt.check_clips()
    clip(tmp_path / "b.wav")
    prompt.check_clips()


def test_files_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_prompt_file("emotion") == prompts_folder() / "emotion.yaml"
    for name in ("nonsense", "clips", "n" * 300):
        with pytest.raises(InputError, match=f"{name}: no such prompt file.* speechllm prompts list"):
            find_prompt_file(name)
    assert find_prompt_file("none.yaml") == Path("none.yaml")
    table(Path("emotion"), "instruction: mine")
    assert find_prompt_file("emotion") == Path("emotion"), "a file comes first"
    with pytest.raises(InputError, match="holds no prompt files"):
        prompt_files(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        prompt_files(tmp_path / "none")


WORDS = st.text(st.sampled_from("aZ9é<>|.,'‘ \n中"), min_size=1).map(lambda text: " ".join(text.split()))
TEXTS = WORDS.filter(lambda text: text and "<|" not in text and "|>" not in text)
MARKS = st.one_of(st.builds(Speaker, st.integers(1, 99)), st.integers(0, 10**6).map(lambda n: Time(n / 100)))


@given(st.lists(st.tuples(MARKS, st.none() | TEXTS)), st.none() | TEXTS)
def test_marks_are_read_as_they_are_shown(pairs: list[tuple[Time | Speaker, str | None]], first: str | None) -> None:
    parts = tuple(part for part in (first, *(one for pair in pairs for one in pair)) if part is not None)
    assert parts_of(shown(parts)) == parts
    assert parts_of(shown(parts).replace("|> <|", "|><|").replace(" ", " \n ")) == parts


@pytest.mark.parametrize(
    "text", ["<|spk0|>", "<|spk|>", "<|-1.00|>", "<|1.|>", "<|0.3", "a <|b|> c", "<| 1.00 |>", "0.32|>", "<|٣|>"]
)
def test_what_is_nearly_a_mark_is_told(text: str) -> None:
    with pytest.raises(InputError, match="is no mark: write") as caught:
        parts_of(f"<|spk1|><|0.00|> Hello {text} <|1.00|>")
    assert "\n" not in str(caught.value)
