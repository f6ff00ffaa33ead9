"""The codec contract, on our own codec with random weights and on EnCodec."""

import pytest
import torch
from conftest import filled
from pydantic import ValidationError

from speechllm.codec import Codec, EncodecCodec, EncodecConfig, SpeechCodec, SpeechCodecConfig, load_codec, save_codec
from speechllm.errors import InputError

TINY = SpeechCodecConfig(
    card=16,
    n_acoustic=3,
    dim=16,
    depth=2,
    kernel=5,
    code_dim=4,
    acoustic_dim=16,
    acoustic_depth=1,
    acoustic_code_dim=8,
    decoder_dim=16,
    decoder_depth=1,
)


@pytest.fixture(scope="module")
def codec() -> SpeechCodec:
    torch.manual_seed(0)
    return filled(SpeechCodec(TINY))


@pytest.fixture(scope="module")
def encodec() -> EncodecCodec:
    torch.manual_seed(0)
    return EncodecCodec(EncodecConfig(n_q=4)).eval()


def noise(seconds: float, rate: int) -> torch.Tensor:
    return 0.1 * torch.randn(1, round(seconds * rate), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["codec", "encodec"])
@pytest.mark.parametrize("seconds", [0.01, 0.04, 0.5, 1.23])
def test_contract(name: str, seconds: float, request: pytest.FixtureRequest) -> None:
    codec: Codec = request.getfixturevalue(name)
    wav = noise(seconds, codec.sample_rate)
    codes = codec.encode(wav)
    frames = -(-wav.shape[1] // codec.hop_length)
    assert codes.shape == (codec.n_q, frames)
    assert codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < codec.card
    assert codec.decode(codes).shape == (1, frames * codec.hop_length)
    assert torch.equal(codec.encode(wav, n_q=1), codes[:1])
    assert torch.isfinite(codec.decode(codes[:2])).all()


def test_codes_vary(codec: SpeechCodec) -> None:
    assert len(codec.encode(noise(4, 16000))[0].unique()) > 3


def test_codebook_0_does_not_hear_the_volume(codec: SpeechCodec) -> None:
    wav = noise(4, 16000) * torch.linspace(0.02, 1, 64000)
    codes = codec.encode(wav, n_q=1)
    for decibels in (-20, -1, 1, 12):
        assert (codec.encode(wav * 10 ** (decibels / 20), n_q=1) == codes).float().mean() > 0.98  # all but rounding


@pytest.mark.parametrize("chunk_seconds", [0.04, 0.5, 1.7])
def test_chunk_size_changes_neither_codes_nor_sound(codec: SpeechCodec, chunk_seconds: float) -> None:
    wav = noise(5.37, codec.sample_rate)
    codes = codec.encode(wav)
    assert torch.equal(codec.encode(wav, chunk_seconds=chunk_seconds), codes)
    whole = codec.decode(codes)
    assert torch.allclose(codec.decode(codes, chunk_seconds=chunk_seconds), whole, atol=1e-4 * float(whole.abs().max()))


def test_folder_round_trip(codec: SpeechCodec, tmp_path) -> None:
    save_codec(codec, tmp_path / "codec")
    again = load_codec(tmp_path / "codec")
    assert again.config == codec.config
    assert again.fingerprint(1) == codec.fingerprint(1)
    wav = noise(1, codec.sample_rate)
    codes = codec.encode(wav)
    assert torch.equal(again.encode(wav), codes)
    assert torch.equal(again.decode(codes), codec.decode(codes))


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("semantic.stack", 2),
        ("semantic.output", 0),
        ("acoustic.known", 1),
        ("acoustic.up", 0),
        ("acoustic.spectrum", 0),
    ],
)
def test_fingerprints_are_of_what_makes_the_codes(codec: SpeechCodec, part: str, changes: int) -> None:
    """changes: of how many of the fingerprints of one codebook and of two."""
    other = SpeechCodec(TINY)
    other.load_state_dict(codec.state_dict())
    with torch.no_grad():
        for parameter in other.get_submodule(part).parameters():
            parameter.add_(1)
    assert [other.fingerprint(n_q) != codec.fingerprint(n_q) for n_q in (1, 2)].count(True) == changes
    assert other.fingerprint(1) == codec.fingerprint(1) or changes == 2


def test_no_sound_has_no_codes(codec: SpeechCodec) -> None:
    codes = codec.encode(torch.zeros(1, 0))
    assert (codes.shape, codes.dtype) == ((codec.n_q, 0), torch.int64)
    assert codec.decode(codes).shape == (1, 0)


def test_bad_folders(codec: SpeechCodec, tmp_path) -> None:
    with pytest.raises(InputError, match="not a codec folder"):
        load_codec(tmp_path / "nowhere")
    save_codec(codec, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InputError, match="damaged"):
        load_codec(tmp_path)
    for kind in ('"gramophone"', "[]"):
        (tmp_path / "config.json").write_text(f'{{"kind": {kind}}}')
        with pytest.raises(InputError, match="unknown kind of codec"):
            load_codec(tmp_path)


def test_encodec_names_the_way_out_when_weights_are_missing(tmp_path) -> None:
    with pytest.raises(InputError, match="name its folder as the repository"):
        EncodecCodec.pretrained(EncodecConfig(), tmp_path)


def test_untrained_codebooks_are_refused() -> None:
    with pytest.raises(InputError, match="not trained"):
        SpeechCodec(TINY).eval().encode(noise(1, 16000))


@pytest.mark.parametrize("n_q", [0, 5])
def test_codebooks_that_are_not_there_are_refused(codec: SpeechCodec, encodec: EncodecCodec, n_q: int) -> None:
    for each in (codec, encodec):
        with pytest.raises(InputError, match=f"n_q = {n_q}: this codec has 1 to 4 codebooks"):
            each.encode(noise(1, each.sample_rate), n_q=n_q)


@pytest.mark.parametrize("kernel", [2, 14])
def test_a_block_has_a_frame_in_its_middle(kernel: int) -> None:
    with pytest.raises(ValidationError, match=r"kernel\n.*(odd number|greater than or equal to 3)"):
        SpeechCodecConfig(kernel=kernel)
