"""What codebook 1 is taught to tell: F0 of made-up voices, the losses, their gradient, training with them."""

import math
import signal
from pathlib import Path
from random import Random
from typing import Any

import pytest
import soundfile
import torch
from conftest import RATE, filled

from speechllm.codec import SpeechCodec, SpeechCodecConfig
from speechllm.codec.layers import FLOOR, unscale_log
from speechllm.data.corpus import Item
from speechllm.data.manifest import Utterance
from speechllm.errors import InputError
from train.codec_acoustic import AcousticSettings, make_auxiliary, quantize, train_acoustic
from train.codec_data import CtcBatch
from train.codec_losses import mel_loss, spectral_loss
from train.codec_semantic import forward
from train.codec_traits import MIDDLE, ProsodyHead, TraitHeads, classes_of, energy, pitch
from train.codec_waveform import Crops, Reconstruction, train_waveform
from train.log import read_metrics
from train.loop import Interrupted, Loop

HOP = 640
SIZES: dict[str, Any] = {
    "n_mels": 16, "card": 16, "n_acoustic": 3, "dim": 16, "depth": 1, "recognizer_depth": 1, "kernel": 3, "code_dim": 8,
    "acoustic_dim": 16, "acoustic_depth": 1, "acoustic_code_dim": 8, "decoder_dim": 16, "decoder_depth": 1,
}  # fmt: skip


def voice(hertz: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
    """Harmonics of an F0 for each sample, ``[samples]``, softer by 12 dB an octave, and white noise."""
    phase = 2 * math.pi * hertz.double().cumsum(0) / RATE
    wav = sum(torch.sin(n * phase + n) / n**2 for n in range(1, 12)).float()
    return 0.1 * wav / wav.std() + noise * torch.randn(len(hertz), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.05])
@pytest.mark.parametrize("hertz", [64, 90, 127, 180, 256, 320, 390])
def test_pitch_of_steady_voices(hertz: float, noise: float) -> None:
    found, voiced = pitch(voice(torch.full((RATE,), float(hertz)), noise)[None], RATE, HOP)
    assert found.shape == voiced.shape == (1, 25)
    off = 12 * (found / hertz).log2().abs()
    assert off.median() < 0.15  # semitones
    assert voiced.float().mean() > 0.9
    assert (off[voiced] < 1).float().mean() > 0.9


