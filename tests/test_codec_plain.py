"""The codec trained for reconstruction alone: its quantiser, training through the command, resuming, what is saved."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command, write_yaml
from typer import Typer
from typer.testing import CliRunner

from speechllm.codec import EncodecCodec, EncodecConfig, load_codec, save_codec
from speechllm.errors import InputError
from train import codec_plain
from train.codec_plain import even_out, quantize, replace_seldom_used
from train.log import read_metrics
from train.loop import Loop

SIZES: dict[str, Any] = {
    "sample_rate": 16000, "ratios": [8, 5, 4, 4], "n_filters": 4, "dimension": 16, "lstm": 1, "causal": False,
    "n_q": 3, "codebooks": 4, "card": 16,
}  # fmt: skip


@pytest.fixture
def codec() -> EncodecCodec:
    torch.manual_seed(0)
    return EncodecCodec(EncodecConfig.model_validate(SIZES))


@pytest.fixture(scope="module")
def settings(corpus: Path) -> dict[str, Any]:
    return {
        "manifests": [corpus / "manifest.jsonl"],
        "dev_manifests": [corpus / "dev.jsonl"],
        "codec": SIZES,
        "training": {
            "steps": 40, "learning_rate": 3e-3, "warmup": 4, "batch_clips": 2, "crop_seconds": 0.32,
            "adversarial_from": 0.75, "evaluate_every": 20,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not interrupted."""
    out = tmp_path_factory.mktemp("plain") / "run"
    command(codec_plain.main, "--config", write_yaml(out.with_name("plain.yaml"), settings | {"out": out}))
    return out


