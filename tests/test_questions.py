"""Questions are followed, cancelled and answered from any thread; none is left behind when something fails."""

import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from test_answerer import ASK, EMOTION, INSTRUCTIONS, TIMES, ask, clips, finished, lively, say, told, whole

from serve.answer import Answer
from serve.answerer import Answerer, Question
from serve.engine import BackendError
from serve.recording import Recording
from speechllm.checkpoint import Checkpoint
from speechllm.options import Options


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return lively(tiny_checkpoint)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> str:
    return say(tmp_path_factory.mktemp("spoken") / "spoken.wav")


def followed(answerer: Answerer, recording: Recording, instruction: str) -> tuple[Question, list[tuple[str, bool]]]:
    """A question, once it is done, and its text and whether it was done at every change."""
    seen: list[tuple[str, bool]] = []
    question = answerer.pose(recording, instruction, on_change=lambda asked: seen.append((asked.text, asked.done)))
    finished(answerer, question)
    return question, seen


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("instruction", [ASK, TIMES, EMOTION])
def test_the_text_grows_and_ends_as_the_answer(
    checkpoint: Checkpoint, spoken: str, tmp_path: Path, instruction: str, batch_size: int
) -> None:
    answerer = Answerer(checkpoint, batch_size)
    (short,) = clips(tmp_path, 1.0)
    for file, pieces in ((short, 1), (spoken, 3)):
        recording = answerer.listen(file)
        assert len(recording.spans) >= pieces
        question, seen = followed(answerer, recording, instruction)
        answer = question.answer()
        assert answer.text == question.text == seen[-1][0]
        assert [done for _, done in seen] == [False] * (len(seen) - 1) + [True]
        texts = [text for text, _ in seen]
        assert all(after.startswith(before) for before, after in pairwise(texts))
        assert len(set(texts)) > 3 or instruction == EMOTION


def test_cancelled_questions_answer_with_what_is_there(checkpoint: Checkpoint, spoken: str, tmp_path: Path) -> None:
    answerer = Answerer(checkpoint, batch_size=2)
    (file,) = clips(tmp_path, 1.0)
    expected, *_ = ask(checkpoint, [file])
    cancelled = answerer.pose(answerer.listen(file), ASK)
    several = answerer.pose(answerer.listen(spoken), ASK)
    other = answerer.pose(answerer.listen(file), ASK)
    for _ in range(4):
        answerer.drive()
    assert not cancelled.done
    cancelled.cancel()
    several.cancel()
    answerer.drive()
    assert cancelled.done and several.done and not other.done
    answer = cancelled.answer()
    assert answer.finish_reason == several.answer().finish_reason == "cancelled"
    assert 0 < answer.tokens_out < expected.tokens_out
    assert expected.text.startswith(answer.text.rstrip("\ufffd"))
    assert several.answer().timings["first"] > 0
    assert told(finished(answerer, other)[0]) == told(expected)


def test_answers_too_late_are_given_as_far_as_they_are(checkpoint: Checkpoint, tmp_path: Path) -> None:
    answerer = Answerer(checkpoint, batch_size=1)
    recording = answerer.listen(*clips(tmp_path, 1.0))
    late, never = (answerer.pose(recording, ASK, options=Options(timeout=60)) for _ in range(2))
    answerer.drive()
    for question in (late, never):
        for _, job in question._jobs:
            job._submitted -= 61  # a minute ago
    first, second = finished(answerer, late, never)
    assert first.finish_reason == second.finish_reason == "timeout"
    assert first.tokens_out > 0 and first.confidence > 0
    assert (second.text, second.confidence, second.tokens_out, second.timings["first"]) == ("", 0.0, 0, 0.0)


@pytest.mark.parametrize("seen", [1, 2])
def test_nothing_runs_on_when_nobody_listens_any_more(checkpoint: Checkpoint, tmp_path: Path, seen: int) -> None:
    answerer = Answerer(checkpoint, batch_size=8)
    files = clips(tmp_path, 0.5, 0.5, 0.5)
    answers = answerer.ask(files, INSTRUCTIONS)
    for _ in range(seen):
        next(answers)
    assert answerer.running + answerer.waiting > 0
    answers.close()  # type: ignore[attr-defined]
    assert answerer.running + answerer.waiting == 0
    assert list(map(told, whole(answerer.ask(files, ASK)))) == list(map(told, ask(checkpoint, files)))


