"""Codec training: its parts on small inputs, both stages through the command, and resuming as if never stopped."""

import shutil
import signal
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import command, require_engine, write_yaml
from typer import Typer
from typer.testing import CliRunner

from speechllm.codec import SpeechCodec, SpeechCodecConfig, load_codec
from speechllm.codec.layers import FLOOR, LogMel, scale_log, unscale_log
from speechllm.data.augment import augment, distort, mask, random_rate, warp
from speechllm.data.corpus import read_corpus
from speechllm.data.phonemes import phonemes
from speechllm.errors import InputError
from train import codec as train_codec
from train import codec_semantic
from train.codec_data import CtcBatch, CtcData, phoneme_inventory, transcribable
from train.codec_semantic import ctc, forward, greedy
from train.codec_waveform import WaveformSettings, crops
from train.log import read_metrics
from train.loop import Loop, cosine

HEAD = ["h", "ə", "l", "oʊ"]


@pytest.fixture(scope="module")
def feature() -> torch.Tensor:
    """Scaled log-mel of a chirp, [150, 32]."""
    seconds = torch.arange(24000) / 16000
    return LogMel(16000, 32)(0.3 * torch.sin(6000 * seconds * seconds)[None])[0]


def test_log_mel_scale_and_its_inverse(feature: torch.Tensor) -> None:
    assert feature.shape == (150, 32)
    assert torch.allclose(scale_log(unscale_log(feature)), feature, atol=1e-6)
    silence = LogMel(16000, 32)(torch.zeros(1, 1600))[0]
    assert torch.allclose(unscale_log(silence).exp(), torch.full((10, 32), FLOOR))


def warped(feature: torch.Tensor, rng: Random) -> torch.Tensor:
    return warp(feature, rng, random_rate(rng))


def augmented(feature: torch.Tensor, rng: Random) -> torch.Tensor:
    return augment(feature, rng, random_rate(rng))


@pytest.mark.parametrize("change", [warped, distort, mask, augmented])
def test_augmentation_follows_from_its_random_state_alone(change: Any, feature: torch.Tensor) -> None:
    before, lengths, results = feature.clone(), set(), []
    for seed in range(40):
        torch.manual_seed(seed)
        made = change(feature, Random(seed))
        torch.manual_seed(999)  # whoever else draws numbers meanwhile
        assert torch.equal(change(feature, Random(seed)), made)
        assert made.shape[1] == 32
        assert 0.8 * 150 <= len(made) <= 1.26 * 150
        assert made.isfinite().all()
        assert (unscale_log(made).exp() > 0.9 * FLOOR).all()
        lengths.add(len(made))
        results.append(made)
    assert torch.equal(feature, before)
    assert len(lengths) > 5 if change in (warped, augmented) else lengths == {150}
    changed = sum(r.shape != feature.shape or not torch.allclose(r, feature, atol=1e-3) for r in results)
    assert changed > 25


def test_mask_fills_stripes_with_the_mean(feature: torch.Tensor) -> None:
    shares = []
    for seed in range(20):
        made = mask(feature, Random(seed))
        touched = made != feature
        assert torch.allclose(made[touched], feature.mean())
        shares.append(float(touched.float().mean()))
    assert 0 < max(shares) < 0.9


def test_greedy_merges_repeats_then_drops_blanks() -> None:
    paths = torch.tensor([[0, 1, 1, 0, 1, 2, 2, 3], [2, 2, 0, 0, 3, 3, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]])
    log_probs = F.one_hot(paths, 4).float().log_softmax(-1)
    assert greedy(log_probs, torch.tensor([8, 6, 8])) == [[1, 1, 2, 3], [2, 3], []]