def test_a_signal_gets_through_the_networks_at_the_start(codec: EncodecCodec) -> None:
    even_out(codec.model)
    wav = 0.1 * torch.randn(1, 1, 16000, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        hidden = codec.model.encoder(wav)
        made = codec.model.decoder(hidden)
    assert hidden.std(-1).mean() > 0.5 * hidden.square().mean().sqrt()  # what differs between frames is most of it
    assert 0.01 < made.std() < 1


def test_every_codebook_draws_the_encoder_near(codec: EncodecCodec) -> None:
    codec.train()
    hidden = torch.randn(2, 16, 40, requires_grad=True)
    gradients = []
    for n_q in (1, 2, 3):
        quantized, commitment = quantize(codec, hidden, n_q)
        gradients.append(torch.autograd.grad(n_q * commitment, hidden)[0])
    assert not torch.allclose(gradients[1], gradients[0])
    assert not torch.allclose(gradients[2], gradients[1])
    (through,) = torch.autograd.grad(quantized.sum(), hidden)
    assert torch.equal(through, torch.ones_like(hidden))  # straight through, however many codebooks


def test_quantising_gives_what_the_codes_stand_for(codec: EncodecCodec) -> None:
    hidden = torch.randn(1, 16, 40)
    codec.train()
    quantize(codec, hidden, 3)  # the first batch fills the codebooks
    codec.eval()
    vq = codec.model.quantizer.vq
    quantized, _ = quantize(codec, hidden, 3)
    assert torch.allclose(quantized, vq.decode(vq.encode(hidden, 3)), atol=1e-5)
    assert (quantized - hidden).norm() < hidden.norm()


def test_codes_that_are_seldom_used_are_replaced_for_good(codec: EncodecCodec) -> None:
    codec.train()
    hidden = torch.randn(2, 16, 40)
    quantize(codec, hidden, 1)
    book: Any = codec.model.quantizer.vq.layers[0]._codebook
    book.embed[3:5] = 100.0
    book.embed_avg[3:5] = 0.01
    book.cluster_size[3:5] = 1e-4
    others = [i for i in range(16) if i not in (3, 4) and book.cluster_size[i] > 0.1 * book.cluster_size.mean()]
    before = book.embed.clone()
    replace_seldom_used(book, hidden)
    vectors = hidden.transpose(1, 2).flatten(0, 1)
    assert all((vectors == book.embed[i]).all(1).any() for i in (3, 4))
    assert len(others) > 5
    assert torch.equal(book.embed[others], before[others])
    quantize(codec, hidden, 1)
    assert book.embed[3:5].abs().max() < 10  # the update of the codebook leaves them where they were put


def test_training_lowers_the_losses(run: Path) -> None:
    records = read_metrics(run / "plain" / "metrics.jsonl")
    dev = [record for record in records if "dev_spectral" in record]
    assert [record["step"] for record in dev] == [20, 40]
    assert dev[1]["dev_spectral"] < dev[0]["dev_spectral"]
    first, last = (record for record in records if "spectral" in record)
    assert last["spectral"] < first["spectral"]
    assert "discriminator" in last and "discriminator" not in first
    assert (run / "plain" / "training.png").stat().st_size > 1000


@pytest.mark.parametrize("seconds", [0.01, 0.04, 0.5, 1.23])
def test_the_folder_opens_and_keeps_the_contract(run: Path, seconds: float) -> None:
    codec = load_codec(run / "codec")
    assert isinstance(codec, EncodecCodec)
    assert (codec.sample_rate, codec.hop_length, codec.frame_rate, codec.n_q, codec.card) == (16000, 640, 25, 3, 16)
    wav = 0.1 * torch.randn(1, round(seconds * 16000), generator=torch.Generator().manual_seed(1))
    codes = codec.encode(wav)
    frames = -(-wav.shape[1] // 640)
    assert codes.shape == (3, frames)
    assert codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < 16
    assert torch.equal(codec.encode(wav, n_q=1), codes[:1])
    assert codec.decode(codes).shape == (1, frames * 640)
    assert codec.decode(codes[:1]).isfinite().all()
    with pytest.raises(InputError, match="n_q = 4: this codec has 1 to 3 codebooks"):
        codec.encode(wav, n_q=4)


def test_a_saved_codec_is_the_same_when_loaded(run: Path, tmp_path: Path) -> None:
    codec = load_codec(run / "codec")
    assert isinstance(codec, EncodecCodec)
    save_codec(codec, tmp_path / "codec")
    again = load_codec(tmp_path / "codec")
    assert again.config == codec.config
    assert again.fingerprint(3) == codec.fingerprint(3)
    wav = 0.1 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(1))
    codes = codec.encode(wav)
    assert torch.equal(again.encode(wav), codes)
    assert torch.equal(again.decode(codes), codec.decode(codes))


@pytest.mark.parametrize("step", [9, 33])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    step: int, run: Path, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM arrives within ``step``; before the discriminator takes part (9) and after (33)."""
    out = tmp_path / "run"
    config = write_yaml(tmp_path / "plain.yaml", settings | {"out": out})
    app = Typer()
    app.command()(codec_plain.main)
    scalars = Loop.scalars

    def stop_within(loop: Loop, **values: float) -> None:
        if loop.step == step:
            signal.raise_signal(signal.SIGTERM)
        scalars(loop, **values)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "scalars", stop_within)
        stopped = CliRunner().invoke(app, ["--config", str(config)])
    assert stopped.exit_code == 130
    assert f"stopped after step {step + 1}; go on with --resume" in stopped.output
    again = CliRunner().invoke(app, ["--config", str(config)])
    assert again.exit_code == 2
    assert "holds a run already: add --resume" in again.output
    command(codec_plain.main, "--config", config, "--resume")
    expected, found = load_codec(run / "codec").state_dict(), load_codec(out / "codec").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    whole, resumed = (
        [r | {"seconds": 0} for r in read_metrics(folder / "plain" / "metrics.jsonl") if "dev_mel" in r]
        for folder in (run, out)
    )
    assert resumed == whole
    assert len(whole) == 2


def test_sizes_that_do_not_fit_are_named(settings: dict[str, Any], tmp_path: Path) -> None:
    app = Typer()
    app.command()(codec_plain.main)
    for change, message in (
        ({"n_q": 5}, "n_q = 5: the model has 4 codebooks"),
        ({"card": 500}, "card = 500: must be a power of two"),
        ({"ratios": [8, 0]}, "ratios = (8, 0): must be at least 1"),
    ):
        values = settings | {"out": tmp_path / "run", "codec": SIZES | change}
        result = CliRunner().invoke(app, ["--config", str(write_yaml(tmp_path / "plain.yaml", values))])
        assert result.exit_code == 2
        assert message in result.output
        assert result.output.count("\n") == 1
    with pytest.raises(InputError, match="set n_q alone"):
        EncodecCodec.pretrained(EncodecConfig(lstm=1))
