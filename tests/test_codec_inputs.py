"""The codec on sound as it comes: clipped, silent, offset, at other rates, in stereo, very short, very long."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

from speechllm.audio import read_audio, resample
from speechllm.codec import Codec, load_codec
from speechllm.errors import InputError

ROOT = Path(__file__).parents[1]
FOLDER, CLIP = ROOT / "tokenizers" / "codec", ROOT / "prompts" / "clips" / "transcribe-1.wav"
RATE = 16000


@pytest.fixture(scope="module")
def codec() -> Codec:
    return load_codec(FOLDER)


@pytest.fixture(scope="module")
def speech() -> Tensor:
    return read_audio(CLIP, RATE)


def through_file(wav: Tensor, rate: int, folder: Path) -> Tensor:
    """What the codec gets to see of a file with these samples ``[channels, samples]``."""
    path = folder / "input.wav"
    soundfile.write(path, wav.T.numpy(), rate, subtype="FLOAT")
    return read_audio(path, RATE)


def same(codec: Codec, a: Tensor, b: Tensor) -> float:
    """Share of frames whose code in codebook 0 is the same."""
    return float((codec.encode(a, 1) == codec.encode(b, 1)).float().mean())


# name -> sample rate, what is done to 16 kHz speech [1, samples], share of the codes that must survive it
HARMLESS: dict[str, tuple[int, Callable[[Tensor], Tensor], float]] = {
    "clipped": (RATE, lambda wav: (wav * 2 / wav.abs().max()).clamp(-1, 1), 0.4),
    "DC": (RATE, lambda wav: wav + 0.05, 0.5),
    "8 kHz": (8000, lambda wav: resample(wav, RATE, 8000), 0.5),
    "48 kHz": (48000, lambda wav: resample(wav, RATE, 48000), 0.9),
    "stereo": (RATE, lambda wav: torch.cat([wav * 1.5, wav * 0.5]), 0.95),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_words_survive(codec: Codec, speech: Tensor, name: str, tmp_path: Path) -> None:
    rate, change, least = HARMLESS[name]
    changed = through_file(change(speech), rate, tmp_path)
    shifted = torch.roll(speech, RATE, dims=1)  # as many codes as chance lets agree
    assert same(codec, speech, changed) >= least > same(codec, speech, shifted)
    made = codec.decode(codec.encode(changed))
    assert made.isfinite().all() and made.abs().max() < 4


@pytest.mark.parametrize("level", [0.0, 0.5])
def test_silence_is_coded_as_silence(codec: Codec, level: float, tmp_path: Path) -> None:
    wav = through_file(torch.full((1, 10 * RATE), level), RATE, tmp_path)
    codes = codec.encode(wav)
    assert codes.shape == (codec.n_q, 250)
    inner = codes[0, 90:-90]  # further from the ends than the encoder sees
    assert (inner == inner[0]).all()
    assert codec.decode(codes)[:, 4 * RATE : -4 * RATE].square().mean().sqrt() < 0.05


@pytest.mark.parametrize("samples", [1, 160, 639, 641])
def test_a_moment(codec: Codec, speech: Tensor, samples: int, tmp_path: Path) -> None:
    wav = through_file(speech[:, RATE : RATE + samples], RATE, tmp_path)
    codes = codec.encode(wav)
    assert codes.shape == (codec.n_q, -(-samples // codec.hop_length))
    assert codec.decode(codes).isfinite().all()


def test_nan_is_refused(speech: Tensor, tmp_path: Path) -> None:
    broken = speech.clone()
    broken[0, 1000] = torch.nan
    with pytest.raises(InputError, match=r"input\.wav"):
        through_file(broken, RATE, tmp_path)


def test_codes_do_not_depend_on_the_chunks(codec: Codec, speech: Tensor) -> None:
    wav = speech.repeat(1, 20)
    whole = codec.encode(wav, chunk_seconds=1e6)
    for seconds in (7.0, 60.0):
        assert torch.equal(codec.encode(wav, chunk_seconds=seconds), whole)


HOUR = """
import re, sys
from pathlib import Path
from speechllm.audio import read_audio
from speechllm.codec import load_codec
codec = load_codec(sys.argv[1])
codes = codec.encode(read_audio(sys.argv[2], codec.sample_rate))
# not getrusage: a process begins with the highest mark of the one that started it
print(*codes.shape, re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def test_an_hour_needs_less_than_a_gigabyte(speech: Tensor, tmp_path: Path) -> None:
    hour = F.pad(speech, (0, 10 * RATE - speech.shape[1])).repeat(1, 360)
    soundfile.write(tmp_path / "hour.wav", hour[0].numpy(), RATE, subtype="PCM_16")
    command = [sys.executable, "-c", HOUR, str(FOLDER), str(tmp_path / "hour.wav")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    codebooks, frames, kilobytes = map(int, done.stdout.split())
    assert (codebooks, frames) == (8, 3600 * 25)
    assert kilobytes < 1_000_000, f"{kilobytes / 1e6:.2f} GB"