def test_ctc_loss_by_hand() -> None:
    """Two frames, one symbol: blank-a, a-blank and a-a are its spellings; padding and the next row do not matter."""
    probs = torch.tensor([[[0.6, 0.4], [0.3, 0.7], [0.5, 0.5]], [[0.2, 0.8], [0.5, 0.5], [0.5, 0.5]]])
    batch = CtcBatch(torch.zeros(2, 12, 16), torch.tensor([2, 1]), torch.tensor([[1], [1]]), torch.tensor([1, 1]))
    spelled = torch.tensor([0.6 * 0.7 + 0.4 * 0.3 + 0.4 * 0.7, 0.8])
    assert ctc(probs.log(), batch).item() == pytest.approx(-spelled.log().mean().item(), rel=1e-5)
    assert batch.mask.tolist() == [[True, True, False], [True, False, False]]


def test_padding_moves_no_code_and_no_symbol() -> None:
    torch.manual_seed(0)
    config = SpeechCodecConfig(n_mels=16, card=8, dim=16, depth=2, kernel=3, code_dim=4, phonemes=("a", "b"))
    codec = SpeechCodec(config)
    mel = torch.randn(2, 40, 16)
    frames = torch.tensor([10, 6])
    mel[1, 24:] = -1.0  # what CtcData pads with is some low value; it must not matter which
    batch = CtcBatch(mel, frames, torch.zeros(2, 1, dtype=torch.int64), torch.tensor([0, 0]))
    forward(codec, batch, quantize=True)  # k-means fills the codebook
    codec.eval()
    with torch.inference_mode():
        log_probs, _, codes = forward(codec, batch, quantize=True)
        single = CtcBatch(mel[1:, :24], frames[1:], batch.targets[1:], batch.target_lengths[1:])
        alone, _, own = forward(codec, single, quantize=True)
    assert len(codes[codes >= 0].unique()) > 1
    assert codes[1].tolist() == own[0].tolist() + [-1] * 4
    assert torch.allclose(log_probs[1, :6], alone[0], atol=1e-5)
    assert log_probs.shape == (2, 10, 3)


def test_phonemes() -> None:
    require_engine("espeak-ng")
    assert phonemes("hello", "en") == HEAD
    assert phonemes("Hello. Hello!", "en") == HEAD * 2  # clause by clause
    assert phonemes("", "en") == []
    assert phonemes("Hund", "de") == ["h", "ʊ", "n", "t"]
    assert phonemes("hello", "en") == HEAD  # the voice of another language does not stay
    assert not any(mark in p for p in phonemes("Photography is a wonderful invention.", "en") for mark in "ˈˌ_ ")
    with pytest.raises(InputError, match="no phonemes for language 'xx': known are cs, de, en"):
        phonemes("hello", "xx")


def test_targets_and_batches(corpus: Path) -> None:
    items = transcribable(read_corpus([corpus / "manifest.jsonl"], "train"))
    assert len(items) == 24
    inventory = phoneme_inventory(items, least=10)
    with pytest.raises(InputError, match="no phoneme is heard 1000 times in the manifests"):
        phoneme_inventory(items, least=1000)
    heard = [p for item in items for p in phonemes(item.utterance.text or "", "en")]
    assert inventory == tuple(sorted({p for p in heard if heard.count(p) >= 10}))
    assert len(inventory) > 5
    data = CtcData(items, inventory, LogMel(16000, 16), 16000)
    spelled = [inventory.index(p) + 1 for p in phonemes(items[0].utterance.text or "", "en") if p in inventory]
    batch = data.batch([0, 1, 2], None)
    assert batch.targets[0, : batch.target_lengths[0]].tolist() == spelled
    durations = torch.tensor([item.utterance.duration for item in items[:3]])
    assert torch.equal(batch.frames, (durations * 25).ceil().long())
    assert batch.mel.shape == (3, 4 * int(batch.frames.max()), 16)
    varied = data.batch([0, 1, 2], Random(1))
    longer = [data.batch([0, 1, 2], Random(seed)).frames / batch.frames for seed in range(20)]
    assert all(rates.max() - rates.min() < 0.05 for rates in longer)  # one rate for all, but for whole frames
    assert max(longer, key=torch.max).max() > 1.1
    assert torch.equal(varied.mel, data.batch([0, 1, 2], Random(1)).mel)
    assert varied.mel.shape != batch.mel.shape or not torch.equal(varied.mel, batch.mel)
    mute = CtcData(items[:1], (), LogMel(16000, 16), 16000).batch([0], None)  # no phoneme is common enough
    assert (mute.targets.dtype, mute.target_lengths.tolist()) == (torch.int64, [0])


