"""The codecs of transformers behind our contract: tiny models with random weights, saved as transformers saves them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from typer import Typer
from typer.testing import CliRunner

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
from conftest import command
from transformers import (
    AutoModel,
    DacConfig,
    DacModel,
    EncodecConfig,
    EncodecModel,
    MimiConfig,
    MimiModel,
    XcodecConfig,
    XcodecModel,
)

from speechllm.codec import HuggingFaceCodec, HuggingFaceConfig, copy_codec, load_codec, save_codec
from speechllm.errors import InputError
from train import import_codec

N_Q, CARD = 4, 16
HUBERT = {
    "model_type": "hubert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "conv_dim": (8,) * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
TINY: dict[str, Callable[..., Any]] = {
    "mimi": lambda **other: MimiModel(
        MimiConfig(
            hidden_size=16, num_filters=4, codebook_size=CARD, codebook_dim=8, num_quantizers=N_Q,
            vector_quantization_hidden_dimension=8, upsample_groups=16, num_hidden_layers=1, intermediate_size=16,
            num_attention_heads=2, num_key_value_heads=2, sliding_window=20, **other,
        )
    ),
    "dac": lambda **other: DacModel(
        DacConfig(  # 5 among the ratios: the published 16 and 24 kHz models have it, and decode to too few samples
            encoder_hidden_size=4, decoder_hidden_size=16, downsampling_ratios=(2, 4, 5, 8), n_codebooks=N_Q,
            codebook_size=CARD, codebook_dim=4, **other,
        )
    ),
    "encodec": lambda **other: EncodecModel(
        EncodecConfig(
            hidden_size=8, num_filters=4, codebook_size=CARD, num_lstm_layers=1, target_bandwidths=(0.6, 1.2), **other
        )
    ),
    "xcodec": lambda **other: XcodecModel(
        XcodecConfig(
            codebook_size=CARD, target_bandwidths=(0.2, 0.4, 0.8), semantic_model_config=HUBERT,
            acoustic_model_config={
                "model_type": "dac", "encoder_hidden_size": 4, "decoder_hidden_size": 16, "hidden_size": 16,
            },
            **other,
        )
    ),
}  # fmt: skip
RATES = {"mimi": (24000, 1920), "dac": (16000, 320), "encodec": (24000, 320), "xcodec": (16000, 320)}


def noise(samples: int) -> torch.Tensor:
    return 0.1 * torch.randn(1, samples, generator=torch.Generator().manual_seed(1))


def fill(codebooks: Iterable[torch.Tensor], found: torch.Tensor) -> None:
    """Codebooks ``[card, dim]`` that tell embeddings such as ``found`` ``[1, dim, frames]`` apart."""
    for number, codebook in enumerate(codebooks):
        codebook.copy_(2 * found.std(-1) * torch.randn_like(codebook) + found.mean(-1) * (number == 0))


@torch.no_grad()
def tiny(kind: str, **other: Any) -> Any:
    """A model with codebooks as if trained: those of a new one are all zeros."""
    torch.manual_seed(0)
    if kind == "mimi":
        other["frame_rate"] = 12.5  # as the published config has it
    model = TINY[kind](**other).eval()
    for name, buffer in model.named_buffers():
        if name.endswith((".embed", ".embed_sum")):
            buffer.copy_(0.5 * torch.randn_like(buffer))
    if kind == "encodec":  # its embeddings vary by little about their mean
        found = model.encoder(noise(4000).expand(model.config.audio_channels, -1)[None])
        fill((layer.codebook.embed for layer in model.quantizer.layers), found)
    return model


@pytest.fixture(scope="module", params=TINY)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def codec(kind: str) -> HuggingFaceCodec:
    return HuggingFaceCodec(tiny(kind))


@pytest.fixture(scope="module")
def folder(codec: HuggingFaceCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as transformers saves it: no file of ours."""
    path = tmp_path_factory.mktemp("model")
    codec.model.save_pretrained(path)
    return path


def test_numbers(kind: str, codec: HuggingFaceCodec) -> None:
    assert (codec.sample_rate, codec.hop_length) == RATES[kind]
    assert (codec.n_q, codec.card) == (N_Q, CARD)
    assert codec.frame_rate == {"mimi": 12.5, "dac": 50, "encodec": 75, "xcodec": 50}[kind]


