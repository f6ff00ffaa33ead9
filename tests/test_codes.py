"""`speechllm codes`: the files of codes, and the commands that make, read, count and draw them."""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import filled
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from serve.cli import app
from serve.codes import code_numbers, codec_numbers
from serve.codes_plot import draw
from speechllm.audio import read_audio
from speechllm.codec import SpeechCodec, SpeechCodecConfig, save_codec
from speechllm.codec.files import load_codes, save_codes
from speechllm.errors import InputError

TINY = SpeechCodecConfig(
    card=16, n_acoustic=2, dim=16, depth=2, kernel=5, code_dim=4, acoustic_dim=16, acoustic_depth=1, decoder_dim=16,
    decoder_depth=1,
)  # fmt: skip
HOP = 640


def make_codec(seed: int) -> SpeechCodec:
    torch.manual_seed(seed)
    return filled(SpeechCodec(TINY))


@pytest.fixture(scope="module")
def codec() -> SpeechCodec:
    return make_codec(0)


@pytest.fixture(scope="module")
def folder(codec: SpeechCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codec")
    save_codec(codec, folder)
    return folder


def noise(samples: int, channels: int = 1) -> np.ndarray:
    return 0.1 * np.random.default_rng(samples).standard_normal((samples, channels)).astype(np.float32)


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["codes", *map(str, arguments)])
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(words: str, *arguments: object) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1, result.stderr
    assert words in result.stderr


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "clip.wav", noise(20000), 16000)
    return tmp_path / "clip.wav"


@pytest.fixture
def codes(clip: Path, folder: Path) -> Path:
    assert run("encode", clip, "--codec", folder).exit_code == 0
    return clip.with_name("clip.codes.safetensors")


