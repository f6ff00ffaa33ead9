"""The same number for the same speaker over a whole file, though each of its spans was answered by itself.

The model numbers the speakers of a span anew. When a span is listened to, its voices are measured: one vector for each
quarter of a second, which is all that is kept of its sound. Once the spans are answered, those who speak in them are
compared by their vectors, and grouped. Nothing here is trained. What tells two speakers apart from two sounds of one is
learnt from the file itself: within the turns of one speaker, vectors differ by what is said, and by that they are
scaled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from speechllm._torchaudio import import_torchaudio
from speechllm.audio import to_samples
from speechllm.tasks import Parts, Speaker, Time

WINDOW_SECONDS = 0.25  # shorter ones follow the sounds more than the voice
SIZE = 19  # cepstral coefficients: the shape of the spectrum; that of order 0, the loudness, is left out

# A speaker's mean in a span, once scaled, is taken as his voice plus noise. Variances, in units of that of a window:
_VOICE = 0.4  # between speakers
_TURN = 0.15  # of one speaker between spans, however long he speaks; to this, 1 / windows is added
_MERGE = -12.0  # log-likelihood ratio from which two are one: doubts are better settled by fewer speakers

_HOP_SECONDS, _FFT_SECONDS, _MELS, _TOP_HERTZ = 0.01, 0.032, 40, 7600.0

_Turns = dict[int, list[tuple[float, float]]]  # speaker -> (start, end) in seconds, in order of the first marks


def measure_voices(wav: Tensor, sample_rate: int) -> Tensor:
    """What is kept of `wav` [1, samples] to know its speakers again: float16 [windows, SIZE], a few KB for 10 s.

    Each window is the mean of its mel-frequency cepstral coefficients. A rest shorter than a window is left out, but
    there is always one window.
    """
    loudest = wav.abs().max().clamp_min(1e-9)  # a file may hold samples whose squares overflow
    frames = _mfcc(sample_rate)(wav / loudest)[0, 1:]  # [SIZE, frames]
    length = round(WINDOW_SECONDS / _HOP_SECONDS)
    windows = max(1, frames.shape[1] // length)
    frames = frames[:, : windows * length]
    return frames.unflatten(1, (windows, -1)).mean(2).T.half()


def link_speakers(voices: Sequence[Tensor], answers: Sequence[Parts]) -> list[Parts]:
    """The answers about a file's spans, with speakers numbered over the file, by their first appearance.

    voices: of each span, from :func:`measure_voices`. answers: as the model gave them: times from the start of the
    span, speakers numbered within it. Two speakers of one span stay two. One who never speaks alone for long enough to
    be known joins somebody who fits.
    """
    turns = [_turns(parts) for parts in answers]
    owners = [(span, number) for span, own in enumerate(turns) for number in own]
    if not owners:
        return list(answers)
    means, windows = _means(voices, turns)
    groups = _grouped(means, windows, torch.tensor([span for span, _ in owners]))
    order = {group: number for number, group in enumerate(dict.fromkeys(groups), start=1)}
    numbers = {owner: order[group] for owner, group in zip(owners, groups, strict=True)}
    return [
        tuple(Speaker(numbers[span, part.number]) if isinstance(part, Speaker) else part for part in parts)
        for span, parts in enumerate(answers)
    ]


def _turns(parts: Parts) -> _Turns:
    """Who speaks when in an answer; a turn that has no end is left out, its speaker is not."""
    turns: _Turns = {}
    own: list[tuple[float, float]] = []
    begun: float | None = None
    for part in parts:
        if isinstance(part, Speaker):
            own, begun = turns.setdefault(part.number, []), None
        elif isinstance(part, Time):
            if begun is not None:
                own.append((begun, part.seconds))
            begun = part.seconds if begun is None else None
    return turns


def _means(voices: Iterable[Tensor], turns: Iterable[_Turns]) -> tuple[Tensor, Tensor]:
    """Of each speaker of each span the mean of his windows [speakers, SIZE], and how many these are [speakers].

    Means are centred and scaled: the windows of one speaker in one span have the unit covariance.
    """
    means, counts = [], []
    within, freedom = torch.zeros(SIZE, SIZE, dtype=torch.float64), 0.0  # scatter of windows about their own mean
    for voice, own in zip(voices, turns, strict=True):
        vectors = voice.double()
        for weights in _alone(own, len(voice)):
            count = float(weights.sum())
            mean = weights @ vectors / max(count, 1e-6)
            apart = vectors - mean
            within += (weights[:, None] * apart).T @ apart
            freedom += max(0.0, count - 1)
            means.append(mean)
            counts.append(count)
    windows = torch.tensor(counts, dtype=torch.float64)
    mean = torch.stack(means)
    mean = mean - windows @ mean / windows.sum().clamp_min(1e-6)
    # the fewer the windows, the more does the covariance of all that is there, without correlations, stand in for it
    spread = (within.diagonal() + windows @ mean.square()) / windows.sum().clamp_min(1e-6) + 1e-3
    covariance = (within + SIZE * spread.diag()) / (freedom + SIZE)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), mean.T, upper=False).T, windows


def _alone(turns: Mapping[int, Sequence[tuple[float, float]]], windows: int) -> list[Tensor]:
    """For each speaker, of each window the share in which he speaks, less that in which others do: [windows]."""
    start = torch.arange(windows, dtype=torch.float64) * WINDOW_SECONDS
    shares = torch.zeros(len(turns), windows, dtype=torch.float64)
    for share, own in zip(shares, turns.values(), strict=True):
        for begin, end in own:
            share += ((start + WINDOW_SECONDS).clamp(max=end) - start.clamp(min=begin)).clamp(min=0) / WINDOW_SECONDS
    shares.clamp_(max=1)
    return list((2 * shares - shares.sum(0)).clamp(min=0))


def _grouped(means: Tensor, windows: Tensor, spans: Tensor) -> list[int]:
    """A group for each of the speakers of the spans: agglomerative clustering in the two-covariance model.

    Always the two groups are merged that gain most in likelihood if they are one voice, but never two with speakers
    of the same span.
    """
    weight = windows / (_TURN * windows + 1)  # [n]; 1 / variance of the noise in the mean
    total = means * weight[:, None]  # [n, SIZE]
    apart = spans[:, None] == spans  # [n, n]
    score = _evidence(weight, total.square().sum(1))
    squares = total.square().sum(1)
    gain = _evidence(weight[:, None] + weight, squares[:, None] + squares + 2 * total @ total.T)
    gain = (gain - score[:, None] - score).masked_fill(apart, -torch.inf)
    best, partner = gain.max(1)  # of each row, kept up to date: to look through the whole table takes long
    groups = list(range(len(means)))
    while float(best.max()) >= _MERGE:
        kept = int(best.argmax())
        gone = int(partner[kept])
        groups = [kept if group == gone else group for group in groups]
        weight[kept] += weight[gone]
        total[kept] += total[gone]
        apart[kept] |= apart[gone]
        score[kept] = _evidence(weight[kept], total[kept].square().sum())
        fresh = _evidence(weight + weight[kept], (total + total[kept]).square().sum(1)) - score - score[kept]
        apart[:, kept] = apart[kept]
        gain[kept] = gain[:, kept] = fresh.masked_fill(apart[kept], -torch.inf)
        apart[gone] = apart[:, gone] = True
        gain[gone] = gain[:, gone] = -torch.inf
        stale = (partner == kept) | (partner == gone) | (gain[kept] > best)
        stale[kept] = stale[gone] = True
        best[stale], partner[stale] = gain[stale].max(1)
    return groups


def _evidence(weight: Tensor, square: Tensor) -> Tensor:
    """Log-likelihood of means that share an unknown voice, but for what does not depend on the grouping.

    weight: sum of the weights of the means; square: squared length of the weighted sum of the means.
    """
    return square / (2 * (weight + 1 / _VOICE)) - SIZE / 2 * torch.log1p(_VOICE * weight)


@lru_cache(maxsize=4)
def _mfcc(sample_rate: int) -> torch.nn.Module:
    spectrum = {
        "n_fft": to_samples(_FFT_SECONDS, sample_rate),
        "hop_length": to_samples(_HOP_SECONDS, sample_rate),
        "n_mels": _MELS,
        "f_max": min(_TOP_HERTZ, sample_rate / 2),
        "pad_mode": "constant",  # a clip may be shorter than one frame
    }
    return import_torchaudio().transforms.MFCC(sample_rate, SIZE + 1, melkwargs=spectrum)
