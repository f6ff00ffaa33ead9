"""Reading, writing and resampling, with real files of every kind."""

import io
import subprocess
import sys
import threading
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from speechllm import audio
from speechllm.audio import read_audio, resample, to_samples, to_seconds, write_audio
from speechllm.errors import InputError

RATE = 16000
FORMATS = {
    "tone.wav": {"format": "WAV", "subtype": "PCM_16"},
    "tone-8.wav": {"format": "WAV", "subtype": "PCM_U8"},
    "tone-24.wav": {"format": "WAV", "subtype": "PCM_24"},
    "tone-float.wav": {"format": "WAV", "subtype": "FLOAT"},
    "tone-extensible.wav": {"format": "WAVEX", "subtype": "PCM_16"},
    "tone.flac": {"format": "FLAC", "subtype": "PCM_16"},
    "tone-24.flac": {"format": "FLAC", "subtype": "PCM_24"},
    "tone.ogg": {"format": "OGG", "subtype": "VORBIS"},
    "tone.opus": {"format": "OGG", "subtype": "OPUS"},
    "tone.mp3": {"format": "MP3", "subtype": "MPEG_LAYER_III"},
    "tone.aiff": {"format": "AIFF", "subtype": "PCM_16"},
    "tone.w64": {"format": "W64", "subtype": "PCM_16"},
    "tone.rf64": {"format": "RF64", "subtype": "PCM_16"},
    "tone.au": {"format": "AU", "subtype": "PCM_16"},
}


def tone(hertz: float = 440, seconds: float = 1.0, rate: int = RATE, amplitude: float = 0.5) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def loudest_hertz(wav: Tensor, rate: int) -> float:
    """Frequency of the spectrum's highest peak, of wav [1, samples]."""
    spectrum = torch.fft.rfft(wav[0] * torch.hann_window(wav.shape[1])).abs()
    return spectrum.argmax().item() * rate / wav.shape[1]


def encoded(samples: np.ndarray, rate: int = RATE, **options: object) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **({"format": "WAV", "subtype": "PCM_16"} | options))
    return buffer.getvalue()


@pytest.mark.parametrize("name", FORMATS)
def test_reads_every_format(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    soundfile.write(path, tone(), RATE, **FORMATS[name])
    wav = read_audio(path, RATE)
    assert wav.dtype == torch.float32
    assert wav.shape == (1, RATE)
    assert loudest_hertz(wav, RATE) == pytest.approx(440, abs=2)
    assert wav[:, RATE // 4 : -RATE // 4].abs().max().item() == pytest.approx(0.5, abs=0.03)  # opus rings at the end
    assert torch.equal(wav, read_audio(str(path), RATE))
    with path.open("rb") as file:
        assert torch.equal(wav, read_audio(file, RATE))


def test_exact_samples(tmp_path: Path) -> None:
    path = tmp_path / "exact.wav"
    values = np.array([0, 1, -1, 12345, 32767, -32768], dtype=np.int16)
    soundfile.write(path, values, RATE)
    assert torch.equal(read_audio(path, RATE)[0], torch.from_numpy(values.astype(np.float32) / 32768))


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_channels_become_their_mean(channels: int, tmp_path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, (1000, channels)).astype(np.float32)
    path = tmp_path / "many.wav"
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    assert torch.allclose(read_audio(path, RATE)[0], torch.from_numpy(samples.mean(axis=1)), atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 48000, 44101])
def test_any_rate_keeps_pitch_and_duration(rate: int, tmp_path: Path) -> None:
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(rate=rate), rate)
    wav = read_audio(path, RATE)
    assert abs(wav.shape[1] - RATE) <= 1
    assert loudest_hertz(wav, RATE) == pytest.approx(440, abs=2)
    middle = wav[:, RATE // 4 : -RATE // 4]
    assert middle.abs().max().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("rate", [8000, 44100, 8001, 44101, 15999])
def test_resample_follows_the_tone_sample_by_sample(rate: int) -> None:
    given = torch.from_numpy(tone(rate=rate, seconds=5)).unsqueeze(0)
    wanted = torch.from_numpy(tone(rate=RATE, seconds=5)).unsqueeze(0)
    edge = 500
    assert resample(given, rate, RATE).shape == wanted.shape
    assert torch.allclose(resample(given, rate, RATE)[:, edge:-edge], wanted[:, edge:-edge], atol=4e-3)


@pytest.mark.parametrize("rate", [8000, 8001])
def test_resample_removes_what_the_new_rate_cannot_hold(rate: int) -> None:
    given = torch.from_numpy(tone(hertz=7000)).unsqueeze(0)
    assert resample(given, RATE, rate)[:, 500:-500].abs().max().item() < 0.01


def test_resample_shapes() -> None:
    wav = torch.zeros(3, 2, 441)
    assert resample(wav, 44100, RATE).shape == (3, 2, 160)
    assert resample(wav, RATE, RATE) is wav
    assert resample(torch.zeros(1, 0), 44100, RATE).shape == (1, 0)


def test_louder_than_full_scale_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "loud.wav"
    samples = np.array([0.5, 1.75, -3.0], dtype=np.float32)
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    assert read_audio(path, RATE)[0].tolist() == samples.tolist()


def test_longer_than_one_block(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    values = np.random.default_rng(0).integers(-32768, 32767, (1 << 20) + 1234, dtype=np.int16)
    soundfile.write(path, values, RATE)
    assert torch.equal(read_audio(path, RATE)[0], torch.from_numpy(values.astype(np.float32) / 32768))


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 44101])
def test_blocks_are_resampled_as_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int) -> None:
    monkeypatch.setattr(audio, "_BLOCK", 1000)
    for samples in (1, 999, 1000, 12345):
        wav = np.random.default_rng(samples).uniform(-0.5, 0.5, samples).astype(np.float32)
        soundfile.write(tmp_path / "a.wav", wav, rate, subtype="FLOAT")
        for new_rate in (RATE, 24000, 44100):
            whole = resample(torch.from_numpy(wav)[None], rate, new_rate)
            torch.testing.assert_close(read_audio(tmp_path / "a.wav", new_rate), whole, atol=1e-6, rtol=0)


