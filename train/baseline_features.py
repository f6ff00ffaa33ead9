"""What a clip sounds like in a few hundred numbers: statistics of its spectrum, loudness and pitch.

The recipe of openSMILE's sets (Eyben et al. 2010), on which emotion has long been told with support vector machines:
descriptors of short frames, and of each the same statistics over the clip.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speechllm._torchaudio import import_torchaudio
from train.codec_traits import pitch

RATE = 16000  # Hz
HOP, WINDOW = 160, 400  # samples: a frame every 10 ms, of 25 ms
MELS, CEPSTRA = 26, 13
PERCENTS = (0.05, 0.25, 0.5, 0.75, 0.95)
STATISTICS = 2 + len(PERCENTS) + 1
SIZE = STATISTICS * (2 * (CEPSTRA + 1) + 2) + 3
LEVEL = 0.05  # root mean square that every clip is brought to: how far a microphone was turned up tells nothing
_FLOOR = 1e-10  # mean square (-100 dBFS): nothing is quieter


def features(wav: Tensor) -> Tensor:
    """Statistics of ``wav`` ``[1, samples]`` at RATE: float32 ``[SIZE]``, finite for any clip.

    Of cepstra and log energy, and how they change: mean, deviation, percentiles and slope over the clip; the same of
    pitch (octaves) and its change where there is a voice; how much of the clip is voiced, and in how many stretches a
    second, and how long they are.
    """
    samples = max(WINDOW, wav.shape[-1])
    wav = LEVEL * wav / wav.square().mean().clamp_min(_FLOOR).sqrt()
    wav = F.pad(wav, (0, -(-samples // HOP) * HOP - wav.shape[-1]))
    cepstra = _mfcc()(wav)[0, :, : wav.shape[-1] // HOP]  # [CEPSTRA, frames]
    energy = wav.unflatten(-1, (-1, HOP)).square().mean(-1).clamp_min(_FLOOR).log()  # [1, frames]
    frames = torch.cat([cepstra, energy])
    frames = torch.cat([frames, _change(frames)])  # [2 * (CEPSTRA + 1), frames]
    hertz, voiced = pitch(wav, RATE, HOP)
    voiced = voiced[0]
    octaves = hertz.log2()
    voices = torch.cat([octaves, _change(octaves)])[:, voiced]  # [2, voiced frames]
    begins = int((voiced & ~F.pad(voiced, (1, 0))[:-1]).sum())
    seconds = len(voiced) * HOP / RATE
    rhythm = torch.tensor([float(voiced.float().mean()), begins / seconds, int(voiced.sum()) / max(1, begins)])
    return torch.cat([_statistics(frames), _statistics(voices), rhythm])


def _statistics(rows: Tensor) -> Tensor:
    """STATISTICS of each of ``rows`` ``[n, frames]``, one after the other; zeros where there is no frame."""
    count = rows.shape[1]
    if count == 0:
        return torch.zeros(len(rows) * STATISTICS)
    time = torch.linspace(-1, 1, count) if count > 1 else torch.zeros(1)
    slope = rows @ time / time.square().sum().clamp_min(1e-9)  # the line that fits best, per half a clip
    percentiles = rows.quantile(torch.tensor(PERCENTS), dim=1)  # [PERCENTS, n]
    return torch.stack([rows.mean(1), rows.std(1, correction=0), *percentiles, slope], dim=1).flatten()


def _change(rows: Tensor) -> Tensor:
    """Slope of ``rows`` ``[n, frames]`` over the five frames around each."""
    deltas: Tensor = import_torchaudio().functional.compute_deltas(rows)
    return deltas


@cache
def _mfcc() -> Any:
    spectra = {"n_fft": 512, "win_length": WINDOW, "hop_length": HOP, "n_mels": MELS}
    return import_torchaudio().transforms.MFCC(RATE, CEPSTRA, log_mels=True, melkwargs=spectra)
