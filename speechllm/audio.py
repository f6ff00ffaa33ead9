"""Audio files in and out, resampling, and the conversion between seconds and samples.

Throughout the project `wav` is float32 [channels, samples], nominally within [-1, 1]; what is louder is kept as it is.
"""

import io
import math
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import torch
from torch import Tensor

from speechllm._containers import check_whole, prepare
from speechllm._torchaudio import import_torchaudio
from speechllm.errors import InputError

STDIN = "-"
_BLOCK = 1 << 20  # samples per channel read at a time: mixing down as we read keeps one channel in memory
_SUBTYPES = {".wav": "PCM_16", ".flac": "PCM_16"}
# Entries of the resampling kernel: about the product of the reduced ratio's terms, 700 million for 44101 -> 16000 Hz.
_MAX_KERNEL = 1 << 23
_FILTER_REACH = 8  # samples at the lower of both rates that the filter of `resample` sees to either side, and one more


def to_samples(seconds: float, rate: float) -> int:
    """Seconds -> nearest number of samples at `rate` Hz (or of codec frames at `rate` frames per second)."""
    return round(seconds * rate)


def to_seconds(count: int, rate: float) -> float:
    """Samples at `rate` Hz (or codec frames at `rate` frames per second) -> seconds."""
    return count / rate


def read_audio(source: str | Path | BinaryIO, sample_rate: int) -> Tensor:
    """Everything in an audio file, as one channel at one rate.

    source: a path, an open binary file, or "-" for standard input; wav, flac, ogg, opus, mp3 and what else libsndfile
    reads, at any rate, with any number of channels (their mean is taken).
    Returns float32 [1, samples] at `sample_rate` Hz.
    Raises InputError, naming the file, when it is missing, empty, not audio, cut short, without a sample, or holds NaN
    or infinite samples: nothing is dropped or repaired silently.
    """
    name, file = _locate(source)
    try:
        return _read_mono(file, name, sample_rate)
    except soundfile.LibsndfileError as error:
        raise InputError(
            f"{name}: not audio that can be read ({error.error_string.rstrip('.')}); use wav, flac, ogg, opus or mp3, "
            "or convert it first: ffmpeg -i INPUT output.wav"
        ) from error


def write_audio(path: str | Path, wav: Tensor, sample_rate: int) -> None:
    """Writes wav [channels, samples] as 16-bit PCM, .wav or .flac by the path's suffix; clips what is beyond [-1, 1].

    Raises InputError for another suffix, a path that cannot be written, and NaN or infinite samples.
    """
    path = Path(path)
    subtype = _SUBTYPES.get(path.suffix.lower())
    if subtype is None:
        raise InputError(f"{path}: audio is written as .wav or .flac; end the name with one of them")
    samples = wav.detach().cpu().float()
    if not torch.isfinite(samples).all():
        raise InputError(f"{path}: not written, the audio holds NaN or infinite samples")
    try:
        soundfile.write(str(path), samples.clamp(-1, 1).T.numpy(), sample_rate, subtype=subtype)
    except (soundfile.LibsndfileError, OSError) as error:
        raise InputError(f"{path}: cannot be written ({_reason(error)})") from error


def resample(wav: Tensor, orig_rate: int, new_rate: int) -> Tensor:
    """wav [..., samples] at orig_rate Hz -> [..., ceil(samples * new_rate / orig_rate)] at new_rate Hz, band-limited.

    Rates that share no large factor (44101 and 16000 Hz) go through one Fourier transform of the whole: exact, slower.
    """
    if orig_rate == new_rate or wav.shape[-1] == 0:
        return wav
    ratio = Fraction(new_rate, orig_rate)
    if ratio.numerator * ratio.denominator <= _MAX_KERNEL:
        return import_torchaudio().functional.resample(wav, ratio.denominator, ratio.numerator)
    samples = wav.shape[-1]
    # Whole periods of the ratio make the padded lengths exactly proportional; one more keeps the ends apart.
    periods = math.ceil(samples / ratio.denominator) + 1
    padded, new_padded = periods * ratio.denominator, periods * ratio.numerator
    resampled = torch.fft.irfft(torch.fft.rfft(wav, n=padded), n=new_padded) * (new_padded / padded)
    return resampled[..., : math.ceil(samples * ratio)]


