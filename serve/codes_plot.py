"""The picture of `speechllm codes plot`: a recording, its reconstruction, and the codes between them."""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

from speechllm.codec import Codec
from speechllm.errors import InputError

# Encoded on either side of the window. Where a codec looks no further, the window's codes are those of the whole file.
CONTEXT_SECONDS = 10.0
DYNAMIC_RANGE_DB = 80.0


def draw(
    wav: Tensor, codec: Codec, name: str, *, n_q: int | None = None, start: float = 0.0, seconds: float = 30.0
) -> Figure:
    """Spectrograms of ``wav [1, samples]`` and of its reconstruction, on one scale, and the codes, time in seconds.

    Raises:
        InputError: the window begins outside the recording, or is empty.
    """
    rate, hop, length = codec.sample_rate, codec.hop_length, wav.shape[1] / codec.sample_rate
    if not 0 <= start < length:
        raise InputError(f"--start {start:g}: {name} is {length:.2f} s long; begin within it")
    if not seconds > 0:
        raise InputError(f"--seconds {seconds:g}: must be more than 0")
    end = min(start + seconds, length)
    begin = max(0, math.floor((start - CONTEXT_SECONDS) * codec.frame_rate))  # first frame that is encoded
    piece = wav[:, begin * hop : math.ceil((end + CONTEXT_SECONDS) * codec.frame_rate) * hop]
    codes = codec.encode(piece, n_q)
    first = math.floor(start * codec.frame_rate)  # first frame, of the whole file, that is seen
    frames = slice(first - begin, min(codes.shape[1], math.ceil(end * codec.frame_rate) - begin))
    samples = slice(frames.start * hop, frames.stop * hop)
    rebuilt = codec.decode(codes)[:, : piece.shape[1]]
    codes = codes[:, frames]
    origin, last = first / codec.frame_rate, (begin + frames.stop) / codec.frame_rate
    pictures = [_decibels(sound[0, samples], rate) for sound in (piece, rebuilt)]  # [bins, columns]
    loudest = max(float(picture.max()) for picture in pictures)

    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": [2, 2, max(1.0, 0.25 * len(codes))]})
    for axis, picture, title in zip(axes[:2], pictures, ("original", "reconstruction"), strict=True):
        column = _spectrum_hop(rate) / rate  # seconds; column k is centred at k columns
        image = axis.imshow(
            (picture - loudest).numpy(),
            origin="lower",
            aspect="auto",
            cmap="magma",
            extent=(origin - column / 2, origin + (picture.shape[1] - 0.5) * column, 0, rate / 2000),
            vmin=-DYNAMIC_RANGE_DB,
            vmax=0,
        )
        axis.set(title=title, ylabel="kHz")
    figure.colorbar(image, ax=axes[:2], label="dB below the loudest", pad=0.01)
    colours = axes[2].imshow(
        codes.numpy(),
        aspect="auto",
        cmap="turbo",
        interpolation="nearest",  # between two codes lies no third
        extent=(origin, last, len(codes) - 0.5, -0.5),
        vmin=0,
        vmax=codec.card - 1,
    )
    figure.colorbar(colours, ax=axes[2], label="code", pad=0.01)
    axes[2].set(title="codes", ylabel="codebook", xlabel="seconds", yticks=range(len(codes)), xlim=(start, end))
    codebooks = f"{len(codes)} codebook{'' if len(codes) == 1 else 's'} of {codec.card} codes"
    figure.suptitle(
        f"{name}: {start:.2f}-{end:.2f} s of {length:.2f} s; {codec.frame_rate:g} frames a second, {codebooks}",
        parse_math=False,  # a file's name may hold $
    )
    return figure


def _spectrum_hop(rate: int) -> int:
    return max(1, round(0.008 * rate))


def _decibels(samples: Tensor, rate: int) -> Tensor:
    """``[samples]`` to the power of windows of 32 ms in dB, ``[bins, columns]``: column k is centred at k * 8 ms."""
    size = 4 * _spectrum_hop(rate)
    spectrum = torch.stft(
        samples, size, size // 4, window=torch.hann_window(size), pad_mode="constant", return_complex=True
    )
    return 10 * spectrum.abs().square().clamp_min(1e-10).log10()
