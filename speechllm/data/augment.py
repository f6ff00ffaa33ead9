"""Augmentation of log-mel features: cheap stand-ins for other voices, rooms, microphones and noise.

All work on the scaled log-mel of :class:`speechllm.codec.layers.LogMel`, ``[T, n_mels]``, 100 columns a second.
"""

from __future__ import annotations

import math
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from speechllm.codec.layers import FLOOR, scale_log, unscale_log

DB = math.log(10.0) / 10.0  # natural log of a power ratio of 1 dB


def random_rate(rng: Random) -> float:
    """A factor of the length, 1 for half of the draws. One for a whole batch keeps its clips of like length."""
    return rng.uniform(0.8, 1.25) if rng.random() < 0.5 else 1.0


def warp(feature: Tensor, rng: Random, rate: float) -> Tensor:
    """Another speaking rate (time axis) and vocal tract length (mel axis, as in VTLN, Jaitly & Hinton 2013)."""
    columns, bins = feature.shape
    tract = rng.uniform(0.82, 1.2) if rng.random() < 0.7 else 1.0
    if rate == tract == 1.0:
        return feature
    stretched = F.interpolate(feature[None, None], (max(4, round(columns * rate)), bins), mode="bilinear")[0, 0]
    source = torch.arange(bins) * tract
    low = source.floor().clamp(max=bins - 1).long()
    weight = (source - low).clamp(0, 1)
    high = (low + 1).clamp(max=bins - 1)
    return stretched[:, low] * (1 - weight) + stretched[:, high] * weight


def distort(feature: Tensor, rng: Random) -> Tensor:
    """Level, coloured noise, a smeared room tail and band limits, computed on mel powers."""
    power = unscale_log(feature).exp()
    columns, bins = power.shape
    if rng.random() < 0.25:  # late reverberation: exponentially decaying smear of the power
        decay = math.exp(-13.8 * 0.01 / rng.uniform(0.15, 0.6))  # per column, from the time to fall by 60 dB
        kernel = decay ** torch.arange(24.0)
        kernel[1:] *= rng.uniform(0.05, 0.3)
        power = F.conv1d(F.pad(power.T.unsqueeze(1), (23, 0)), kernel.flip(0)[None, None]).squeeze(1).T
    power = power * math.exp(DB * rng.uniform(-12, 8))
    if rng.random() < 0.5:
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        colour = torch.randn(bins // 8, generator=generator).repeat_interleave(8)
        tilt = torch.linspace(0, rng.uniform(-30, 6), bins) + rng.uniform(0, 6) * colour
        noise = (DB * tilt).exp() * torch.empty(columns, bins).exponential_(generator=generator)
        noise *= power.mean() / noise.mean() * math.exp(-DB * rng.uniform(5, 35))
        power = power + noise
    if rng.random() < 0.3:
        power[:, rng.randrange(bins * 5 // 8, bins) :] = 0.0
    return scale_log(power.clamp_min(FLOOR).log())


def mask(feature: Tensor, rng: Random) -> Tensor:
    """SpecAugment (Park et al. 2019): bands and moments replaced by the mean."""
    feature, (columns, bins), mean = feature.clone(), feature.shape, feature.mean()
    for _ in range(2):
        width = rng.randrange(0, 12)
        start = rng.randrange(0, bins - width)
        feature[:, start : start + width] = mean
    for _ in range(columns // 100):
        width = rng.randrange(0, 10)
        start = rng.randrange(0, max(1, columns - width))
        feature[start : start + width] = mean
    return feature


def augment(feature: Tensor, rng: Random, rate: float) -> Tensor:
    """One random variation of ``feature [T, n_mels]``, ``rate`` times as long."""
    return mask(distort(warp(feature, rng, rate), rng), rng)