def test_questions_come_from_many_threads_while_one_answers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    files = clips(tmp_path, 1.0, 0.5, 0.8, 1.2)
    expected = {(a.file, a.instruction): told(a) for a in ask(checkpoint, files, INSTRUCTIONS)}
    answerer = Answerer(checkpoint, batch_size=4)
    found: list[Answer] = []
    faults: list[str] = []

    def pose(file: str) -> None:
        recording = answerer.listen(file)
        changed = threading.Event()
        questions = [answerer.pose(recording, text, on_change=lambda _: changed.set()) for text in INSTRUCTIONS]
        before = [""] * len(questions)
        while not all(question.done for question in questions):
            if not changed.wait(20):
                faults.append("nothing came")
                return
            changed.clear()
            for number, question in enumerate(questions):
                text = question.text
                if not text.startswith(before[number]):
                    faults.append(f"{before[number]!r} became {text!r}")
                before[number] = text
        found.extend(question.answer() for question in questions)

    assert not answerer.alive
    answerer.start()
    assert answerer.alive
    threads = [threading.Thread(target=pose, args=(file,)) for file in files]
    for thread in threads:
        thread.start()
    asked = whole(answerer.ask(files, INSTRUCTIONS))  # the engine's thread answers these too
    for thread in threads:
        thread.join(30)
    answerer.stop()
    assert not answerer.alive
    assert faults == []
    assert {(a.file, a.instruction): told(a) for a in found} == expected
    assert [told(answer) for answer in asked] == list(expected.values())


def test_several_threads_may_ask_without_one_that_answers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    files = clips(tmp_path, 1.0, 0.5, 0.8)
    expected = [told(answer) for answer in ask(checkpoint, files, INSTRUCTIONS)]
    answerer = Answerer(checkpoint, batch_size=3)
    found: list[list[Answer]] = []
    threads = [
        threading.Thread(target=lambda: found.append(whole(answerer.ask(files, INSTRUCTIONS)))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [[told(answer) for answer in answers] for answers in found] == [expected] * 3
    assert answerer.running + answerer.waiting == 0


def test_stopping_cancels_what_is_not_answered_and_it_can_start_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (file,) = clips(tmp_path, 1.0)
    (expected,) = ask(checkpoint, [file])
    answerer = Answerer(checkpoint, batch_size=1)
    recording = answerer.listen(file)
    begun, go_on = threading.Event(), threading.Event()

    def hold(question: Question) -> None:
        begun.set()
        go_on.wait(20)

    answerer.start()
    running = answerer.pose(recording, ASK, on_change=hold)
    waiting = answerer.pose(recording, ASK)
    assert begun.wait(20)
    threading.Timer(0.1, go_on.set).start()
    answerer.stop()
    assert running.answer().finish_reason == waiting.answer().finish_reason == "cancelled"
    assert 0 < running.answer().tokens_out < expected.tokens_out
    assert answerer.running + answerer.waiting == 0
    answerer.start()
    (answer,) = finished(answerer, answerer.pose(recording, ASK))
    answerer.stop()
    assert told(answer) == told(expected)
    assert list(map(told, whole(answerer.ask([file], ASK)))) == [told(expected)], "without its thread as well"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_in_the_engines_thread_reaches_who_asked_and_three_in_a_row_end_it(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    def fail(question: Question) -> None:
        if not question.done:
            raise ArithmeticError("broken")

    def asked_in_vain() -> None:
        with pytest.raises(ArithmeticError, match="broken"):
            finished(answerer, answerer.pose(recording, ASK, on_change=fail))

    (file,) = clips(tmp_path, 1.0)
    (expected,) = ask(checkpoint, [file])
    answerer = Answerer(checkpoint)
    recording = answerer.listen(file)
    answerer.start()
    for _ in range(2):
        asked_in_vain()
    assert told(finished(answerer, answerer.pose(recording, ASK))[0]) == told(expected), "it goes on"
    for _ in range(3):
        asked_in_vain()
    deadline = time.monotonic() + 20
    while answerer.alive:
        time.sleep(0.01)
        assert time.monotonic() < deadline
    with pytest.raises(BackendError, match="the engine has stopped"):
        answerer.pose(recording, ASK)
    answerer.stop()