@pytest.mark.parametrize("seconds", [0.01, 0.08, 0.5, 1.23])
@pytest.mark.parametrize("more", [0, 1, -1])
def test_contract(codec: HuggingFaceCodec, seconds: float, more: int) -> None:
    wav = noise(round(seconds * codec.sample_rate) + more)
    codes = codec.encode(wav)
    frames = -(-wav.shape[1] // codec.hop_length)
    assert codes.shape == (N_Q, frames)
    assert codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < CARD
    for n_q in range(1, N_Q + 1):
        assert torch.equal(codec.encode(wav, n_q=n_q), codes[:n_q])
        decoded = codec.decode(codes[:n_q])
        assert decoded.shape == (1, frames * codec.hop_length)
        assert decoded.dtype == torch.float32 and decoded.isfinite().all()


def test_codes_vary(codec: HuggingFaceCodec) -> None:
    codes = codec.encode(noise(4 * codec.sample_rate))
    assert min(len(row.unique()) for row in codes) > 3
    assert not torch.equal(codec.decode(codes), codec.decode(codes[:1]))


@torch.inference_mode()
def test_codes_and_sound_are_the_models_own(kind: str, codec: HuggingFaceCodec) -> None:
    model: Any = codec.model
    wav = noise(10 * codec.hop_length - 100)
    whole = F.pad(wav, (0, 100))[None]
    if kind == "mimi":
        codes = model.encode(wav[None]).audio_codes[0]
        sound = model.decode(codes[None]).audio_values[0]
    elif kind == "encodec":
        found = model.encode(wav[None], bandwidth=1.2)
        codes, sound = found.audio_codes[0, 0], model.decode(found.audio_codes, found.audio_scales).audio_values[0]
    else:  # their feature extractors fill up to whole hops
        codes = model.encode(whole).audio_codes[0]
        sound = model.decode(audio_codes=codes[None]).audio_values.reshape(1, -1)
    assert torch.equal(codec.encode(wav), codes)
    decoded = codec.decode(codes)
    missing = decoded.shape[1] - sound.shape[1]
    assert missing == (8 if kind == "dac" else 0)
    assert torch.equal(decoded, F.pad(sound, (0, missing)))


def test_folder_round_trip(codec: HuggingFaceCodec, folder: Path, tmp_path: Path) -> None:
    wav = noise(codec.sample_rate)
    codes = codec.encode(wav)
    save_codec(codec, tmp_path / "codec")
    (tmp_path / "codec" / "README.md").write_text("how good it is")
    copy_codec(tmp_path / "codec", tmp_path / "copy")
    assert not (tmp_path / "copy" / "README.md").exists()
    copy_codec(folder, tmp_path / "other")
    for path in (folder, tmp_path / "codec", tmp_path / "copy", tmp_path / "other"):
        again = load_codec(path)
        assert isinstance(again, HuggingFaceCodec) and not again.training
        assert again.fingerprint(N_Q) == codec.fingerprint(N_Q)
        assert torch.equal(again.encode(wav), codes)
        assert torch.equal(again.decode(codes), codec.decode(codes))
        assert AutoModel.from_pretrained(path).config.model_type == codec.model.config.model_type
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "other" / "config.json").read_text())["kind"] == "huggingface"


def test_half_precision_rounds_parameters_and_no_codebook_statistics(codec: HuggingFaceCodec, tmp_path: Path) -> None:
    save_codec(codec, tmp_path, torch.bfloat16)
    again = load_codec(tmp_path)
    parameters = dict(codec.named_parameters())
    for name, value in again.state_dict().items():
        expected = codec.state_dict()[name]
        assert torch.equal(value, expected.bfloat16().float() if name in parameters else expected), name


def test_fingerprint(kind: str, codec: HuggingFaceCodec) -> None:
    def changed(part: str) -> HuggingFaceCodec:
        model = tiny(kind)
        with torch.no_grad():
            weights = [value for name, value in model.state_dict().items() if name.startswith(part)]
            weights[0].add_(1)
        return HuggingFaceCodec(model)

    codebook_2 = {
        "mimi": "quantizer.acoustic_residual_vector_quantizer.layers.1.codebook.embed_sum",
        "dac": "quantizer.quantizers.2.codebook.weight",
        "encodec": "quantizer.layers.2.codebook.embed",
        "xcodec": "quantizer.quantizers.2.codebook.embed",
    }[kind]
    encoder, decoder = ("acoustic_encoder.", "acoustic_decoder.") if kind == "xcodec" else ("encoder.", "decoder.")
    own = [codec.fingerprint(n_q) for n_q in range(1, N_Q + 1)]
    assert len(set(own)) == N_Q
    assert [changed(decoder).fingerprint(n_q) for n_q in range(1, N_Q + 1)] == own
    assert changed(codebook_2).fingerprint(2) == own[1]
    assert changed(codebook_2).fingerprint(3) != own[2]
    assert changed(encoder).fingerprint(1) != own[0]


