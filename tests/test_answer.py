"""An answer is put together from those about the pieces of a recording: nothing is hidden, nothing counted twice."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from serve.answer import Answer, Failure, SpanAnswer, assemble
from serve.recording import Recording, Span
from serve.search import Finish, Hypothesis
from serve.speakers import SIZE
from speechllm.checkpoint import Checkpoint, load_checkpoint
from speechllm.errors import InputError
from speechllm.prompt import Example, render
from speechllm.tasks import TASKS, Part, Segment, Speaker, Task, Time
from speechllm.tasks.labels import Choice
from speechllm.vocabulary import Vocabulary

NO_CODES = torch.zeros(1, 0, dtype=torch.int64)
NO_VOICES = torch.zeros(0, SIZE)
KEYS = [
    *("file", "instruction", "task", "text", "segments", "words", "label", "slots", "confidence"),
    *("seconds_in", "seconds_consumed", "finish_reason", "model", "tokens_in", "tokens_out", "timings"),
]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    """With marks of time, up to 8 s."""
    checkpoint = load_checkpoint(tiny_checkpoint)
    return replace(checkpoint, vocabulary=Vocabulary(checkpoint.text.size, n_q=1, card=16, times=201))


def said(
    checkpoint: Checkpoint,
    parts: str | tuple[Part, ...],
    logprobs: Sequence[float] | float = -0.1,
    finish: Finish = "stop",
    start: float = 0.0,
) -> SpanAnswer:
    """An answer about the two seconds from `start`, each id with this log-probability or with one of its own."""
    ids = render(Example(NO_CODES, "?", parts), checkpoint.vocabulary, checkpoint.text)
    chosen = ids.ids[ids.prompt_length :].tolist()[: None if finish == "stop" else -1]
    scores = [logprobs] * len(chosen) if isinstance(logprobs, float) else list(logprobs)
    assert len(scores) == len(chosen)
    words = chosen[:-1] if finish == "stop" else chosen
    return SpanAnswer(
        Span(start, start + 2, NO_CODES, NO_VOICES), 10, Hypothesis(tuple(words), tuple(scores), None), finish
    )


def whole(checkpoint: Checkpoint, reader: str | Task, *spans: SpanAnswer, min_confidence: float = 0.0) -> Answer:
    recording = Recording("a.wav", 9.0, 9.0, tuple(one.span for one in spans), "", {"read": 0.25, "encode": 0.5})
    task = TASKS[reader] if isinstance(reader, str) else reader
    return assemble(checkpoint, recording, "Do", task, task, spans, min_confidence, {"queue": 1.0})


def test_answers_of_spans_are_joined_in_order(checkpoint: Checkpoint) -> None:
    spans = [said(checkpoint, text, start=start) for text, start in (("one two", 0.0), ("", 2.0), ("three", 5.0))]
    answer = whole(checkpoint, "transcribe", *spans)
    assert (answer.text, answer.finish_reason) == ("one two three", "stop")
    assert answer.segments == (Segment(None, 0.0, 2.0, "one two"), Segment(None, 5.0, 7.0, "three"))
    assert [word.text for word in answer.words] == ["one", "two", "three"]
    assert (answer.tokens_in, answer.tokens_out) == (30, sum(len(one.best.ids) for one in spans))
    assert answer.timings == {"read": 0.25, "encode": 0.5, "queue": 1.0}
    assert (answer.file, answer.instruction, answer.task) == ("a.wav", "Do", "transcribe")
    assert answer.model == checkpoint.settings.name


def test_times_are_those_of_the_whole_file(checkpoint: Checkpoint) -> None:
    first = (Time(0.4), "good morning", Time(1.2))
    second = (Time(0.0), "all", Time(0.8), Time(0.8), "of you", Time(2.0))
    answer = whole(checkpoint, "transcribe_times", said(checkpoint, first), said(checkpoint, second, start=5.0))
    expected = [(0.4, 1.2, "good morning"), (5.0, 5.8, "all"), (5.8, 7.0, "of you")]
    assert [(s.start, s.end, s.text) for s in answer.segments] == [pytest.approx(one) for one in expected]
    assert answer.text == "<|0.40|> good morning <|1.20|> <|5.00|> all <|5.80|> <|5.80|> of you <|7.00|>"
    timed = [(word.text, word.start, word.end) for word in answer.words]
    assert timed == [
        (text, pytest.approx(start), pytest.approx(end)) for start, end, words in expected for text in words.split()
    ]


def test_words_of_speakers_have_the_times_of_their_turns(checkpoint: Checkpoint) -> None:
    parts = (Speaker(1), Time(0.0), "a b", Time(1.0), Speaker(2), Time(0.4), "c", Time(2.0))
    answer = whole(checkpoint, "diarize", said(checkpoint, parts))
    assert [segment.speaker for segment in answer.segments] == ["spk1", "spk2"]
    assert [(w.text, w.start, w.end) for w in answer.words] == [("a", 0.0, 1.0), ("b", 0.0, 1.0), ("c", 0.4, 2.0)]


def test_words_of_a_segment_without_an_end_end_with_the_audio(checkpoint: Checkpoint) -> None:
    cut = said(checkpoint, (Time(0.0), "a", Time(0.4), Time(0.8), "b"), finish="length")
    words = whole(checkpoint, "transcribe_times", cut).words
    assert [(word.text, word.start, word.end) for word in words] == [("a", 0.0, 0.4), ("b", 0.8, 2.0)]


@pytest.mark.parametrize("text", ["hello there", "a 日本 über naïveté", "  wide   spaces ", "x", "café 😀"])
def test_words_are_as_sure_as_their_pieces_together(checkpoint: Checkpoint, text: str) -> None:
    """Characters without a piece are several bytes, and all of them count."""
    pieces = checkpoint.text.encode(text)
    logprobs = [-0.01 * 2**number for number in range(len(pieces))]
    answer = whole(checkpoint, "transcribe", said(checkpoint, text, [*logprobs, -5.0]))
    assert [word.text for word in answer.words] == text.split()
    spelt = [p for index, p in zip(pieces, logprobs, strict=True) if checkpoint.text.piece(index).strip("\u2581")]
    total = sum(math.log(word.confidence) for word in answer.words)
    assert total == pytest.approx(sum(spelt)), "each piece is in one word, the end in none"
    assert (answer.words[0].start, answer.words[0].end) == (0.0, 2.0), "of the whole piece"


def test_confidence_is_the_probability_of_a_whole_answer(checkpoint: Checkpoint) -> None:
    spans = [said(checkpoint, "yes", -0.2), said(checkpoint, "no", -0.7, finish="length", start=3.0)]
    sums = [sum(one.best.logprobs) for one in spans]
    assert whole(checkpoint, "transcribe", spans[0]).confidence == pytest.approx(math.exp(sums[0]))
    assert whole(checkpoint, "transcribe", *spans).confidence == pytest.approx(math.exp(sum(sums) / 2))
    assert len({*sums}) == 2


def test_confidence_of_a_label_is_its_probability(checkpoint: Checkpoint) -> None:
    one, other = said(checkpoint, "angry", -0.3), said(checkpoint, "angry", -0.1, start=4.0)
    ids = len(one.best.logprobs)
    assert whole(checkpoint, "emotion", one).confidence == pytest.approx(math.exp(-0.3 * ids))
    both = whole(checkpoint, "emotion", one, other)
    assert both.confidence == pytest.approx(math.exp(-0.2 * ids)), "of several spans, their geometric mean"
    assert (both.label, both.text, both.words) == ("angry", "angry angry", ())


def test_confidences_are_calibrated(checkpoint: Checkpoint) -> None:
    settings = checkpoint.settings.model_copy(update={"confidence_temperature": 2.0})
    calibrated = replace(checkpoint, settings=settings)
    for reader, text in (("transcribe", "some words"), ("emotion", "sad")):
        before = whole(checkpoint, reader, said(checkpoint, text, -0.4))
        after = whole(calibrated, reader, said(checkpoint, text, -0.4))
        assert after.confidence == pytest.approx(math.sqrt(before.confidence))
        for one, other in zip(before.words, after.words, strict=True):
            assert other.confidence == pytest.approx(math.sqrt(one.confidence))


def test_a_label_is_told_where_all_spans_agree(checkpoint: Checkpoint) -> None:
    angry, sad, odd = (said(checkpoint, text, start=4.0) for text in ("angry", "sad", "furious"))
    assert whole(checkpoint, "emotion", angry, angry).label == "angry"
    assert whole(checkpoint, "emotion", angry, sad).label is None
    assert whole(checkpoint, "emotion", angry, sad).text == "angry sad"
    assert whole(checkpoint, "emotion", odd).label is None
    choice = Choice("choice", "accuracy", (), (), labels=("furious", "calm"))
    assert whole(checkpoint, choice, odd, odd).label == "furious"


def test_slots_of_all_spans_are_told(checkpoint: Checkpoint) -> None:
    spans = [said(checkpoint, "set(room=kitchen)"), said(checkpoint, "set(light=on)", start=4.0)]
    answer = whole(checkpoint, "intent", *spans)
    assert (answer.label, answer.slots) == ("set", {"room": "kitchen", "light": "on"})


def test_the_worst_end_of_a_span_is_told(checkpoint: Checkpoint) -> None:
    order: list[Finish] = ["stop", "length", "repetition", "timeout", "cancelled"]
    for number, worst in enumerate(order):
        spans = [said(checkpoint, "word", finish=finish, start=3.0) for finish in order[: number + 1]]
        assert whole(checkpoint, "transcribe", *spans).finish_reason == worst
        assert whole(checkpoint, "transcribe", *spans[::-1]).finish_reason == worst


def test_nothing_said_is_no_speech(checkpoint: Checkpoint) -> None:
    empty = whole(checkpoint, "transcribe", said(checkpoint, "", -0.5))
    assert (empty.text, empty.segments, empty.finish_reason) == ("", (), "no_speech")
    assert empty.confidence == pytest.approx(math.exp(-0.5)), "the model said so, and how sure it was"
    unasked = whole(checkpoint, "transcribe", min_confidence=1.0)
    assert (unasked.text, unasked.finish_reason, unasked.confidence) == ("", "no_speech", 1.0)


@pytest.mark.parametrize("reader", ["transcribe", "emotion"])
@pytest.mark.parametrize("finish", ["timeout", "cancelled"])
def test_what_was_stopped_before_its_first_id_is_not_sure(checkpoint: Checkpoint, reader: str, finish: Finish) -> None:
    stopped = SpanAnswer(Span(0.0, 2.0, NO_CODES, NO_VOICES), 10, Hypothesis((), (), None), finish)
    for min_confidence in (0.0, 0.5):
        answer = whole(checkpoint, reader, stopped, min_confidence=min_confidence)
        assert (answer.text, answer.confidence, answer.finish_reason) == ("", 0.0, finish)


def test_what_never_had_its_turn_was_not_consumed(checkpoint: Checkpoint) -> None:
    first, last = said(checkpoint, "a"), replace(said(checkpoint, "", start=5.0), finish="timeout")
    consumed = [whole(checkpoint, "transcribe", first, replace(last, heard=heard)).seconds_consumed for heard in (0, 1)]
    assert consumed[1] - consumed[0] == pytest.approx(2.0)


def test_an_answer_less_sure_than_asked_for_is_withheld(checkpoint: Checkpoint) -> None:
    parts = (Time(0.0), "a", Time(0.4))
    for reader, text in (("transcribe_times", parts), ("emotion", "angry"), ("intent", "set(room=kitchen)")):
        one = said(checkpoint, text, -0.3)
        confidence = whole(checkpoint, reader, one).confidence
        assert whole(checkpoint, reader, one, min_confidence=confidence).finish_reason == "stop"
        held = whole(checkpoint, reader, one, min_confidence=confidence + 1e-6)
        assert (held.finish_reason, held.text, held.segments, held.words) == ("abstained", "", (), ())
        assert (held.label, held.slots, held.confidence) == (None, {}, confidence)
        assert held.tokens_out > 0


def test_to_dict_is_the_contract(checkpoint: Checkpoint) -> None:
    parts = (Speaker(1), Time(0.04), "hi", Time(1.0))
    one = said(checkpoint, parts, -1 / 3, start=0.33333)
    answer = whole(checkpoint, "diarize", one)
    told = answer.to_dict()
    assert list(told) == KEYS
    assert json.loads(json.dumps(told)) == told
    assert told["segments"] == [{"speaker": "spk1", "start": 0.3733, "end": 1.3333, "text": "hi"}]
    assert told["words"] == [
        {"text": "hi", "confidence": told["words"][0]["confidence"], "start": 0.3733, "end": 1.3333}
    ]
    assert told["confidence"] == round(math.exp(sum(one.best.logprobs)), 4)
    assert told["timings"] == {"read": 0.25, "encode": 0.5, "queue": 1.0}


def test_failures_name_their_file_once() -> None:
    assert Failure.of("a.wav", InputError("a.wav: the file is empty")).error == "a.wav: the file is empty"
    failure = Failure.of("a.wav", InputError("a prompt is too long"))
    assert failure.to_dict() == {"file": "a.wav", "error": "a.wav: a prompt is too long"}
