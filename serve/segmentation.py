"""Long audio in pieces the model was trained on: cut at pauses, with every stretch of speech in exactly one piece."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speechllm._torchaudio import import_torchaudio
from speechllm.audio import resample, to_samples

SILENCE_DB = -65.0  # dBFS, RMS of 20 ms: nothing in a recording that stays below it can be heard
THRESHOLD = 0.1  # probability of speech; low, for what is left out is never answered
PAD_SECONDS = 0.2  # kept on either side of speech: its onsets and tails are soft
LONG_PAUSE_SECONDS = 1.0  # what lies on either side of it is answered apart, as in the clips the model was trained on
CUT_SECONDS = 0.04  # speech without a pause is cut in the middle of its quietest stretch of this length
LEVEL_SECONDS = 0.02
_LEVELS = 1 << 13  # taken at a time

_VAD_RATE = 16000  # Hz
_WINDOW = 512  # samples, fixed by the detector
_LANE, _WARM_UP = 313, 62  # windows: 10 s, and 2 s in front of them for the detector to settle
_LANES = 96
_MIN_VAD_PEAK = 0.5
_LOCK = threading.Lock()  # the detector keeps a state from one window to the next

Span = tuple[int, int]


def is_silent(wav: Tensor, sample_rate: int) -> bool:
    """Whether `wav` [1, samples] stays below SILENCE_DB throughout; a constant offset does not count."""
    size = max(1, min(to_samples(LEVEL_SECONDS, sample_rate), wav.shape[-1]))
    stride, offset, total = max(1, size // 2), wav.mean(), wav.shape[-1]
    block = stride * _LEVELS
    for start in range(0, total, block):
        piece = (wav[:, start : start + block + size] - offset).square()
        power = F.avg_pool1d(piece, min(size, piece.shape[-1]), stride, ceil_mode=start + block + size >= total)
        if power.max() >= 10 ** (SILENCE_DB / 10):
            return False
    return True


def speech_spans(wav: Tensor, sample_rate: int, max_seconds: float) -> list[Span]:
    """Where to look for answers in `wav` [1, samples]: (start, end) in samples, in order, none overlapping.

    A clip of up to max_seconds is one span, whole. In a longer one, what silero-vad calls speech is kept with
    PAD_SECONDS on either side, and only the rest is left out. It is parted at every pause longer than
    LONG_PAUSE_SECONDS, then, where a piece exceeds max_seconds, at its longest pause, and where there is no pause, in
    the quietest CUT_SECONDS of the second half of the longest piece possible. [] when there is no speech at all.
    """
    total, limit = wav.shape[-1], int(max_seconds * sample_rate)
    if total <= limit:
        return [(0, total)]
    long_pause = to_samples(LONG_PAUSE_SECONDS, sample_rate)
    spans: list[Span] = []
    pending = [_speech(wav, sample_rate)]  # groups of stretches of speech; the last one is looked at next
    while pending:
        group = pending.pop()
        if not group:
            continue
        start, end = group[0][0], group[-1][1]
        pauses = [after[0] - before[1] for before, after in pairwise(group)]
        longest = max(pauses, default=0)
        if end - start <= limit and longest <= long_pause:
            spans.append((start, end))
        elif pauses:
            cut = 1 + pauses.index(longest)
            pending += [group[cut:], group[:cut]]
        else:
            cut = _quietest(wav, start + limit // 2, start + limit, to_samples(CUT_SECONDS, sample_rate))
            pending += [[(cut, end)], [(start, cut)]]
    return spans


def speech_probabilities(wav: Tensor, sample_rate: int) -> Tensor:
    """silero-vad's probability of speech in each 32 ms of `wav` [1, samples]: float32 [windows].

    Lanes of 10 s go through the detector side by side, each after the 2 s before it: one window after the other, an
    hour of audio would take ten times as long.
    """
    signal = resample(wav[0], sample_rate, _VAD_RATE)  # [samples]
    peak = max(float(signal.max()), -float(signal.min()), 1e-6)
    gain = max(1.0, _MIN_VAD_PEAK / peak)  # it misses faint speech
    windows = -(-len(signal) // _WINDOW)
    length = min(windows, _LANE)
    probabilities = []
    for first in range(0, windows, _LANES * length):  # windows; a few lanes at a time bound the memory
        lanes = min(_LANES, -(-(windows - first) // length))
        start, stop = (first - _WARM_UP) * _WINDOW, (first + lanes * length) * _WINDOW
        piece = gain * F.pad(signal[max(0, start) : stop], (max(0, -start), max(0, stop - len(signal))))
        lane = piece.unfold(0, (_WARM_UP + length) * _WINDOW, length * _WINDOW)  # [lanes, samples]
        with _LOCK, _one_thread(), torch.inference_mode():
            detector = _detector()
            detector.reset_states()
            steps = [detector(lane[:, i : i + _WINDOW], _VAD_RATE) for i in range(0, lane.shape[1], _WINDOW)]
        probabilities.append(torch.cat(steps[_WARM_UP:], dim=1).reshape(-1))  # each step is [lanes, 1]
    return torch.cat(probabilities)[:windows]


def _speech(wav: Tensor, sample_rate: int) -> list[Span]:
    """Padded stretches of speech, in samples, merged where they touch."""
    pad, total = to_samples(PAD_SECONDS, sample_rate), wav.shape[-1]
    stretches: list[Span] = []
    for window in (speech_probabilities(wav, sample_rate) >= THRESHOLD).nonzero().flatten().tolist():
        start = max(0, window * _WINDOW * sample_rate // _VAD_RATE - pad)
        end = min(total, -(-(window + 1) * _WINDOW * sample_rate // _VAD_RATE) + pad)
        if stretches and start <= stretches[-1][1]:
            start = stretches.pop()[0]
        stretches.append((start, end))
    return stretches


def _quietest(wav: Tensor, start: int, end: int, size: int) -> int:
    """The middle of the quietest `size` samples between start and end; strictly between the two."""
    size = max(1, min(size, end - start - 2))
    power = wav[0, start:end].square().double()
    total = F.pad(power.cumsum(0), (1, 0))  # [end - start + 1]
    return start + 1 + int((total[size:] - total[:-size])[1:-1].argmin()) + size // 2


@contextmanager
def _one_thread() -> Iterator[None]:
    """The detector's operations are so small that threads only wait for each other, for minutes on a busy machine."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def _detector() -> Any:
    """silero-vad's network, from its package. The first call sets the process to one thread: silero-vad's import."""
    import_torchaudio()  # the package asks for it
    from silero_vad import load_silero_vad

    return load_silero_vad()
