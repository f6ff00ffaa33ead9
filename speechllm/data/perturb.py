"""Perturbation of waveforms: other speakers, rooms, microphones, company and file formats.

Every function takes ``wav [1, samples]`` at ``sample_rate`` Hz and a random state, and returns ``[1, samples]`` (only
:func:`speed` changes the number). What is added is measured against the clip itself, whatever its level.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from random import Random
from typing import Any

import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

from speechllm.audio import resample

MP3_KBITS, OPUS_KBITS = (16, 64), (8, 32)
MP3_DELAY = 576 + 529  # samples, of encoder and decoder
OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
RT60 = (0.15, 0.7)  # seconds: how long a room takes to decay by 60 dB


def _generator(rng: Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.getrandbits(62))


def _rms(wav: Tensor) -> Tensor:
    return wav.square().mean().sqrt().clamp_min(1e-6)


def add_at(wav: Tensor, other: Tensor, snr_db: float) -> Tensor:
    """``wav`` with ``other`` of the same shape ``snr_db`` below it."""
    return wav + other * (_rms(wav) / _rms(other) * 10 ** (-snr_db / 20))


def speed(wav: Tensor, sample_rate: int, rng: Random) -> Tensor:
    """Faster or slower by up to a fifth, and higher or lower with it, as from a smaller or a larger speaker."""
    return resample(wav, sample_rate, round(sample_rate / rng.uniform(0.82, 1.22) / 100) * 100)


def tilt(wav: Tensor, sample_rate: int, rng: Random) -> Tensor:
    """Duller or brighter: a first-order filter."""
    return wav - rng.uniform(-0.4, 0.7) * F.pad(wav, (1, -1))


def level(wav: Tensor, sample_rate: int, rng: Random) -> Tensor:
    """-32 to -14 dBFS rms."""
    return wav * (10 ** (rng.uniform(-32, -14) / 20) / _rms(wav))


def noise(wav: Tensor, sample_rate: int, rng: Random) -> Tensor:
    """White noise 12 to 35 dB below."""
    return add_at(wav, torch.randn(wav.shape, generator=_generator(rng)), rng.uniform(12, 35))


def band_limit(wav: Tensor, sample_rate: int, rng: Random) -> Tensor:
    """Nothing above 3.4 to 7 kHz, nor, half of the time, below 80 to 300 Hz, as over a telephone."""
    spectrum = torch.fft.rfft(wav)
    hertz = torch.linspace(0, sample_rate / 2, spectrum.shape[-1])
    low = rng.uniform(80, 300) if rng.random() < 0.5 else 0.0
    kept = (hertz >= low) & (hertz <= rng.uniform(3400, 7000))
    return torch.fft.irfft(spectrum * kept, wav.shape[-1])


def room(wav: Tensor, sample_rate: int, rng: Random, rt60: float | None = None) -> Tensor:
    """A simulated room: the direct sound and exponentially decaying diffuse noise (Polack 1988), RT60 0.15 to 0.7 s.

    Calls with one ``rt60`` (seconds) put what they are given at different places of the same room.
    """
    if rt60 is None:
        rt60 = rng.uniform(*RT60)
    seconds = torch.arange(round(rt60 * sample_rate)) / sample_rate
    response = torch.randn(seconds.shape, generator=_generator(rng)) * torch.exp(-math.log(1000) / rt60 * seconds)
    response[: round(0.003 * sample_rate)] = 0.0
    response *= 10 ** (-rng.uniform(-2, 15) / 20) / response.square().sum().sqrt()  # direct-to-reverberant ratio
    response[0] = 1.0
    size = wav.shape[-1] + len(response)
    wet = torch.fft.irfft(torch.fft.rfft(wav, size) * torch.fft.rfft(response, size), size)
    return wet[..., : wav.shape[-1]]


def round_trip(wav: Tensor, sample_rate: int, rng: Random) -> Tensor:
    """Written as MP3 or Opus of a low bit rate and read back."""
    if rng.random() < 0.5:
        return compressed(wav, sample_rate, "MP3", rng.uniform(*MP3_KBITS))
    return compressed(wav, sample_rate, "OPUS", rng.uniform(*OPUS_KBITS))


def compressed(wav: Tensor, sample_rate: int, codec: str, kbits: float) -> Tensor:
    """``wav`` through "MP3" or "OPUS" at about ``kbits`` kbit/s. Beyond full scale the file formats clip: not here."""
    if codec == "OPUS" and sample_rate not in OPUS_RATES:
        coded = compressed(resample(wav, sample_rate, max(OPUS_RATES)), max(OPUS_RATES), codec, kbits)
        return resample(coded, max(OPUS_RATES), sample_rate)[:, : wav.shape[-1]]
    mp3 = (8, 160) if sample_rate < 32000 else (32, 320)  # MPEG-2, MPEG-1
    low, high = mp3 if codec == "MP3" else (6, 256)  # what libsndfile's compression levels 1 and 0 mean
    kbits = min(max(kbits, low), high)
    settings: dict[str, Any] = {"format": "OGG", "subtype": "OPUS"}
    if codec == "MP3":
        settings = {"format": "MP3", "bitrate_mode": "CONSTANT"}
    loudest = wav.abs().max().clamp_min(1.0)
    settings["compression_level"] = 0.999 * (high - kbits) / (high - low)
    file = io.BytesIO()
    soundfile.write(file, (wav / loudest)[0].numpy(), sample_rate, **settings)
    file.seek(0)
    read = torch.from_numpy(soundfile.read(file, dtype="float32")[0])[None]
    if codec == "MP3" and read.shape[-1] > wav.shape[-1]:
        read = read[:, MP3_DELAY:]  # LAME leaves no room for the header that tells it where frames are small
    return F.pad(read, (0, max(0, wav.shape[-1] - read.shape[-1])))[:, : wav.shape[-1]] * loudest


def babble(wav: Tensor, others: Callable[[], Tensor], rng: Random) -> Tensor:
    """Three to six other clips, each drawn by ``others``, spoken at once 5 to 20 dB below."""
    crowd = torch.zeros_like(wav)
    for _ in range(rng.randint(3, 6)):
        other = others()
        repeats = -(-wav.shape[-1] // other.shape[-1])
        crowd += (other / _rms(other)).repeat(1, repeats)[:, : wav.shape[-1]].roll(rng.randrange(wav.shape[-1]), 1)
    return add_at(wav, crowd, rng.uniform(5, 20))


def vary(wav: Tensor, sample_rate: int, rng: Random) -> Tensor:
    """``wav`` as if from another speaker, microphone and place: speed, tilt, and by chance the others, then level."""
    wav = tilt(speed(wav, sample_rate, rng), sample_rate, rng)
    for change, share in ((room, 0.2), (noise, 0.4), (band_limit, 0.2), (round_trip, 0.15)):
        if rng.random() < share:
            wav = change(wav, sample_rate, rng)
    return level(wav, sample_rate, rng)