def test_a_share_of_the_clips_is_perturbed_and_each_stays_so(corpus: Path) -> None:
    items, mel = read_corpus([corpus / "manifest.jsonl"], "train"), LogMel(16000, 16)
    clean, some, all_of_them = (CtcData(items, ("a",), mel, 16000, share) for share in (0.0, 0.5, 1.0))
    changed = [
        [not torch.equal(data.wav(i), clean.wav(i)) for i in range(len(items))] for data in (clean, some, all_of_them)
    ]
    assert not any(changed[0])
    assert 0 < sum(changed[1]) < len(items)
    assert all(changed[2])
    assert torch.equal(all_of_them.wav(1), all_of_them.wav(1))


def test_what_is_learnt_before_the_quantiser_is_on_is_learnt_through_its_space() -> None:
    torch.manual_seed(0)
    codec = SpeechCodec(SpeechCodecConfig(n_mels=16, dim=32, depth=1, card=8, code_dim=4, phonemes=("a", "b")))
    semantic = codec.eval().semantic
    hidden = torch.randn(1, 8, 32)
    codebook = semantic.quantizer._codebook
    codebook.embed.data.copy_(F.normalize(semantic.quantizer.project_in(hidden), dim=-1))  # a code for each frame
    codebook.initted.fill_(True)
    quantized, codes, _ = semantic.quantizer(hidden, freeze_codebook=True)
    assert sorted(codes[0].tolist()) == list(range(8))
    torch.testing.assert_close(semantic.unquantized(hidden), quantized)

    batch = CtcBatch(torch.randn(1, 32, 16), torch.tensor([8]), torch.tensor([[1, 2]]), torch.tensor([2]))
    log_probs, _, no_codes = forward(codec.train(), batch, quantize=False)
    ctc(log_probs, batch).backward()
    for layer in (semantic.quantizer.project_in, semantic.quantizer.project_out):
        assert layer.weight.grad.abs().sum() > 0
    assert no_codes.unique().tolist() == [-1]


def test_repeating_a_source_that_is_not_there_is_refused(codec_settings: dict[str, Any], tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "codec.yaml", codec_settings | {"out": tmp_path / "run", "repeat": {"radio": 2}})
    app = Typer()
    app.command()(train_codec.main)
    result = CliRunner().invoke(app, ["--config", str(config)])
    assert result.exit_code == 2
    assert "repeat: no clips for this stage come from radio" in result.output


def test_crops_are_no_shorter_than_the_losses_need() -> None:
    assert WaveformSettings(steps=1, crop_seconds=0.08).samples(16000, 640) == 1280
    with pytest.raises(InputError, match=r"crop_seconds = 0.05: 640 samples; set more than 0.064"):
        WaveformSettings(steps=1, crop_seconds=0.05).samples(16000, 640)


def test_crops_are_stretches_of_the_clips(corpus: Path) -> None:
    items = read_corpus([corpus / "manifest.jsonl"], "train")[:2]
    wavs = [item.wav(16000)[0] for item in items]
    batch = crops(items, 800, 6, 16000, Random(0))
    found = batch.wav
    assert found.shape == (6, 800)
    assert batch.lengths.tolist() == [800] * 6
    assert torch.equal(crops(items, 800, 6, 16000, Random(0)).wav, found)
    assert found.any(1).sum() > 3  # the others are of the silence around the speech
    assert all(item in batch.items for item in items)
    for row, item in zip(found, batch.items, strict=True):
        if row.any():
            wav = wavs[items.index(item)]
            similarity = float(F.cosine_similarity(wav.unfold(0, 800, 1), row, dim=-1).max())
            assert similarity == pytest.approx(1, abs=1e-4)
    long = crops(items, 200000, 2, 16000, Random(0))
    assert long.wav.shape == (2, 200000)
    assert not long.wav[:, -1000:].any()
    assert long.lengths.tolist() == [len(wavs[items.index(item)]) for item in long.items]


