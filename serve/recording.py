"""A recording as the model hears it: read, cut at pauses where it is long, and encoded."""

from __future__ import annotations

import hashlib
import io
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from serve.segmentation import is_silent, speech_spans
from serve.speakers import measure_voices
from speechllm.audio import read_audio, to_seconds
from speechllm.checkpoint import Checkpoint


@dataclass(frozen=True, eq=False)
class Span:
    """A piece of a recording from ``start`` to ``end`` (seconds), and its codes: int64 ``[n_q, frames]``.

    voices: what is kept to know its speakers again, see :func:`serve.speakers.measure_voices`.
    """

    start: float
    end: float
    codes: Tensor
    voices: Tensor

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.start


@dataclass(frozen=True, eq=False)
class Recording:
    """What questions can be asked about, any number of them.

    seconds: length. consumed: seconds in the spans, or found to hold no speech. key: a hash of its samples at the
    codec's rate, "" where there is no audio. timings: seconds spent to "read" and to "encode" it (pauses searched too).
    """

    name: str
    seconds: float
    consumed: float
    spans: tuple[Span, ...]
    key: str
    timings: dict[str, float]


def listen(checkpoint: Checkpoint, source: str | Path | bytes, name: str) -> Recording:
    """Read, cut and encode a file, or its contents; spans are of at most the checkpoint's ``max_audio_seconds``.

    Raises:
        InputError: it cannot be read, see :func:`read_audio`.
    """
    codec, rate = checkpoint.codec, checkpoint.codec.sample_rate
    started = time.perf_counter()
    wav = read_audio(_named(source, name) if isinstance(source, bytes) else source, rate)  # [1, samples]
    read = time.perf_counter()
    total = wav.shape[-1]
    missed = 0  # samples of spans that the codes do not reach
    spans = []
    found = [] if is_silent(wav, rate) else speech_spans(wav, rate, checkpoint.settings.max_audio_seconds)
    for start, end in found:
        with torch.inference_mode():
            codes = checkpoint.encode(wav[:, start:end])
        missed += max(0, end - start - codes.shape[1] * codec.hop_length)
        voices = measure_voices(wav[:, start:end], rate)
        spans.append(Span(to_seconds(start, rate), to_seconds(end, rate), codes, voices))
    return Recording(
        name=name,
        seconds=to_seconds(total, rate),
        consumed=to_seconds(total - missed, rate),
        spans=tuple(spans),
        key=hashlib.sha256(wav.numpy().data).hexdigest(),
        timings={"read": read - started, "encode": time.perf_counter() - read},
    )


def no_audio(checkpoint: Checkpoint, name: str) -> Recording:
    """What a question on text alone is about: one span without a frame, as such tasks have it in training."""
    codes = torch.zeros(checkpoint.vocabulary.n_q, 0, dtype=torch.int64)
    span = Span(0.0, 0.0, codes, voices=torch.empty(0))
    return Recording(name, 0.0, 0.0, (span,), "", {"read": 0.0, "encode": 0.0})


def _named(contents: bytes, name: str) -> io.BytesIO:
    """A file in memory that errors can name."""
    file = io.BytesIO(contents)
    file.name = name
    return file