@pytest.mark.parametrize("n_q", [0, N_Q + 1])
def test_codebooks_that_are_not_there_are_refused(codec: HuggingFaceCodec, n_q: int) -> None:
    with pytest.raises(InputError, match=f"n_q = {n_q}: this codec has 1 to {N_Q} codebooks"):
        codec.encode(noise(1000), n_q=n_q)


def test_import(codec: HuggingFaceCodec, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "codec"
    said = command(import_codec.main, folder, "--out", out, "--n-q", 3)
    assert f"{out}: {codec.sample_rate} Hz" in said
    assert "3 codebooks of 16 codes" in said
    again, wav = load_codec(out), noise(5000)
    assert again.n_q == 3
    assert torch.equal(again.encode(wav), codec.encode(wav)[:3])
    with pytest.raises(InputError, match="n_q = 4: this codec has 1 to 3 codebooks"):
        again.encode(wav, n_q=4)
    command(import_codec.main, out, "--out", tmp_path / "fewer", "--n-q", 2)
    assert load_codec(tmp_path / "fewer").n_q == 2


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere", [], "nowhere: no such folder, and no name on the hub"),
        ("tests/nowhere", [], "tests/nowhere: no such folder, and no name on the hub"),
        ("encodec_24khz", ["--repository", "."], "name its folder as the repository"),
        ("encodec_24khz", ["--n-q", 33], "n_q = 33: the model has 32 codebooks"),
        ("tests", ["--repository", "."], "--repository is for encodec_24khz alone"),
    ],
)
def test_import_says_what_is_wrong(
    source: str, options: list[object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    refused(message, source, "--out", tmp_path / "codec", *options)
    assert not (tmp_path / "codec").exists()


def refused(message: str, *arguments: object) -> None:
    app = Typer()
    app.command()(import_codec.main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert message in result.output
    assert len(result.output.splitlines()) == 1


def test_import_where_nothing_can_be_written(dac: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused("file: cannot be made (File exists); give another folder", dac, "--out", tmp_path / "file")


def test_import_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refused(f"{tmp_path}: holds a codec or model already", "nowhere", "--out", tmp_path)


@pytest.fixture
def dac(tmp_path: Path) -> Path:
    tiny("dac").save_pretrained(tmp_path / "dac")
    return tmp_path / "dac"


def test_folders_that_cannot_be_used(dac: Path) -> None:
    config, weights = dac / "config.json", dac / "model.safetensors"
    with pytest.raises(InputError, match="n_q = 9: this codec has 1 to 4 codebooks"):
        HuggingFaceCodec.pretrained(dac, HuggingFaceConfig(n_q=9))
    known, content = config.read_text(), load_file(weights)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: save_file(dict(list(content.items())[3:]), weights, {"format": "pt"}), "hold no weights for"),
        (lambda: weights.write_bytes(weights.read_bytes()[:-1000]), "damaged"),
        (lambda: weights.rename(dac / "pytorch_model.bin"), "give a local folder with safetensors"),
        (lambda: config.write_text(known.replace('"dac"', '"bert"')), "'bert' is known; known are mimi, dac, encodec"),
        (lambda: config.write_text(known.replace('"n_codebooks": 4', '"n_codebooks": "four"')), "field 'n_codebooks'"),
        (lambda: config.write_text('{"n_codebooks": 4}'), "unknown kind of codec None; known are speech, encodec, hug"),
        (lambda: config.write_text('{"kind": "huggingface", "n_q": 0}'), "n_q: Input should be greater than"),
        (lambda: config.write_text("["), "not a codec's config"),
        (lambda: config.write_text("[]"), "not a codec's config: no JSON object"),
    ]
    for damage, message in cases:
        damage()
        with pytest.raises(InputError, match=message) as error:
            load_codec(dac)
        assert str(dac) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("encodec", {"audio_channels": 2}, "this encodec is for 2 channels: take a mono one"),
        ("encodec", {"normalize": True}, "codes alone do not give the sound back"),
        ("encodec", {"chunk_length_s": 1.0, "overlap": 0.01}, "codes alone do not give the sound back"),
        ("mimi", {"encoder_config": None}, "without its encoder or decoder"),
    ],
)
def test_models_that_codes_do_not_speak_for_are_refused(
    kind: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny(kind, **settings).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_codec(tmp_path)
    assert str(error.value).startswith(str(tmp_path))


OFFLINE = """
import sys

from speechllm.codec import load_codec
from speechllm.errors import InputError

assert "transformers" not in sys.modules, "importing codecs imports transformers, which takes seconds"
try:
    load_codec("kyutai/mimi")
except InputError as error:
    print(error)
"""


def test_a_name_on_the_hub_without_a_network(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("kyutai/mimi: no such folder, and the codec's files cannot be had (")
    for way_out in ("give a local folder", "hf download NAME --local-dir DIR", "HF_HOME"):
        assert way_out in line
