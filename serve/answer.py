"""Files and an instruction in, answers out: read, cut, encode, render, generate, read back."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from serve.segmentation import is_silent, speech_spans
from speechllm.audio import read_audio, to_seconds
from speechllm.checkpoint import Checkpoint
from speechllm.errors import InputError
from speechllm.generate import Completion, generate
from speechllm.prompt import Example, answer_parts, render
from speechllm.tasks import TASKS, Parts, Segment, Task, Time, find_task, normalize_instruction

FinishReason = Literal["stop", "length", "no_speech"]


@dataclass(frozen=True)
class Answer:
    """What the model answered about one file.

    text: the whole answer; of audio longer than the checkpoint's `max_audio_seconds`, which is answered span by span
        (see `serve.segmentation`), the answers of the spans joined by a space.
    segments: those the answer tells, where the task tells any; else one for each span with an answer. Times are in
        seconds from the start of the file. Speakers are numbered anew in each span.
    label: the answer's label where the task has labels and all spans agree on it.
    confidence: exp of the mean log-probability of all ids generated, within [0, 1]; 1 when the model was not asked.
    seconds_consumed: what was put before the model or found to hold no speech. Equal to seconds_in: no part of a file
        is passed over.
    finish_reason: "stop"; "length" when the answer of any span was cut at the checkpoint's `max_answer_tokens`;
        "no_speech" when there was nothing to hear or the model answered with nothing.
    timings: seconds spent to "read", "encode" (pauses searched too) and "generate" (files answered in one batch share
        its time by their number of spans).
    """

    file: str
    instruction: str
    text: str
    segments: tuple[Segment, ...]
    label: str | None
    confidence: float
    seconds_in: float
    seconds_consumed: float
    finish_reason: FinishReason
    timings: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, in the order of the fields; times to the millisecond."""
        return asdict(self) | {
            "segments": [
                asdict(segment) | {"start": round(segment.start, 3), "end": round(segment.end, 3)}
                for segment in self.segments
            ],
            "confidence": round(self.confidence, 4),
            "seconds_in": round(self.seconds_in, 3),
            "seconds_consumed": round(self.seconds_consumed, 3),
            "timings": {name: round(seconds, 3) for name, seconds in self.timings.items()},
        }


@dataclass(frozen=True)
class Failure:
    """A file that could not be answered, and why, in one line that names it."""

    file: str
    error: str

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


@dataclass
class _Clip:
    """A file being answered. What `_prepare` found out about it, and its spans."""

    file: str
    seconds_in: float
    seconds_consumed: float
    timings: dict[str, float]
    spans: list[_Span] = field(default_factory=list)


@dataclass
class _Span:
    """A piece of a clip, from `start` to `end` (seconds), and its prompt: int64 [seq]."""

    clip: _Clip
    start: float
    end: float
    prompt: Tensor
    completion: Completion | None = None