def test_cosine_schedule() -> None:
    rates = [cosine(step, 10, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.02 + 0.98 / 2)
    assert 0.02 < rates[99] < 0.03


def records(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_metrics(folder / "metrics.jsonl")]


def test_both_stages_leave_a_codec_that_loads(codec_run: Path, corpus: Path) -> None:
    codec = load_codec(codec_run / "codec")
    assert isinstance(codec, SpeechCodec)
    assert len(codec.config.phonemes) >= 2
    item = read_corpus([corpus / "manifest.jsonl"], "train")[0]
    codes = codec.encode(item.wav(16000))
    assert len(codes[0].unique()) > 1
    assert len(codes[1].unique()) > 1
    assert codec.decode(codes).isfinite().all()
    semantic, acoustic = records(codec_run / "semantic"), records(codec_run / "acoustic")
    assert [r["step"] for r in semantic if "ctc" in r] == [20, 40]
    quantised = next(r for r in semantic if "perplexity" in r)
    assert 1 < quantised["perplexity"] <= 16
    assert 0 < quantised["merged_codes_per_second"] <= 25
    assert [r["step"] for r in acoustic if "spectral" in r] == [20]
    for folder in (codec_run / "semantic", codec_run / "acoustic"):
        assert (folder / "training.png").stat().st_size > 1000


def test_the_acoustic_stage_leaves_codebook_0_alone(codec_run: Path) -> None:
    state = torch.load(codec_run / "semantic" / "state.pt", weights_only=True)["module"]
    kept = load_codec(codec_run / "codec").state_dict()
    assert all(torch.equal(value, kept[f"semantic.{name}"]) for name, value in state.items())


@pytest.mark.parametrize(("stage", "step"), [("semantic", 9), ("semantic", 31), ("acoustic", 7), ("acoustic", 16)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    stage: str,
    step: int,
    codec_run: Path,
    codec_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGTERM arrives within ``step``; before quantiser (9) or discriminator (7) is on, and after (31, 16)."""
    out = tmp_path / "run"
    config = write_yaml(tmp_path / "codec.yaml", codec_settings | {"out": out})
    app = Typer()
    app.command()(train_codec.main)
    if stage == "acoustic":  # it begins with the codec of the semantic stage
        started = load_codec(codec_run / "semantic" / "codec")
        started.semantic.load_state_dict(  # type: ignore[union-attr]
            torch.load(codec_run / "semantic" / "state.pt", weights_only=True)["module"]
        )
        train_codec.save_codec(started, out / "codec")

    scalars = Loop.scalars

    def stop_within(loop: Loop, **values: float) -> None:
        if loop.step == step:
            signal.raise_signal(signal.SIGTERM)
        scalars(loop, **values)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "scalars", stop_within)
        stopped = CliRunner().invoke(app, ["--config", str(config), "--stage", stage])
    assert stopped.exit_code == 130
    assert f"stopped after step {step + 1}; go on with --resume" in stopped.output
    assert torch.load(out / stage / "state.pt", weights_only=True)["step"] == step + 1

    again = CliRunner().invoke(app, ["--config", str(config), "--stage", stage])
    assert again.exit_code == 2
    assert "holds a run already: add --resume" in again.output
    command(train_codec.main, "--config", config, "--stage", stage, "--resume")

    expected = torch.load(codec_run / stage / "state.pt", weights_only=True)
    found = torch.load(out / stage / "state.pt", weights_only=True)
    assert found["step"] == expected["step"]
    assert all(torch.equal(value, expected["module"][name]) for name, value in found["module"].items())
    # of the means, the first after the stop is of fewer steps
    after = (step // Loop.LOG_EVERY + 1) * Loop.LOG_EVERY
    whole, resumed = (
        [r for r in records(folder / stage) if r["step"] > after or "per_speech0" in r or "dev_spectral" in r]
        for folder in (codec_run, out)
    )
    assert resumed == whole
    assert len(whole) == (2 if (stage, step) == ("semantic", 9) else 1)


def test_what_is_on_top_of_another_codebook_or_of_other_sizes_is_not_taken_up(
    codec_run: Path, codec_settings: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(codec_run, out)
    app = Typer()
    app.command()(train_codec.main)

    def told(stage: str, **changes: Any) -> str:
        config = write_yaml(tmp_path / "codec.yaml", codec_settings | {"out": out} | changes)
        result = CliRunner().invoke(app, ["--config", str(config), "--stage", stage, "--resume"])
        assert result.exit_code == 2
        return result.output

    heads = codec_settings["acoustic"] | {"prosody_weight": 1.0}
    assert "run/acoustic: of other settings: set these again" in told("acoustic", acoustic=heads)
    assert "semantic/codec has other sizes" in told("semantic", codec=codec_settings["codec"] | {"dim": 64})
    codec = load_codec(out / "codec")
    codec.semantic.quantizer._codebook.embed.neg_()  # type: ignore[union-attr]
    train_codec.save_codec(codec, out / "codec")
    assert "run/acoustic: is on top of another codebook 0" in told("acoustic")
    state = out / "acoustic" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    assert "state.pt: damaged: remove " in told("acoustic")


def test_the_acoustic_stage_does_not_begin_where_one_before_it_ended(
    codec_run: Path, codec_settings: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(codec_run, out)
    shutil.rmtree(out / "acoustic")
    config = write_yaml(tmp_path / "c.yaml", codec_settings | {"out": out})
    command(train_codec.main, "--config", config, "--stage", "acoustic")
    first, again = (load_codec(folder / "codec").state_dict() for folder in (codec_run, out))
    assert all(torch.equal(value, first[name]) for name, value in again.items())


def test_a_run_that_is_lengthened_keeps_its_quantiser_and_minds_its_settings(
    codec_run: Path, codec_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, quantized, decays = tmp_path / "run", [], set()
    shutil.copytree(codec_run, out)
    semantic = codec_settings["semantic"] | {"steps": 100, "evaluate_every": 100, "weight_decay": 0.5}  # half is 50
    forward, scalars = codec_semantic.forward, Loop.scalars

    def noted(codec: Any, batch: Any, quantize: bool) -> Any:
        quantized.append(quantize)
        return forward(codec, batch, quantize)

    def stop(loop: Loop, **values: float) -> None:
        decays.update(group["weight_decay"] for group in loop.optimizer.param_groups)
        if loop.step == 41:
            signal.raise_signal(signal.SIGTERM)
        scalars(loop, **values)

    monkeypatch.setattr(codec_semantic, "forward", noted)
    monkeypatch.setattr(Loop, "scalars", stop)
    config = write_yaml(tmp_path / "c.yaml", codec_settings | {"out": out, "semantic": semantic})
    app = Typer()
    app.command()(train_codec.main)
    assert CliRunner().invoke(app, ["--config", str(config), "--resume"]).exit_code == 130
    assert quantized == [True, True]
    assert decays == {0.5}


def test_wrong_configs_are_named_in_one_line(codec_settings: dict[str, Any], tmp_path: Path) -> None:
    app = Typer()
    app.command()(train_codec.main)
    for change, message in (
        ({"semantic": {"steps": 0}}, "semantic.steps"),
        ({"colour": "red"}, "colour"),
        ({"out": Path(__file__)}, "test_codec_training.py: cannot be made"),
        ({"manifests": [tmp_path / "gone.jsonl"]}, "gone.jsonl: no such manifest"),
    ):
        path = write_yaml(tmp_path / "codec.yaml", codec_settings | {"out": tmp_path / "run"} | change)
        result = CliRunner().invoke(app, ["--config", str(path)])
        assert result.exit_code == 2
        assert message in result.output
        assert result.output.count("\n") == 1