def test_pitch_of_glides_and_of_a_weak_fundamental() -> None:
    seconds = torch.arange(RATE) / RATE
    for hertz in (100 * 2**seconds, 300 * 2**-seconds):
        found, voiced = pitch(voice(hertz)[None], RATE, HOP)
        assert voiced.all()
        assert (12 * (found[0] / hertz[HOP // 2 :: HOP]).log2().abs()).max() < 0.5
    without = voice(torch.full((RATE,), 120.0)) - 0.9 * 0.13 * torch.sin(2 * math.pi * 120 * seconds + 1)
    found, voiced = pitch(without[None], RATE, HOP)
    assert (found[voiced] / 120).log2().abs().median() < 0.02


def test_what_has_no_pitch_is_unvoiced() -> None:
    noise = torch.randn(3, RATE, generator=torch.Generator().manual_seed(1))
    noise = torch.stack([0.3 * noise[0], 1e-4 * noise[1], 0 * noise[2]])
    found, voiced = pitch(noise, RATE, HOP)
    assert voiced.float().mean() < 0.03
    assert found.isfinite().all()


def test_clips_in_a_batch_and_their_level_make_no_difference() -> None:
    wavs = torch.stack([voice(torch.full((RATE,), 110.0)), voice(torch.full((RATE,), 250.0), 0.02)])
    together = pitch(wavs, RATE, HOP)
    for i, wav in enumerate(wavs):
        hertz, voiced = pitch(0.2 * wav[None], RATE, HOP)
        assert torch.equal(voiced[0], together[1][i])
        assert torch.allclose(hertz[0][voiced[0]], together[0][i][voiced[0]], rtol=0.01)


def test_energy_is_the_log_of_the_mean_square() -> None:
    wav = torch.cat([torch.full((1, HOP), 0.1), torch.zeros(1, HOP)], dim=1)
    assert torch.allclose(unscale_log(energy(wav, HOP)).exp(), torch.tensor([[0.01, FLOOR]]), rtol=1e-4)


def item(number: int, root: Path = Path(), split: Any = "train", **known: Any) -> Item:
    values = {"id": str(number), "audio": f"{number}.wav", "duration": 1.0, "split": split, "source": "made"}
    return Item(Utterance.model_validate(values | known), root)


def test_classes_are_what_is_heard_often() -> None:
    items = [item(n, gender="male" if n < 3 else "female", speaker=f"s{n // 2}") for n in range(6)]
    items += [item(n, speaker="alone", labels={"emotion": "anger"}) for n in range(2)]
    items += [item(n, labels={"emotion": "puzzlement"}) for n in range(5)]
    assert classes_of(items, least=2) == {"speaker": ("alone", "s0", "s1", "s2"), "gender": ("female", "male")}
    assert classes_of(items, least=3) == {"gender": ("female", "male")}
    with pytest.raises(InputError, match="no speaker, gender, emotion has two values that 4 clips each"):
        classes_of(items, least=4)


def test_traits_that_are_not_known_and_padding_give_no_loss() -> None:
    heads = TraitHeads(2, {"gender": ("female", "male"), "emotion": ("angry", "calm", "sad")}, HOP)
    for output in heads.outputs.values():
        torch.nn.init.zeros_(output.weight)  # type: ignore[arg-type]
        torch.nn.init.zeros_(output.bias)  # type: ignore[arg-type]
    items = (item(0, gender="male"), item(1, labels={"emotion": "sadness"}), item(2, labels={"emotion": "boredom"}))
    batch = Crops(torch.zeros(3, 4 * HOP), torch.tensor([4 * HOP, HOP + 1, 4 * HOP]), items)
    quantized = torch.randn(3, 4, 2, requires_grad=True)
    assert heads.targets("gender", items).tolist() == [1, -100, -100]
    assert heads.targets("emotion", items).tolist() == [-100, 2, -100]
    assert heads(quantized, batch).item() == pytest.approx(1)  # both are guessed blindly
    unknown = Crops(batch.wav[2:], batch.lengths[2:], items[2:])
    assert heads(quantized[2:], unknown).item() == 0
    assert heads.measure(quantized[2:], unknown) == {}
    torch.nn.init.normal_(heads.outputs["emotion"].weight)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(heads(quantized, batch), quantized)
    assert gradient.any(-1).tolist() == [[False] * 4, [True, True, False, False], [False] * 4]

    told = heads.measure(quantized.detach(), batch)
    assert set(told) == {"gender", "emotion"}
    assert told["gender"] == 0.0  # of equal logits the first wins: female


def test_prosody_is_told_when_the_code_has_it() -> None:
    wav = torch.stack([voice(torch.full((RATE,), 100.0)), torch.zeros(RATE)])
    batch = Crops(wav, torch.tensor([RATE, RATE]), (item(0), item(1)))
    head = ProsodyHead(3, RATE, HOP)
    with torch.no_grad():
        head.output.weight.copy_(torch.eye(3))
        head.output.bias.zero_()
    hertz, voiced = pitch(wav, RATE, HOP)
    code = torch.stack([(hertz / MIDDLE).log2(), 40.0 * voiced - 20, energy(wav, HOP)], dim=-1)
    assert head(code, batch).item() == pytest.approx(0, abs=1e-5)
    assert head.measure(code, batch)["f0_semitones"] == pytest.approx(0, abs=1e-4)
    code[0, :, 0] += 1 / 12
    code[1, :, 0] += 5  # no voice there, no error
    assert head(code, batch).item() == pytest.approx(1 / 12, abs=1e-5)
    assert head.measure(code, batch)["f0_semitones"] == pytest.approx(1, abs=1e-4)
    silence = Crops(wav[1:], batch.lengths[1:], batch.items[1:])
    assert head(code[1:], silence).isfinite()
    assert head.measure(code[1:], silence) == {}


def small_codec() -> SpeechCodec:
    """As if trained; the first acoustic codebook is filled from noise, so that more than one of its codes is used."""
    torch.manual_seed(0)
    codec = filled(SpeechCodec(SpeechCodecConfig.model_validate(SIZES)))
    codec.acoustic.quantizer.layers[0]._codebook.initted.fill_(False)
    codec.acoustic.train()
    quantize(codec, 0.1 * torch.randn(2, 20 * HOP))
    return codec.eval()


def test_whatever_is_made_is_made_on_the_device_of_what_is_given() -> None:
    """On PyTorch's meta device, whose tensors meet none of the CPU's without an error."""
    codec, meta = small_codec().to("meta"), torch.device("meta")
    batch = Crops(torch.zeros(2, 20 * HOP), torch.tensor([20 * HOP, HOP]), (item(0), item(1))).to(meta)
    frames = torch.zeros(2, 20, 8, device=meta)
    heads = TraitHeads(8, {"gender": ("female", "male")}, HOP).to(meta)
    ctc_batch = CtcBatch(*(torch.zeros(*size) for size in ((2, 80, 16), (2,), (2, 3), (2,)))).to(meta)
    log_probs, _, codes = forward(codec, ctc_batch, quantize=False)
    made = [
        spectral_loss(batch.wav, batch.wav),
        mel_loss(batch.wav, batch.wav, codec.mel),
        ProsodyHead(8, RATE, HOP).to(meta)(frames, batch),
        heads._pool(frames, batch),
        heads.targets("gender", batch.items),
        ctc_batch.mask,
        log_probs,
        codes,
    ]
    assert {tensor.device for tensor in made} == {meta}


@pytest.mark.parametrize("training", [True, False])
def test_the_first_codebook_alone_is_given_with_a_gradient_to_the_encoder(training: bool) -> None:
    codec = small_codec()
    codec.acoustic.train(training)
    wav = 0.1 * torch.randn(2, 20 * HOP, generator=torch.Generator().manual_seed(1))
    quantizer = codec.acoustic.quantizer
    for number in range(6):  # whichever codebooks dropout leaves
        torch.manual_seed(number)
        semantic, acoustic, _, first = quantize(codec, wav)
        entries = quantizer.layers[0].codebook
        assert first.shape == (2, 20, 8)
        assert torch.cdist(first.detach(), entries.expand(2, -1, -1)).amin(-1).max() < 1e-4
        assert codec.acoustic.synthesize(semantic, acoustic).shape == wav.shape
    loss = ProsodyHead(8, RATE, HOP)(first, Crops(wav, torch.tensor([20 * HOP] * 2), (item(0), item(1))))
    loss.backward()
    of_encoder = [p.grad for n, p in codec.acoustic.named_parameters() if n.startswith(("down", "known", "stack"))]
    assert all(gradient is not None and gradient.any() for gradient in of_encoder)
    assert quantizer.project_in.weight.grad.any()
    assert codec.acoustic.spectrum.weight.grad is None
    assert quantizer.project_out.weight.grad is None


def test_later_codebooks_do_not_matter_to_it() -> None:
    codec = small_codec()
    wav = 0.1 * torch.randn(2, 20 * HOP, generator=torch.Generator().manual_seed(1))
    _, acoustic, _, first = quantize(codec, wav)
    with torch.no_grad():
        for layer in codec.acoustic.quantizer.layers[1:]:
            layer.codebook.mul_(-3)
    _, other, _, again = quantize(codec, wav)
    assert not torch.equal(other, acoustic)
    assert torch.equal(again, first)
    codes = codec.encode(wav[:1])
    assert len(codes[1].unique()) > 1
    assert torch.allclose(first[0], codec.acoustic.quantizer.layers[0].codebook[codes[1]], atol=1e-6)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    """Forty-four clips of one second: low and high voices, of two speakers each; the high ones are angry."""
    folder = tmp_path_factory.mktemp("said")
    items = []
    for number in range(44):
        high = number % 2
        hertz = (220 if high else 110) * 2 ** Random(number).uniform(-0.2, 0.2)
        soundfile.write(folder / f"{number}.wav", voice(torch.full((RATE,), hertz), 0.005).numpy(), RATE)
        known = {"gender": "female" if high else "male", "labels": {"emotion": "anger" if high else "calm"}}
        items.append(item(number, folder, speaker=f"s{number % 4}", **known))
    return items


def settings(**changes: Any) -> AcousticSettings:
    values = {
        "steps": 60, "warmup": 4, "batch_clips": 4, "crop_seconds": 0.64, "learning_rate": 5e-3,
        "adversarial_from": 0.9, "evaluate_every": 30,
    }  # fmt: skip
    return AcousticSettings.model_validate(values | changes)


@pytest.fixture(scope="module")
def run(said: list[Item], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with both weights that was not interrupted."""
    out = tmp_path_factory.mktemp("traits")
    train_acoustic(small_codec(), said[:40], said[40:], settings(trait_weight=1, prosody_weight=1), out, 0, False)
    return out


def test_the_heads_learn_are_logged_and_are_not_in_the_codec(run: Path) -> None:
    records = read_metrics(run / "acoustic" / "metrics.jsonl")
    dev = [record for record in records if "dev_mel" in record]
    assert [record["step"] for record in dev] == [30, 60]
    assert dev[1]["dev_f0_semitones"] < 3  # the voices differ by 12, and by up to 2.4 from their mean
    assert dev[1]["dev_gender"] == dev[1]["dev_emotion"] == 1.0
    told = [record for record in records if "traits" in record]
    assert [record["step"] for record in told] == [20, 40, 60]
    for name in ("traits", "prosody"):
        assert told[-1][name] < 0.7 * told[0][name]
    assert (run / "acoustic" / "training.png").stat().st_size > 1000
    state = torch.load(run / "acoustic" / "state.pt", weights_only=True)["module"]
    heads = {name for name in state if name.startswith("heads.")}
    assert "heads.traits.outputs.gender.weight" in heads and "heads.prosody.output.weight" in heads
    kept = {name.removeprefix("codec.") for name in state if name.startswith("codec.")}
    assert kept == set(small_codec().acoustic.state_dict())


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    run: Path, said: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scalars = Loop.scalars

    def stop_within(loop: Loop, **values: float) -> None:
        if loop.step == 33:
            signal.raise_signal(signal.SIGTERM)
        scalars(loop, **values)

    chosen = settings(trait_weight=1, prosody_weight=1)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "scalars", stop_within)
        with pytest.raises(Interrupted):
            train_acoustic(small_codec(), said[:40], said[40:], chosen, tmp_path, 0, False)
    train_acoustic(small_codec(), said[:40], said[40:], chosen, tmp_path, 0, True)
    expected, found = (
        torch.load(folder / "acoustic" / "state.pt", weights_only=True)["module"] for folder in (run, tmp_path)
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_without_weights_training_is_what_it_was(said: list[Item], tmp_path: Path) -> None:
    """As if there were no heads: the codec through its own functions, and nothing beside the commitment loss."""
    codec, plain = small_codec(), small_codec()
    chosen = settings(steps=8, adversarial_from=0.5)
    torch.manual_seed(0)
    train_acoustic(codec, said[:40], said[40:], chosen, tmp_path / "with", 0, False)

    def reconstruct(batch: Crops) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        with torch.no_grad():
            mel = plain.mel(batch.wav)
            semantic = plain.semantic.quantizer(plain.semantic.hidden(mel), freeze_codebook=True)[0]
        acoustic, _, commitment = plain.acoustic.quantizer(plain.acoustic.encode(mel, semantic))
        return plain.acoustic.synthesize(semantic, acoustic), commitment.sum(), {}

    task = Reconstruction("acoustic", plain.acoustic, reconstruct, plain.mel, RATE, HOP)
    torch.manual_seed(0)  # the discriminator's start
    train_waveform(task, said[:40], said[40:], chosen, tmp_path / "without", 0, False)
    started, expected = small_codec().state_dict(), plain.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in codec.state_dict().items())
    assert any(not torch.equal(value, expected[name]) for name, value in started.items())
    state = torch.load(tmp_path / "with" / "acoustic" / "state.pt", weights_only=True)["module"]
    assert not [name for name in state if name.startswith("heads")]
    with_, without = (
        [r | {"seconds": 0} for r in read_metrics(tmp_path / name / "acoustic" / "metrics.jsonl")]
        for name in ("with", "without")
    )
    assert with_ == without


def test_a_weight_that_is_0_leaves_its_heads_out(said: list[Item]) -> None:
    codec = small_codec()
    prosody = make_auxiliary(codec, said, said[:4], settings(prosody_weight=0.5), 0)
    assert prosody is not None
    assert (list(prosody.heads), dict(prosody.weights)) == (["prosody"], {"prosody": 0.5})
    traits = make_auxiliary(codec, said, said[:4], settings(trait_weight=0.5), 0)
    assert traits is not None
    assert (list(traits.heads), dict(traits.weights)) == (["traits"], {"traits": 0.5})
    assert set(traits.measure()) == {"dev_gender", "dev_emotion"}
    assert make_auxiliary(codec, said, said[:4], settings(), 0) is None
    with pytest.raises(InputError, match="trait_weight"):
        make_auxiliary(codec, said[:10], said[:4], settings(trait_weight=0.5), 0)
    assert make_auxiliary(codec, said[:10], said[:4], settings(prosody_weight=0.5), 0) is not None
