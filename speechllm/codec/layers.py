"""The convolutional pieces of the codec. All are local in time, so long audio can be cut with overlap exactly."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from speechllm._torchaudio import import_torchaudio

N_FFT, WIN_LENGTH, MEL_HOP = 512, 400, 160
FLOOR = 1e-6  # of the mel power; about -90 dBFS for white noise
LEVEL_FLOOR = 1e-3  # of the mel power, about -60 dBFS: below it a clip counts as silent and is not turned up
LEVEL_REACH = 100  # columns on either side among which the loudest sets the level
SILENT = (math.log(FLOOR) + 2.0) / 4.0  # what a column of zeros looks like; see scale_log
RANGE = 11.5  # natural log of the power ratio (50 dB) that is kept below the level


def _odd(kernel: int) -> int:
    if kernel % 2 == 0:
        raise ValueError(f"{kernel} frames have none in the middle: give an odd number")
    return kernel


Kernel = Annotated[int, Field(ge=3, description="frames seen by one block; odd"), AfterValidator(_odd)]


class LogMel(nn.Module):
    """Log-mel spectrogram at ``sample_rate / 160`` columns per second, scaled to about [-2, 2]."""

    def __init__(self, sample_rate: int, n_mels: int):
        super().__init__()
        self.mel = import_torchaudio().transforms.MelSpectrogram(
            sample_rate, N_FFT, WIN_LENGTH, MEL_HOP, n_mels=n_mels, center=False, power=2.0
        )

    def forward(self, wav: Tensor) -> Tensor:  # [B, samples], a multiple of MEL_HOP -> [B, samples / MEL_HOP, n_mels]
        side = (N_FFT - MEL_HOP) // 2  # so that column t is centred on its own hop
        power = self.mel(F.pad(wav, (side, side)))
        return scale_log(power.clamp_min(FLOOR).log()).transpose(1, 2)


def scale_log(log_power: Tensor) -> Tensor:
    """Natural-log mel power to the range the networks see."""
    return (log_power + 2.0) / 4.0


def unscale_log(feature: Tensor) -> Tensor:
    """Inverse of :func:`scale_log`."""
    return feature * 4.0 - 2.0


def relative_to_level(feature: Tensor) -> Tensor:
    """Scaled log-mel ``[B, columns, n_mels]`` with the level of the loudest moment within a second taken off.

    A clip that is played louder or softer gives the same result, down to about -40 dBFS, and what is 50 dB below that
    level is silence.
    """
    log_power = unscale_log(feature)
    energy = log_power.logsumexp(-1).unsqueeze(1) - math.log(feature.shape[-1])  # [B, 1, columns]
    level = F.max_pool1d(energy, 2 * LEVEL_REACH + 1, stride=1, padding=LEVEL_REACH)
    relative = log_power - level.clamp_min(math.log(LEVEL_FLOOR)).transpose(1, 2)
    return (relative.clamp_min(-RANGE) + 4.0) / 4.0


class ConvBlock(nn.Module):
    """Depthwise convolution, then a pointwise MLP, with one residual (ConvNeXt, Liu et al. 2022)."""

    def __init__(self, dim: int, kernel: int, expansion: int):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, (1, kernel), padding=(0, kernel // 2), groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, expansion * dim), nn.GELU(), nn.Linear(expansion * dim, dim))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # [B, T, dim], mask [B, T, 1]
        # conv2d in channels_last runs depthwise kernels about five times faster than conv1d on CPUs
        image = x.transpose(1, 2).unsqueeze(2).contiguous(memory_format=torch.channels_last)
        y = self.depthwise(image).squeeze(2).transpose(1, 2)
        x = x + self.mlp(self.norm(y))
        return x if mask is None else x * mask


class Downsample(nn.Module):
    """Log-mel columns to frames: two convolutions of stride 2 (4 columns of 10 ms make a frame of 40 ms)."""

    FACTOR = 4

    def __init__(self, n_mels: int, dim: int):
        super().__init__()
        self.first = nn.Conv1d(n_mels, dim, 5, stride=2, padding=2)
        self.second = nn.Conv1d(dim, dim, 5, stride=2, padding=2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, mel: Tensor) -> Tensor:  # [B, 4 T, n_mels] -> [B, T, dim]
        x = F.gelu(self.first(mel.transpose(1, 2)))
        return self.norm(F.gelu(self.second(x)).transpose(1, 2))


class ConvStack(nn.Module):
    """A row of :class:`ConvBlock` that keeps padded frames at zero, as beyond the edge of an unpadded clip."""

    def __init__(self, dim: int, depth: int, kernel: int, expansion: int):
        super().__init__()
        self.blocks = nn.ModuleList(ConvBlock(dim, kernel, expansion) for _ in range(depth))
        self.reach = depth * (kernel // 2)  # frames of context on either side

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # [B, T, dim] -> [B, T, dim]
        if mask is not None:
            x = x * mask
        for block in self.blocks:
            x = block(x, mask)
        return x
