"""What comes back: the answer to a question about a recording, put together from those about its pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from serve.recording import Recording, Span
from serve.search import Finish, Hypothesis
from serve.speakers import link_speakers
from speechllm.audio import STDIN
from speechllm.checkpoint import Checkpoint
from speechllm.errors import InputError
from speechllm.prompt import answer_parts
from speechllm.tasks import Parts, Segment, Task, Time
from speechllm.tasks.labels import Label

FinishReason = Literal["stop", "length", "no_speech", "repetition", "timeout", "cancelled", "abstained"]
# of several pieces, the worst decides
_WORST: tuple[Finish, ...] = ("cancelled", "timeout", "repetition", "length")


@dataclass(frozen=True)
class Word:
    """A word of an answer, and how sure the model was of it, within [0, 1]; no times where there is no audio."""

    text: str
    confidence: float
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Answer:
    """What the model answered about one recording, or to a question on text alone.

    file: name of the recording; "" without one.
    task: name of the task that the instruction is a wording of; None for other instructions, read as plain text.
    text: the whole answer; of audio longer than the checkpoint's ``max_audio_seconds``, which is answered span by span
        (see :mod:`serve.segmentation`), the answers of the spans joined by a space. "" when it was withheld.
    segments: those the answer tells, where the task tells any; else one for each span with an answer, and none where
        there is no audio. Times are in seconds from the start of the file.
    words: of answers in words, in their order.
    label: the answer's label where the task has labels and all spans agree on it.
    confidence: how sure it is that the answer is right as a whole, within [0, 1]: its probability among those that the
        task allows, to the power of 1 / the checkpoint's ``confidence_temperature``; of several spans the geometric
        mean. 1 when the model was not asked, 0 when it was stopped before it said anything.
    seconds_consumed: what was put before the model or found to hold no speech. Equal to seconds_in, for no part of a
        file is passed over, unless it was stopped before each piece had its turn.
    finish_reason: "stop"; "length" when the answer of any span was cut at its longest; "repetition" when one said the
        same again and again, and was cut to once; "timeout" and "cancelled" when it was stopped, with what was there;
        "no_speech" when there was nothing to hear or the model answered with nothing; "abstained" when its confidence
        was below the least that was asked for.
    model: name of the checkpoint that answered.
    tokens_in, tokens_out: ids of prompts and of answers.
    timings: seconds to "read" and "encode" (pauses searched too); from asking to the last place in the batch
        ("queue"), the "first" id and the last one ("generate").
    """

    file: str
    instruction: str
    task: str | None
    text: str
    segments: tuple[Segment, ...]
    words: tuple[Word, ...]
    label: str | None
    slots: Mapping[str, str]
    confidence: float
    seconds_in: float
    seconds_consumed: float
    finish_reason: FinishReason
    model: str
    tokens_in: int
    tokens_out: int
    timings: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, in the order of the fields; four digits after the point, of confidences four that count."""
        told = _rounded(asdict(self))
        told["confidence"] = float(f"{self.confidence:.4g}")  # of a long answer it may be small
        for word, one in zip(told["words"], self.words, strict=True):
            word["confidence"] = float(f"{one.confidence:.4g}")
        return told


@dataclass(frozen=True)
class Failure:
    """A file that could not be answered, and why, in one line that names it."""

    file: str
    error: str

    @staticmethod
    def of(file: str, error: InputError) -> Failure:
        """The error, with the file's name if it does not say it."""
        message, name = str(error), "standard input" if file == STDIN else file
        return Failure(file, message if name in message else f"{name}: {message}")

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class SpanAnswer:
    """What was generated about one span: a prompt of ``tokens_in`` ids, its continuation and how it ended.

    heard: the prompt was put before the model.
    """

    span: Span
    tokens_in: int
    best: Hypothesis
    finish: Finish
    heard: bool = True


@dataclass
class _Whole:
    """What the spans' answers add up to."""

    texts: list[str] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    labels: set[str | None] = field(default_factory=set)
    slots: dict[str, str] = field(default_factory=dict)