def test_standard_input() -> None:
    code = "from speechllm.audio import read_audio; print(tuple(read_audio('-', 8000).shape)); read_audio('-', 8000)"
    done = subprocess.run([sys.executable, "-c", code], input=encoded(tone()), capture_output=True, check=False)
    assert done.stdout.decode().strip() == "(1, 8000)"
    assert "InputError: standard input: no audio" in done.stderr.decode()  # the second read finds nothing left


def test_stream_that_cannot_be_rewound() -> None:
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    writer = threading.Thread(target=lambda stdin: (stdin.write(encoded(tone())), stdin.close()), args=[process.stdin])
    writer.start()
    with process.stdout as stream:
        assert read_audio(cast(BinaryIO, stream), RATE).shape == (1, RATE)
    writer.join()
    process.wait()


def refusal(source: str | Path | io.BytesIO) -> str:
    with pytest.raises(InputError) as caught:
        read_audio(source, RATE)
    message = str(caught.value)
    assert "\n" not in message
    if isinstance(source, str | Path):
        assert message.startswith(f"{source}: ")
    return message


def test_refuses_what_is_not_there(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.wav")
    assert "is a folder" in refusal(tmp_path)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg", "raw"])
def test_refuses_what_is_not_audio(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text("this is not audio\n" * 50)
    assert ("raw samples" if suffix == "raw" else "not audio") in refusal(path)
    if suffix != "raw":
        path.write_bytes(b"")
        assert "empty (0 bytes)" in refusal(path)


def test_refuses_empty_and_foreign_streams() -> None:
    assert "empty (0 bytes)" in refusal(io.BytesIO())
    assert "not audio" in refusal(io.BytesIO(b"x"))
    assert "not audio" in refusal(io.BytesIO(bytes(1000)))


@pytest.mark.parametrize("name", ["tone.wav", "tone.aiff", "tone.w64"])
def test_refuses_no_samples(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    soundfile.write(path, np.zeros(0, dtype=np.float32), RATE, **FORMATS[name])
    assert "0 samples" in refusal(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channels", [1, 2])
def test_refuses_samples_that_are_no_numbers(value: float, channels: int, tmp_path: Path) -> None:
    samples = np.zeros((2 * RATE, channels), dtype=np.float32)
    samples[24000, -1] = value
    samples[30000, 0] = np.nan
    path = tmp_path / "broken.wav"
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    assert "the first at 1.500 s" in refusal(path)


@pytest.mark.parametrize("name", FORMATS)
def test_refuses_a_file_cut_short(name: str, tmp_path: Path) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
    whole = tmp_path / f"whole-{name}"
    soundfile.write(whole, samples, RATE, **FORMATS[name])
    content = whole.read_bytes()
    assert read_audio(whole, RATE).shape == (1, RATE)
    path = tmp_path / name
    for kept in (len(content) // 2, len(content) * 9 // 10, len(content) - 40):
        path.write_bytes(content[:kept])
        message = refusal(path)
        assert "cut short" in message or "not audio" in message
        refusal(io.BytesIO(content[:kept]))


@pytest.mark.parametrize("announced", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_reads_wav_from_a_program_that_did_not_know_the_length(announced: int) -> None:
    content = encoded(tone())
    at = content.index(b"data") + 4
    size = announced.to_bytes(4, "little")
    streamed = content[:4] + size + content[8:at] + size + content[at + 4 :]
    assert read_audio(io.BytesIO(streamed), RATE).shape == (1, RATE)


@pytest.mark.parametrize("tag", [b"", b"ID3\x04\x00\x00\x00\x00\x01\x0a" + b"Info" + bytes(134)])
@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize("channels", [1, 2])
def test_reads_all_of_an_mp3_that_does_not_say_its_length(tag: bytes, rate: int, channels: int) -> None:
    seconds = 8
    samples = np.random.default_rng(0).normal(0, 0.3, (seconds * rate, channels)).astype(np.float32)
    samples[seconds * rate // 2 :] *= 1e-4  # few bits after many: a guess from the first frame is far too short
    content = encoded(samples, rate, format="MP3", subtype="MPEG_LAYER_III", bitrate_mode="VARIABLE")
    first_frame = content[: content.index(content[:2], 4)]
    assert b"Xing" in first_frame
    bare = content[len(first_frame) :]
    with soundfile.SoundFile(io.BytesIO(bare)) as file:
        assert file.frames < 0.8 * len(samples), "libsndfile no longer guesses: the length header may not be needed"
    for trailer in (b"", b"TAG" + bytes(125)):
        wav = read_audio(io.BytesIO(tag + bare + trailer), rate)
        assert abs(wav.shape[1] - len(samples)) < 2 * 1152
    assert read_audio(io.BytesIO(tag + content), rate).shape == (1, len(samples))
    assert "cut short" in refusal(io.BytesIO(tag + bare[:-10]))


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize(
    "between", [b"", b"TAG" + bytes(125), b"ID3\x04\x00\x00\x00\x00\x01\x0a" + bytes(138), bytes(37)]
)
def test_reads_all_of_mp3s_that_were_joined(mode: str, between: bytes) -> None:
    kind = {"format": "MP3", "subtype": "MPEG_LAYER_III", "bitrate_mode": mode}
    first, second = (encoded(tone(hertz, seconds), **kind) for hertz, seconds in ((300, 2), (800, 3)))
    wav = read_audio(io.BytesIO(first + between + second), RATE)
    assert 5 <= wav.shape[1] / RATE < 5.3, "and the silence that an encoder begins and ends with"
    assert loudest_hertz(wav[:, :RATE], RATE) == pytest.approx(300, abs=2)
    assert loudest_hertz(wav[:, -2 * RATE :], RATE) == pytest.approx(800, abs=2)
    assert "cut short" in refusal(io.BytesIO(first + between + second[:-10]))


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_refuses_oggs_that_were_joined(subtype: str) -> None:
    content = encoded(tone(), format="OGG", subtype=subtype)
    other = encoded(tone(300, 2), format="OGG", subtype=subtype)
    assert "several recordings one after another" in refusal(io.BytesIO(content + other))


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".WAV"])
@pytest.mark.parametrize("channels", [1, 2])
def test_writes_16_bit(suffix: str, channels: int, tmp_path: Path) -> None:
    path = tmp_path / f"out{suffix}"
    wav = torch.from_numpy(np.stack([tone(), -tone(220)])[:channels])
    write_audio(path, wav, 24000)
    info = soundfile.info(path)
    assert (info.samplerate, info.channels, info.frames, info.subtype) == (24000, channels, RATE, "PCM_16")
    back, _ = soundfile.read(path, dtype="float32", always_2d=True)
    assert np.abs(back.T - wav.numpy()).max() <= 1 / 32768


def test_write_clips_and_refuses(tmp_path: Path) -> None:
    write_audio(tmp_path / "loud.wav", torch.tensor([[2.0, -2.0, 0.25]]), RATE)
    assert read_audio(tmp_path / "loud.wav", RATE)[0].tolist() == [32767 / 32768, -1.0, 0.25]
    for path, wav, words in (
        (tmp_path / "a.mp3", torch.zeros(1, 10), ".wav or .flac"),
        (tmp_path / "none" / "a.wav", torch.zeros(1, 10), "cannot be written"),
        (tmp_path / "nan.wav", torch.tensor([[0.0, torch.nan]]), "NaN"),
        (tmp_path / "inf.wav", torch.tensor([[0.0, torch.inf]]), "NaN or infinite"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            write_audio(path, wav, RATE)
        assert str(caught.value).startswith(f"{path}: ")
        assert not path.exists()


def test_seconds_and_samples() -> None:
    assert to_samples(0.1, RATE) == 1600
    assert to_samples(1.00001, RATE) == RATE
    assert to_seconds(24000, RATE) == 1.5
    assert to_seconds(to_samples(2.0, 12.5), 12.5) == 2.0