class Answerer:
    """Answers questions about audio files with one checkpoint, up to `batch_size` spans decoded together."""

    def __init__(self, checkpoint: Checkpoint, batch_size: int = 8) -> None:
        """Raises InputError for a batch size below 1."""
        if batch_size < 1:
            raise InputError(f"the batch size must be 1 or more, not {batch_size}")
        self._checkpoint = checkpoint
        self._batch_size = batch_size
        ids = torch.arange(checkpoint.vocabulary.size)
        self._plain = checkpoint.vocabulary.is_text(ids) | (ids == checkpoint.vocabulary.end)  # [vocabulary]
        self._plain[checkpoint.text.hidden_ids] = False
        self._plain[checkpoint.text.size : checkpoint.vocabulary.text_size] = False  # rows of no piece
        self._marked = self._plain | checkpoint.vocabulary.is_mark(ids)

    def ask(self, files: Sequence[str], instruction: str, shots: Sequence[Example] = ()) -> Iterator[Answer | Failure]:
        """One answer per file, in the order given, each as soon as it and those before it are there.

        files: paths, or "-" for standard input. A file that cannot be answered gives a Failure; the others are
        answered. No more than one file's audio is held in memory at a time.
        Raises InputError for an instruction or shots that cannot be used, before any file is read.
        """
        instruction = normalize_instruction(instruction)
        nothing = torch.zeros(self._checkpoint.vocabulary.n_q, 0, dtype=torch.int64)
        self._prompt(nothing, instruction, shots)
        return self._answers(files, instruction, shots, find_task(instruction) or TASKS["transcribe"])

    def _answers(
        self, files: Sequence[str], instruction: str, shots: Sequence[Example], task: Task
    ) -> Iterator[Answer | Failure]:
        clips: deque[_Clip | Failure] = deque()  # read, not yet given back
        waiting: list[_Span] = []
        for file in files:
            try:
                clip = self._prepare(file, instruction, shots)
            except InputError as error:
                clips.append(Failure(file, str(error)))
            else:
                clips.append(clip)
                waiting += clip.spans
            while len(waiting) >= self._batch_size:
                self._complete(waiting[: self._batch_size], task)
                del waiting[: self._batch_size]
            yield from self._finished(clips, instruction, task)
        self._complete(waiting, task)
        yield from self._finished(clips, instruction, task)

    def _finished(self, clips: deque[_Clip | Failure], instruction: str, task: Task) -> Iterator[Answer | Failure]:
        """Takes from the left what is answered, up to the first clip that is not."""
        while clips:
            clip = clips[0]
            if isinstance(clip, _Clip) and any(span.completion is None for span in clip.spans):
                return
            clips.popleft()
            yield clip if isinstance(clip, Failure) else self._answer(clip, instruction, task)

    def _prepare(self, file: str, instruction: str, shots: Sequence[Example]) -> _Clip:
        """Raises InputError when the file cannot be read, or its prompt does not fit the model."""
        codec = self._checkpoint.codec
        started = time.perf_counter()
        wav = read_audio(file, codec.sample_rate)
        read = time.perf_counter()
        total = wav.shape[-1]
        missed = 0  # samples of spans that the codes do not reach
        clip = _Clip(file, to_seconds(total, codec.sample_rate), 0.0, {"read": read - started})
        silent = is_silent(wav, codec.sample_rate)
        limit = self._checkpoint.settings.max_audio_seconds
        for start, end in [] if silent else speech_spans(wav, codec.sample_rate, limit):
            codes = self._checkpoint.encode(wav[:, start:end])  # [n_q, frames]
            missed += max(0, end - start - codes.shape[1] * codec.hop_length)
            try:
                prompt = self._prompt(codes, instruction, shots)
            except InputError as error:
                raise InputError(f"{file}: {error}") from error
            times = (to_seconds(start, codec.sample_rate), to_seconds(end, codec.sample_rate))
            clip.spans.append(_Span(clip, *times, prompt))
        clip.seconds_consumed = to_seconds(total - missed, codec.sample_rate)
        clip.timings |= {"encode": time.perf_counter() - read, "generate": 0.0}
        return clip

    def _prompt(self, codes: Tensor, instruction: str, shots: Sequence[Example]) -> Tensor:
        """int64 [seq]. Raises InputError when it and the longest answer do not fit the model's positions."""
        checkpoint = self._checkpoint
        ids = render(Example(codes, instruction), checkpoint.vocabulary, checkpoint.text, shots).ids
        room = checkpoint.lm.config.max_position_embeddings - checkpoint.settings.max_answer_tokens
        if len(ids) > room:
            ways = "fewer or shorter shots" if shots else "a shorter instruction"
            raise InputError(f"a prompt of {len(ids)} ids exceeds the {room} the model has room for; use {ways}")
        return ids

    def _complete(self, spans: Sequence[_Span], task: Task) -> None:
        checkpoint = self._checkpoint
        started = time.perf_counter()
        completions = generate(
            checkpoint.lm,
            [span.prompt for span in spans],
            end_id=checkpoint.vocabulary.end,
            pad_id=checkpoint.vocabulary.pad,
            max_new_tokens=checkpoint.settings.max_answer_tokens,
            allowed=self._marked if task.marks else self._plain,
        )
        seconds = time.perf_counter() - started
        for span, completion in zip(spans, completions, strict=True):
            span.completion = completion
            span.clip.timings["generate"] += seconds / len(spans)

    def _answer(self, clip: _Clip, instruction: str, task: Task) -> Answer:
        texts: list[str] = []
        segments: list[Segment] = []
        labels: set[str | None] = set()
        logprobs: list[float] = []
        cut = False
        for span in clip.spans:
            assert span.completion is not None
            parts = answer_parts(span.completion.ids, self._checkpoint.vocabulary, self._checkpoint.text)
            parsed = task.read(moved(parts, span.start))
            logprobs += span.completion.logprobs
            cut = cut or span.completion.finish_reason == "length"
            if parsed.text:
                texts.append(parsed.text)
                labels.add(parsed.label)
                segments += parsed.segments if task.marks else [Segment(None, span.start, span.end, parsed.text)]
        return Answer(
            file=clip.file,
            instruction=instruction,
            text=" ".join(texts),
            segments=tuple(segments),
            label=labels.pop() if len(labels) == 1 else None,
            confidence=math.exp(sum(logprobs) / len(logprobs)) if logprobs else 1.0,
            seconds_in=clip.seconds_in,
            seconds_consumed=clip.seconds_consumed,
            finish_reason="length" if cut else "stop" if texts else "no_speech",
            timings=clip.timings,
        )


def moved(parts: Parts, seconds: float) -> Parts:
    """An answer about a span with its times counted from the start of the file, the span being at ``seconds``."""
    return tuple(Time(part.seconds + seconds) if isinstance(part, Time) else part for part in parts)