@pytest.mark.parametrize(
    ("samples", "rate", "channels", "expected"),
    [
        (1, 16000, 1, 1),
        (HOP - 1, 16000, 1, HOP - 1),
        (HOP, 16000, 1, HOP),
        (HOP + 1, 16000, 1, HOP + 1),
        (12345, 16000, 1, 12345),
        (5001, 8000, 1, 10002),
        (48001, 48000, 2, 16001),
    ],
)
def test_nothing_is_lost_or_added(
    tmp_path: Path, folder: Path, codec: SpeechCodec, samples: int, rate: int, channels: int, expected: int
) -> None:
    clip, made, back = tmp_path / "a.wav", tmp_path / "b.codes.safetensors", tmp_path / "c.wav"
    soundfile.write(clip, noise(samples, channels), rate)
    assert run("encode", clip, "-o", made, "--codec", folder).exit_code == 0
    wav = read_audio(clip, 16000)
    frames = -(-expected // HOP)
    stored, count = load_codes(made, codec)
    assert torch.equal(stored, codec.encode(wav)) and stored.shape == (3, frames)
    assert count == wav.shape[1] == expected
    result = run("decode", made, "-o", back, "--codec", folder)
    assert result.stdout == f"{back}: {expected / 16000:.3f} s at 16000 Hz\n"
    sound, back_rate = soundfile.read(back, dtype="float32")
    assert (len(sound), back_rate) == (expected, 16000)
    rebuilt = codec.decode(stored)[0, :expected].clamp(-1, 1)
    assert np.abs(sound - rebuilt.numpy()).max() < 1e-4


def test_the_file_says_what_made_it(codes: Path, codec: SpeechCodec) -> None:
    with safe_open(codes, framework="pt") as file:
        assert list(file.keys()) == ["codes"]
        assert file.get_tensor("codes").dtype == torch.int16
        assert file.metadata() == {
            "format": "speechllm.codes", "version": "1", "codec": codec.fingerprint(3), "sample_rate": "16000",
            "hop_length": "640", "card": "16", "samples": "20000",
        }  # fmt: skip


def test_many_codes_take_more_room(tmp_path: Path) -> None:
    big = make_codec(0)
    big.card = 40000
    made = torch.tensor([[0, 39999, 32768]])
    save_codes(tmp_path / "a.safetensors", made, 1900, big)
    assert load_file(tmp_path / "a.safetensors")["codes"].dtype == torch.int32
    again, samples = load_codes(tmp_path / "a.safetensors", big)
    assert torch.equal(again, made) and again.dtype == torch.int64 and samples == 1900


def test_some_codebooks(clip: Path, codes: Path, folder: Path, codec: SpeechCodec) -> None:
    every, _ = load_codes(codes, codec)
    first = clip.with_name("first.codes.safetensors")
    result = run("encode", clip, "-o", first, "--codec", folder, "--n-q", 1)
    assert result.stdout == f"{first}: 1.250 s, 32 frames, 1 codebook\n"
    alone, samples = load_codes(first, codec)
    assert torch.equal(alone, every[:1]) and samples == 20000
    for source, name in ((codes, "a.wav"), (first, "b.wav")):
        options = ("--n-q", 1, "-o", clip.with_name(name), "--codec", folder)
        assert run("decode", source, *options).exit_code == 0
    assert clip.with_name("a.wav").read_bytes() == clip.with_name("b.wav").read_bytes()
    refused("holds 1 codebook", "decode", first, "--n-q", 2, "-o", clip.with_name("c.wav"), "--codec", folder)
    refused("1 to 3 codebooks", "encode", clip, "--n-q", 4, "-o", clip.with_name("d.safetensors"), "--codec", folder)


def test_codes_outlive_what_does_not_make_them(codes: Path, clip: Path, codec: SpeechCodec) -> None:
    other = make_codec(0)
    with torch.no_grad():
        other.acoustic.up.weight.add_(1)
    assert load_codes(codes, other)[0].shape[0] == codec.n_q
    with torch.no_grad():
        other.acoustic.known.weight.add_(1)
    first = clip.with_name("first.safetensors")
    save_codes(first, codec.encode(read_audio(clip, 16000), 1), 20000, codec)
    assert load_codes(first, other)[0].shape == (1, 32)
    with pytest.raises(InputError, match="another codec"):
        load_codes(codes, other)


def test_another_codec_is_refused(codes: Path, tmp_path: Path, codec: SpeechCodec) -> None:
    other = make_codec(1)
    save_codec(other, tmp_path / "other")
    for words in (codec.fingerprint(3), other.fingerprint(3), "--codec"):
        refused(words, "decode", codes, "-o", tmp_path / "b.wav", "--codec", tmp_path / "other")
    refused("another codec", "info", codes, "--codec", tmp_path / "other")
    smaller = filled(SpeechCodec(TINY.model_copy(update={"n_acoustic": 1})))
    with pytest.raises(InputError, match="another codec"):
        load_codes(codes, smaller)
    assert not (tmp_path / "b.wav").exists()


def rewritten(codes: Path, tensor: torch.Tensor | None = None, **metadata: str | None) -> Path:
    """A copy with another tensor or other metadata (None: without it)."""
    with safe_open(codes, framework="pt") as file:
        said = file.metadata() | metadata
        stored = file.get_tensor("codes") if tensor is None else tensor
    copy = codes.with_name("copy.safetensors")
    save_file({"codes": stored}, copy, {name: value for name, value in said.items() if value is not None})
    return copy


def test_damaged_files_are_refused(codes: Path, folder: Path) -> None:
    content = codes.read_bytes()
    damaged = codes.with_name("damaged.safetensors")
    for piece in (b"", content[:4], content[: len(content) // 2], content[:-1], content + b"\0", b"no codes" * 50):
        damaged.write_bytes(piece)
        refused(f"{damaged}: damaged", "decode", damaged, "--codec", folder)
    size = struct.unpack("<Q", content[:8])[0]
    damaged.write_bytes(content[: 8 + size] + b"\xff\x7f" + content[10 + size :])
    refused("a code is outside [0, 16)", "decode", damaged, "--codec", folder)
    good = torch.zeros(3, 32, dtype=torch.int16)
    for tensor in (good.float(), good.int(), good[0].contiguous(), good[:, :0].contiguous()):
        refused("damaged: its codes are", "decode", rewritten(codes, tensor), "--codec", folder)
    refused("20000 samples do not take 31", "decode", rewritten(codes, good[:, :31].contiguous()), "--codec", folder)
    refused("1 samples do not take 32", "decode", rewritten(codes, good, samples="1"), "--codec", folder)
    refused("outside [0, 16)", "decode", rewritten(codes, good - 1), "--codec", folder)
    for name, value in (("samples", None), ("samples", "0"), ("hop_length", "many"), ("colour", "red")):
        refused(f"damaged metadata: {name}", "decode", rewritten(codes, **{name: value}), "--codec", folder)
    refused("another codec", "decode", rewritten(codes, sample_rate="8000"), "--codec", folder)
    refused("format version 2", "decode", rewritten(codes, version="2"), "--codec", folder)
    assert run("decode", rewritten(codes, good), "--codec", folder).exit_code == 0


def test_what_is_no_file_of_codes(codes: Path, clip: Path, folder: Path) -> None:
    there = ("-o", clip.with_name("b.wav"), "--codec", folder)
    refused("not one of codes", "decode", folder / "model.safetensors", *there)
    refused("not one of codes", "decode", rewritten(codes, format=None), *there)
    refused("not a file of codes", "decode", clip, *there)
    refused("no such file", "decode", clip.with_name("missing.safetensors"), *there)
    refused("not a file", "decode", folder, *there)
    refused("cannot be", "decode", "x" * 300 + ".safetensors", *there)
    refused("not audio", "encode", codes, "-o", clip.with_name("b.safetensors"), "--codec", folder)
    refused("no such file", "encode", clip.with_name("missing.wav"), "--codec", folder)
    refused("not a codec folder", "info", "--codec", clip.with_name("nowhere"))


def test_nothing_is_overwritten_unasked(clip: Path, codes: Path, folder: Path) -> None:
    original, made = clip.read_bytes(), codes.read_bytes()
    refused("exists already", "encode", clip, "--codec", folder)
    assert run("decode", codes, "--codec", folder).exit_code == 0
    decoded = clip.with_name("clip.decoded.wav")
    sound = decoded.read_bytes()
    decoded.write_bytes(b"mine")
    refused(f"{decoded}: exists already", "decode", codes, "--codec", folder)
    assert (clip.read_bytes(), codes.read_bytes(), decoded.read_bytes()) == (original, made, b"mine")
    assert run("decode", codes, "--codec", folder, "--force").exit_code == 0
    assert decoded.read_bytes() == sound
    picture = clip.with_suffix(".png")
    picture.touch()
    refused("exists already", "plot", clip, "--codec", folder)
    refused("is the input", "decode", codes.rename(clip.with_name("c.wav")), "-o", clip.with_name("c.wav"), "--force")
    assert picture.read_bytes() == b""


def test_outputs_that_cannot_be(clip: Path, codes: Path, tmp_path: Path) -> None:
    (tmp_path / "f.safetensors").mkdir()
    refused("is a folder", "encode", clip, "-o", tmp_path / "f.safetensors", "--force")
    refused("no folder", "encode", clip, "-o", tmp_path / "nowhere" / "a.safetensors")
    refused("must end in .safetensors", "encode", clip, "-o", tmp_path / "a.codes")
    refused("must end in .wav or .flac", "decode", codes, "-o", tmp_path / "a.mp3")
    refused("must end in .png", "plot", clip, "-o", tmp_path / "a.jpg")
    refused("cannot be written", "encode", clip, "-o", tmp_path / ("x" * 300 + ".safetensors"))
    refused("name the output with -o", "encode", "-")
    refused("not the name of a file", "encode", "")


def test_numbers_by_hand() -> None:
    codes = torch.tensor([[5, 5, 1, 1, 5, 5, 1, 1], [0, 1, 2, 3, 4, 5, 6, 7], [9] * 8, [0, 0, 0, 0, 0, 0, 1, 2]])
    said = code_numbers(codes, frame_rate=25.0)
    assert said["frames"] == 8
    assert [book["distinct"] for book in said["codebooks"]] == [2, 8, 1, 3]
    # the last: 6/8 log2(8/6) + 2/8 log2(8) = 0.75 * 0.415037 + 0.75
    bits = [1.0, 3.0, 0.0, 1.0612781]
    assert [book["entropy_bits_per_second"] for book in said["codebooks"]] == pytest.approx([25 * b for b in bits])
    assert [book["perplexity"] for book in said["codebooks"]] == pytest.approx([2.0, 8.0, 1.0, 2.0867783])
    assert said["entropy_bits_per_second"] == pytest.approx(25 * sum(bits))
    assert said["merged_codes_per_second"] == pytest.approx(4 / (8 / 25))


def test_info_of_the_codec(codec: SpeechCodec, folder: Path) -> None:
    said = json.loads(run("info", "--codec", folder, "--format", "json").stdout)
    assert said == {"codec": codec_numbers(codec)}
    numbers = said["codec"]
    assert [numbers[name] for name in ("sample_rate", "hop_length", "frame_rate", "n_q", "card")] == [
        16000, 640, 25.0, 3, 16,
    ]  # fmt: skip
    assert numbers["bits_per_second"] == 3 * 4 * 25
    assert numbers["parameters"] == sum(p.numel() for p in codec.parameters()) < numbers["bytes"] / 4
    assert (numbers["fingerprint"], numbers["fingerprint_codebook_0"]) == (codec.fingerprint(3), codec.fingerprint(1))
    text = run("info", "--codec", folder).stdout
    for words in ("16000 Hz", "25 frames a second", "3 of 16 codes", "300 bits a second", codec.fingerprint(3)):
        assert words in text


def test_info_of_a_file(clip: Path, codes: Path, codec: SpeechCodec, folder: Path) -> None:
    answers = [json.loads(run("info", file, "--codec", folder, "-f", "json").stdout) for file in (clip, codes)]
    assert [answer["file"].pop("file") for answer in answers] == [str(clip), str(codes)]
    assert answers[0] == answers[1]
    stored, _ = load_codes(codes, codec)
    assert answers[0]["file"] == {"seconds": 1.25} | code_numbers(stored, 25.0)
    lines = run("info", codes, "--codec", folder).stdout.splitlines()
    assert next(line for line in lines if line.startswith("seconds")).split() == ["seconds", "1.250"]
    assert len([line for line in lines if line.startswith("codebook ") and "perplexity" in line]) == 3


def test_plot_writes_a_picture(clip: Path, folder: Path) -> None:
    result = run("plot", clip, "--codec", folder, "--start", 0.5)
    picture = clip.with_suffix(".png")
    assert (result.exit_code, result.stdout) == (0, f"{picture}: 0.50-1.25 s of 1.25 s\n")
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:]) == (1320, 880)
    there = ("--codec", folder, "-o", clip.with_name("b.png"))
    refused("is 1.25 s long", "plot", clip, *there, "--start", 1.25)
    refused("is 1.25 s long", "plot", clip, *there, "--start", "nan")
    refused("more than 0", "plot", clip, *there, "--seconds", 0)
    odd = clip.rename(clip.with_name("a $\\frac{ 音 \n.wav"))
    assert run("plot", odd, *there).exit_code == 0


def test_axes_of_the_picture(codec: SpeechCodec) -> None:
    wav = torch.from_numpy(noise(30 * 16000 + 100)).T
    figure = draw(wav, codec, "a.wav", n_q=2, start=12.3, seconds=4.1)
    original, rebuilt, drawn = figure.axes[:3]
    assert figure.get_suptitle().startswith("a.wav: 12.30-16.40 s of 30.01 s; 25 frames a second, 2 codebooks")
    figure.draw_without_rendering()
    assert len({(axis.get_position().x0, axis.get_position().x1) for axis in figure.axes[:3]}) == 1
    for axis in (original, rebuilt, drawn):
        assert axis.get_xlim() == pytest.approx((12.3, 16.4))
    (one,), (two,), (image,) = original.images, rebuilt.images, drawn.images
    assert one.get_clim() == two.get_clim() == (-80, 0)
    assert max(picture.get_array().max() for picture in (one, two)) == 0
    assert one.get_extent() == two.get_extent()
    # 12.3 s lies in frame 307, 16.4 s ends with frame 409
    assert image.get_extent() == pytest.approx([307 / 25, 410 / 25, 1.5, -0.5])
    assert np.array_equal(image.get_array(), codec.encode(wav, 2)[:, 307:410].numpy())
    assert image.get_clim() == (0, 15)
    left, right, bottom, top = one.get_extent()
    assert (left, bottom, top) == pytest.approx((307 / 25 - 0.004, 0, 8))
    assert right == pytest.approx(410 / 25 + 0.004)


def test_a_click_is_drawn_where_it_is(codec: SpeechCodec) -> None:
    wav = torch.zeros(1, 20 * 16000)
    wav[0, round(13.5 * 16000)] = 1.0
    (image,) = draw(wav, codec, "a.wav", start=12.0, seconds=5.0).axes[0].images
    picture, (left, right, _, _) = image.get_array(), image.get_extent()
    column = int(picture.sum(axis=0).argmax())
    assert left + (column + 0.5) * (right - left) / picture.shape[1] == pytest.approx(13.5, abs=0.0081)


def test_plot_of_everything_up_to_the_end(codec: SpeechCodec) -> None:
    wav = torch.from_numpy(noise(HOP * 10 + 1)).T
    figure = draw(wav, codec, "a.wav", seconds=float("inf"))
    (image,) = figure.axes[2].images
    assert image.get_array().shape == (3, 11)
    assert figure.axes[2].get_xlim() == pytest.approx((0, wav.shape[1] / 16000))
    draw(wav[:, :1], codec, "a.wav")


def test_plot_says_which_package_is_missing(clip: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # Python's own way to make an import fail
    refused("pip install matplotlib", "plot", clip, "--codec", folder)