def assemble(
    checkpoint: Checkpoint,
    recording: Recording,
    instruction: str,
    task: Task | None,
    reader: Task,
    spans: Sequence[SpanAnswer],
    min_confidence: float,
    timings: Mapping[str, float],
) -> Answer:
    """The answer about a recording from those about its spans, read back by the task ``reader``."""
    whole = _Whole()
    scores: list[float] = []
    answers = [answer_parts(one.best.ids, checkpoint.vocabulary, checkpoint.text) for one in spans]
    linked = link_speakers([one.span.voices for one in spans], answers)
    for one, parts in zip(spans, linked, strict=True):
        parsed = reader.read(moved(parts, one.span.start))
        if one.best.logprobs:
            scores.append(sum(one.best.logprobs))
        if parsed.text:
            whole.texts.append(parsed.text)
            whole.labels.add(parsed.label)
            whole.slots |= parsed.slots
            own = [Segment(None, one.span.start, one.span.end, parsed.text)] if one.span.seconds else []
            whole.segments += parsed.segments if reader.marks else own
            whole.words += () if isinstance(reader, Label) else words(checkpoint, one.best, one.span)
    confidence = _calibrated(checkpoint, sum(scores) / len(scores)) if scores else float(not spans)
    worst = next((finish for finish in _WORST if any(one.finish == finish for one in spans)), None)
    reason: FinishReason = worst or ("stop" if whole.texts else "no_speech")
    if confidence < min_confidence:
        whole, reason = _Whole(), reason if reason in ("cancelled", "timeout") else "abstained"
    return Answer(
        file=recording.name,
        instruction=instruction,
        task=task.name if task else None,
        text=" ".join(whole.texts),
        segments=tuple(whole.segments),
        words=tuple(whole.words),
        label=whole.labels.pop() if len(whole.labels) == 1 else None,
        slots=whole.slots,
        confidence=confidence,
        seconds_in=recording.seconds,
        seconds_consumed=recording.consumed - sum(one.span.seconds for one in spans if not one.heard),
        finish_reason=reason,
        model=checkpoint.settings.name,
        tokens_in=sum(one.tokens_in for one in spans),
        tokens_out=sum(len(one.best.ids) for one in spans),
        timings=recording.timings | dict(timings),
    )


def words(checkpoint: Checkpoint, best: Hypothesis, span: Span) -> Iterator[Word]:
    """The words of a span; each as sure as all its pieces together.

    Words get the times of the segment that they are in; what the answer does not tell of these is the span's.
    """
    vocabulary = checkpoint.vocabulary
    start: float | None = None  # of the segment, once it has begun
    run: list[tuple[int, float]] = []  # text ids since the last mark
    for index, log_prob in zip(best.ids, best.logprobs, strict=False):  # the end id has a probability too
        at, speaker = vocabulary.seconds_of(index), vocabulary.speaker_of(index)
        if at is None and speaker is None:
            run.append((index, log_prob))
            continue
        end = None if at is None or start is None else span.start + at
        yield from _spelt(checkpoint, run, *_within(span, start, end))
        run = []
        start = span.start + at if at is not None and end is None else None
    yield from _spelt(checkpoint, run, *_within(span, start, None))


def _within(span: Span, start: float | None, end: float | None) -> tuple[float | None, float | None]:
    if not span.seconds:
        return None, None
    return span.start if start is None else start, span.end if end is None else end


def _spelt(
    checkpoint: Checkpoint, run: Sequence[tuple[int, float]], start: float | None, end: float | None
) -> Iterator[Word]:
    ids = [index for index, _ in run]
    ends = [len(checkpoint.text.decode(ids[: number + 1])) for number in range(len(ids))]  # characters
    text = checkpoint.text.decode(ids)
    begun = 0
    for word in text.split():
        first = text.index(word, begun)
        begun = first + len(word)
        inside = [
            log_prob
            for (_, log_prob), before, after in zip(run, [0, *ends], ends, strict=False)
            if min(before, after - 1) < begun and after > first  # bytes after a character's first add no length
        ]
        yield Word(word, _calibrated(checkpoint, sum(inside)), start, end)


def _calibrated(checkpoint: Checkpoint, log_prob: float) -> float:
    return math.exp(log_prob / checkpoint.settings.confidence_temperature)


def moved(parts: Parts, seconds: float) -> Parts:
    """An answer about a span with its times counted from the start of the file, the span being at ``seconds``."""
    return tuple(Time(part.seconds + seconds) if isinstance(part, Time) else part for part in parts)


def _rounded(value: Any) -> Any:
    """Every float in it to four digits after the point."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
