"""What surrounds speech in a synthetic corpus: noise, hum, tones, silence, levels."""

from functools import cache
from pathlib import Path

import numpy as np

from speechllm.data.corpus import read_corpus
from speechllm.data.synthesis import SAMPLE_RATE
from speechllm.errors import InputError

MAX_SILENCE = 0.3  # seconds, at each end
PEAK = 0.99


@cache
def recorded_noise(folder: Path) -> tuple[np.ndarray, ...]:
    """The train split of a recorded set of noises, each float32 [samples]; InputError when all is silence."""
    noises = [item.wav(SAMPLE_RATE)[0].numpy() for item in read_corpus([folder], "train", may_be_empty=True)]
    noises = [noise for noise in noises if np.square(noise).mean() > 1e-10]
    if not noises:
        raise InputError(f"{folder}: no audible noise in its train split")
    return tuple(noises)


def background(samples: int, folder: Path | None, rng: np.random.Generator) -> np.ndarray:
    """Noise of rms 1, [samples]: a piece of a recording half of the time when there are any, else white or pink."""
    if folder is not None and rng.random() < 0.5:
        recordings = recorded_noise(folder)
        recording = recordings[int(rng.integers(len(recordings)))]
        noise = np.take(recording, np.arange(samples) + int(rng.integers(len(recording))), mode="wrap")
    else:
        noise = rng.standard_normal(samples)
        if rng.random() < 0.5:  # pink: power falls as 1 / frequency
            spectrum = np.fft.rfft(noise)
            noise = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 1)), samples)
    return noise / max(np.sqrt(np.square(noise).mean()), 1e-6)


def nonspeech(noise: Path | None, rng: np.random.Generator) -> np.ndarray:
    """Up to 8 seconds without speech, [samples]: silence, noise, hum, or tones that come and go like a tune."""
    samples = int(rng.uniform(0.3, 8.0) * SAMPLE_RATE)
    seconds = np.arange(samples) / SAMPLE_RATE
    kind = rng.random()
    if kind < 0.5:
        wav = background(samples, noise, rng)
    elif kind < 0.65:
        wav = sum(np.sin(2 * np.pi * 50.0 * n * seconds) / n for n in range(1, 6)) + 0.1 * rng.standard_normal(samples)
    elif kind < 0.9:
        notes = 220 * 2 ** (
            rng.integers(0, 25, 1 + samples // 4000) / 12
        )  # semitones of two octaves, a quarter second each
        pitch = np.repeat(notes, 4000)[:samples]
        phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
        wav = np.sin(phase) + 0.5 * np.sin(2 * phase) + 0.02 * rng.standard_normal(samples)
    else:
        return rng.standard_normal(samples) * 10 ** (rng.uniform(-100, -60) / 20)
    wav = wav / np.sqrt(np.square(wav).mean()) * 10 ** (rng.uniform(-55, -18) / 20)
    return wav * min(1.0, PEAK / np.abs(wav).max())


def room_for(
    speech: np.ndarray, level_db: float, snr_db: float | None, noise: Path | None, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """`speech` [samples] at a level, with silence around it and noise over all, and the sample at which it starts.

    Scaled down rather than clipped.
    """
    rms = 10 ** (level_db / 20)
    speech = speech * (rms / np.sqrt(np.square(speech).mean()))
    before, after = (int(seconds * SAMPLE_RATE) for seconds in rng.uniform(0, MAX_SILENCE, 2))
    wav = np.pad(speech, (before, after))
    if snr_db is not None:
        wav = wav + background(len(wav), noise, rng) * rms * 10 ** (-snr_db / 20)
    return wav * min(1.0, PEAK / np.abs(wav).max()), before
