"""Questions on text alone: answered without audio where the task needs none, and refused anywhere else."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RATE, clip
from test_answerer import lively
from test_cli import ask
from test_http import Running, serving, turn

from serve.answer import Answer, Failure
from serve.answerer import Answerer
from serve.inputs import NO_AUDIO, on_text_alone
from speechllm.checkpoint import Checkpoint
from speechllm.generate import generate
from speechllm.prompt import Example, render
from speechllm.tasks import TASKS

GERMAN = "Translate this text to German: Two dogs run."
GO_ON = "Continue: two dogs"
ASK = "Transcribe this audio"


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return lively(tiny_checkpoint)


@pytest.fixture(scope="module")
def server(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(checkpoint, cache=tmp_path_factory.mktemp("cache")) as running:
        yield running


def expected(checkpoint: Checkpoint, instruction: str, *solved: tuple[str, str]) -> tuple[str, int]:
    """What the model says to the prompt it would have in training, and the ids of that."""
    nothing = torch.zeros(checkpoint.vocabulary.n_q, 0, dtype=torch.int64)
    shots = [Example(nothing, asked, answer) for asked, answer in solved]
    prompt = render(Example(nothing, instruction), checkpoint.vocabulary, checkpoint.text, shots).ids
    allowed = Answerer(checkpoint)._grammars.of(TASKS["transcribe"]).allowed(None)
    (completion,) = generate(
        checkpoint.lm, [prompt], end_id=checkpoint.vocabulary.end, pad_id=checkpoint.vocabulary.pad,
        max_new_tokens=checkpoint.settings.max_answer_tokens, allowed=allowed,
    )  # fmt: skip
    return " ".join(checkpoint.text.decode(completion.ids).split()), len(prompt)


def chat(server: Running, *messages: dict[str, Any], status: int = 200) -> dict[str, Any]:
    response = server.post("/v1/chat/completions", json={"messages": messages})
    assert response.status_code == status, response.text
    return response.json()


def test_what_needs_no_audio() -> None:
    for instruction in (GERMAN, GO_ON, "Express this in French: hello", "Render in German the sentence: hello"):
        assert on_text_alone(instruction)
    for instruction in (ASK, "Translate this audio to German", "Say something nice", "Continue:", ""):
        assert not on_text_alone(instruction)


def test_a_question_about_a_text_is_not_asked_of_a_recording(server: Running, tmp_path: Path) -> None:
    answerer = Answerer(server.answerer.checkpoint)
    (failure,) = answerer.ask([str(clip(tmp_path / "a.wav", 0.5))], GERMAN)
    assert isinstance(failure, Failure)
    assert failure.error.endswith(f"a.wav: {GERMAN!r} is about the text it holds: ask it without a recording")
    assert "is about the text it holds" in chat(server, turn(GERMAN), status=400)["error"]["message"]


def test_the_prompt_is_the_one_of_training(checkpoint: Checkpoint) -> None:
    answerer = Answerer(checkpoint)
    answers = list(answerer.ask([NO_AUDIO], [GERMAN, GO_ON]))
    for answer, instruction, task in zip(answers, (GERMAN, GO_ON), ("translate_text_de", "next_text"), strict=True):
        assert isinstance(answer, Answer)
        text, tokens = expected(checkpoint, instruction)
        assert (answer.text, answer.tokens_in, answer.task, answer.instruction) == (text, tokens, task, instruction)
        assert (answer.file, answer.seconds_in, answer.seconds_consumed, answer.segments) == ("", 0.0, 0.0, ())
        assert 0 < answer.confidence < 1
        assert answer.text
    assert answers[0] != answers[1]


def test_over_http(server: Running, checkpoint: Checkpoint) -> None:
    for again in (False, True):  # from the cache, the second time
        completion = chat(server, turn(GERMAN, None))
        text, tokens = expected(checkpoint, GERMAN)
        assert completion["choices"][0]["message"]["content"] == completion["answer"]["text"] == text
        assert completion["usage"]["prompt_tokens"] == tokens
        assert completion["answer"]["file"] == "messages.0"
        assert server.metric('cache_lookups_total{result="hit"}') == again
    assert chat(server, turn(GO_ON, None))["answer"]["text"] == expected(checkpoint, GO_ON)[0]


def test_earlier_turns_on_text_are_shots(server: Running, checkpoint: Checkpoint, tmp_path: Path) -> None:
    shot = [turn(GERMAN, None), {"role": "assistant", "content": "Zwei Hunde rennen."}]
    asked = "Translate this text to German: She sings."
    completion = chat(server, *shot, turn(asked, None))
    text, tokens = expected(checkpoint, asked, (GERMAN, "Zwei Hunde rennen."))
    assert (completion["answer"]["text"], completion["answer"]["tokens_in"]) == (text, tokens)
    # after a recording, what is asked is about it, as ever
    heard = [turn(ASK, clip(tmp_path / "a.wav", 1.0)), {"role": "assistant", "content": "a"}]
    again = chat(server, *heard, turn(ASK, None))["answer"]
    assert (again["seconds_in"], again["file"]) == (1.0, "messages.0 (wav)")
    assert "is about the text it holds" in chat(server, *heard, turn(GERMAN, None), status=400)["error"]["message"]


@pytest.mark.parametrize("instruction", [ASK, "Say something nice", "Is the speaker male or female?"])
def test_over_http_anything_else_needs_audio(server: Running, instruction: str) -> None:
    error = chat(server, turn(instruction, None), status=400)["error"]
    assert error["message"].startswith("messages.0: no audio came before it")
    assert error["param"] == "messages.0"
    shot = [turn(GERMAN, None), {"role": "assistant", "content": "Zwei Hunde rennen."}]
    assert "messages.2: no audio" in chat(server, *shot, turn(instruction, None), status=400)["error"]["message"]


def test_on_the_command_line(tiny_checkpoint: Path) -> None:
    result = ask(tiny_checkpoint, GERMAN, "--also", GO_ON, "--format", "json")
    assert result.exit_code == 0
    assert "was not trained on the task translate_text_de" in result.stderr  # by this one, and said as ever
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(one["instruction"], one["file"], one["seconds_in"]) for one in answers] == [
        (GERMAN, "", 0.0),
        (GO_ON, "", 0.0),
    ]
    plain = ask(tiny_checkpoint, GERMAN)
    assert plain.stdout.splitlines() == [answers[0]["text"]]
    assert "warning: the text: the answer was cut" in plain.stderr  # at six pieces
    assert ask(tiny_checkpoint, GERMAN, "--stream").stdout == ask(tiny_checkpoint, GERMAN, "--beams", "1").stdout


def test_on_the_command_line_anything_else_needs_audio(tiny_checkpoint: Path, tmp_path: Path) -> None:
    audio = clip(tmp_path / "a.wav")
    for arguments, words in (
        ((ASK,), "no audio: name files"),
        ((GERMAN, "--also", ASK), "no audio: name files"),
        ((GERMAN, "--shot", f"{audio}=Hallo"), "no audio: name files"),
        ((GERMAN, "--format", "srt"), "--format srt is about a recording"),
        ((GERMAN, "--output-dir", str(tmp_path / "out")), "--output-dir: a file is written for each recording"),
    ):
        result = ask(tiny_checkpoint, *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_text_and_recordings_side_by_side(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Nothing of one gets into the other: the same answers as alone."""
    answerer, alone = Answerer(checkpoint), Answerer(checkpoint, batch_size=1)
    (about,) = alone.ask([str(clip(tmp_path / "a.wav", 1.0))], [ASK])
    (text,) = alone.ask([NO_AUDIO], [GERMAN])
    assert isinstance(about, Answer) and isinstance(text, Answer)
    asked = ((about.file, ASK), (NO_AUDIO, GERMAN), (about.file, ASK))
    questions = [answerer.pose(answerer.listen(source), instruction) for source, instruction in asked]
    while not all(question.done for question in questions):
        answerer.drive()
    for question, one in zip(questions, (about, text, about), strict=True):
        assert replace(question.answer(), timings={}) == replace(one, timings={})
    assert about.tokens_in > text.tokens_in
    assert about.seconds_in == pytest.approx(1.0, abs=1 / RATE)