def _locate(source: str | Path | BinaryIO) -> tuple[str, str | BinaryIO]:
    """The name to use in messages, and what soundfile can open: a path, or a seekable file."""
    if not isinstance(source, str | Path):
        name = getattr(source, "name", None)
        name = name if isinstance(name, str) else "the audio given"
        return name, _buffered(name, source)
    if str(source) == STDIN:
        if sys.stdin.isatty():
            raise InputError("standard input is a terminal: pipe audio into it, or name a file")
        return "standard input", _buffered("standard input", sys.stdin.buffer)
    path = Path(source)
    name = str(source)
    try:
        if path.is_dir():
            raise InputError(f"{name}: is a folder, not an audio file")
        if path.suffix.lower() == ".raw":
            raise InputError(f"{name}: raw samples carry no rate or format; convert it to wav first")
        with path.open("rb") as file:
            if not path.is_file():  # a named pipe, /dev/stdin: it can be read once and not rewound
                return name, _buffered(name, file)
            if not file.read(1):
                raise InputError(f"{name}: the file is empty (0 bytes)")
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file") from error
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({_reason(error)})") from error
    return name, name


def _buffered(name: str, file: BinaryIO) -> io.BytesIO:
    content = file.read()
    if not content:
        raise InputError(f"{name}: no audio, the input is empty (0 bytes)")
    return io.BytesIO(content)


def _read_mono(source: str | BinaryIO, name: str, sample_rate: int) -> Tensor:
    """The mean of all channels, float32 [1, samples] at `sample_rate` Hz."""
    source = prepare(source, name)
    with soundfile.SoundFile(source) as file:
        return _resampled(_mono_blocks(file, source, name), file.samplerate, sample_rate).unsqueeze(0)


def _resampled(blocks: Iterator[Tensor], orig_rate: int, new_rate: int) -> Tensor:
    """Blocks [samples] of one recording, together at another rate: what `resample` makes of the whole, to rounding.

    At its own rate, a recording is held for the length of a block only.
    """
    ratio = Fraction(new_rate, orig_rate)
    period, new_period = ratio.denominator, ratio.numerator
    if orig_rate == new_rate or period * new_period > _MAX_KERNEL:
        return resample(torch.cat(list(blocks)), orig_rate, new_rate)
    reach = _FILTER_REACH * (1 + period // new_period)  # samples on either side that a new one depends on
    context = period * -(-reach // period)
    pieces: list[Tensor] = []
    held, lead = torch.zeros(0), 0  # what is still needed; of that, samples that are context alone
    for block in blocks:
        held = torch.cat([held, block])
        stop = lead + max(0, len(held) - lead - context) // period * period
        new = resample(held[: stop + context], orig_rate, new_rate)
        pieces.append(new[lead * new_period // period : stop * new_period // period].clone())
        kept = min(stop, context)
        held, lead = held[stop - kept :], kept
    new = resample(held, orig_rate, new_rate)
    return torch.cat([*pieces, new[lead * new_period // period :]])


def _mono_blocks(file: soundfile.SoundFile, source: str | BinaryIO, name: str) -> Iterator[Tensor]:
    """The mean of all channels, [samples], a block at a time."""
    rate, samples = file.samplerate, 0
    while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
        with np.errstate(over="ignore", invalid="ignore"):
            mono = block.mean(axis=1)
        finite = np.isfinite(mono)
        if not finite.all():
            first = samples + int(np.argmin(finite))
            raise InputError(
                f"{name}: holds NaN or infinite samples, the first at {to_seconds(first, rate):.3f} s; "
                "export the file again"
            )
        samples += len(mono)
        yield torch.from_numpy(mono)
    check_whole(source, file, samples, name)
    if not samples:
        raise InputError(f"{name}: holds 0 samples of audio")


def _reason(error: Exception) -> str:
    """The system's own words for what went wrong, without the path."""
    words = getattr(error, "strerror", None) or getattr(error, "error_string", None) or str(error)
    return str(words).rstrip(".")
