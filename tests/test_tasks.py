"""Tasks: wordings, answers, and finding a task from what a user types."""

import pytest

from speechllm.tasks import TASKS, ParsedAnswer, Task, find_task, normalize_instruction

EVERY = [(task, wording) for task in TASKS.values() for wording in task.wordings + task.held_out]


def test_the_tasks() -> None:
    assert {name: (task.target, task.metric) for name, task in TASKS.items()} == {
        "transcribe": (None, "wer"),
        "translate_de": ("de", "bleu"),
        "translate_fr": ("fr", "bleu"),
    }


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_wordings_are_enough_distinct_and_disjoint(task: Task) -> None:
    assert len(task.wordings) == len(set(task.wordings)) >= 20
    assert len(task.held_out) == len(set(task.held_out)) >= 5

    def bare(wordings: tuple[str, ...]) -> set[str]:
        return {wording.lower().rstrip(".?") for wording in wordings}

    assert len(bare(task.wordings)) >= 20
    assert not bare(task.wordings) & bare(task.held_out)
    assert all(normalize_instruction(wording) == wording for wording in task.wordings + task.held_out)
    assert all("{" not in wording for wording in task.wordings + task.held_out)


def test_what_users_type_is_trained() -> None:
    assert {"Transcribe this audio", "Transcribe this audio.", "transcribe this audio"} <= set(
        TASKS["transcribe"].wordings
    )
    for name, language in (("translate_de", "German"), ("translate_fr", "French")):
        wordings = set(TASKS[name].wordings)
        assert {f"Translate this audio to {language}", f"Translate this audio into {language}."} <= wordings
        assert any(f"in {language}" in wording for wording in wordings)


@pytest.mark.parametrize(("task", "wording"), EVERY)
def test_every_wording_finds_its_task_only(task: Task, wording: str) -> None:
    assert find_task(wording) is task
    assert find_task(f"\n  {wording.upper()} ?! ") is task
    assert find_task(wording.rstrip(".?").replace(" ", "  ")) is task


@pytest.mark.parametrize("text", ["", " . ", "Translate this audio", "Translate this audio to Czech", "Transcribe"])
def test_unknown_instructions_find_nothing(text: str) -> None:
    assert find_task(text) is None


def test_normalising_keeps_case_and_punctuation() -> None:
    assert normalize_instruction(" Transcribe \n\t this  audio. ") == "Transcribe this audio."


def test_answers() -> None:
    translations = {"de": " Ein  Hund. "}
    assert TASKS["transcribe"].write(" A  dog.\n", translations) == "A dog."
    assert TASKS["translate_de"].write("A dog.", translations) == "Ein Hund."
    assert TASKS["translate_de"].write(None, translations) == "Ein Hund."
    assert TASKS["translate_fr"].write("A dog.", translations) is None
    assert TASKS["transcribe"].write(None, translations) is None


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_no_speech_is_an_empty_answer(task: Task) -> None:
    assert task.write("", {}) == "" == task.write(" \n", {"de": "x"})
    assert task.read("") == ParsedAnswer("")


def test_reading_gives_back_what_was_written() -> None:
    for task in TASKS.values():
        answer = task.write("A dog.", {"de": "Ein Hund.", "fr": "Un chien."})
        assert answer
        assert task.read(answer) == ParsedAnswer(text=answer, segments=(), label=None)
