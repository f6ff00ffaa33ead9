"""Perturbations: what each one changes, by how much, and that its random state alone decides."""

import io
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import soundfile
import torch
from torch import Tensor

from speechllm.data import perturb

RATE = 16000
ALL = [perturb.speed, perturb.tilt, perturb.level, perturb.noise, perturb.band_limit, perturb.room, perturb.round_trip]


@pytest.fixture(scope="module")
def wav() -> Tensor:
    """Two seconds that rise from 100 Hz to 7 kHz, softer towards the end, [1, 32000]."""
    seconds = torch.arange(2 * RATE) / RATE
    return (0.3 * torch.exp(-seconds) * torch.sin(2 * torch.pi * (100 + 1725 * seconds) * seconds))[None]


def snr_db(clean: Tensor, noisy: Tensor) -> float:
    return float(10 * torch.log10(clean.square().mean() / (noisy - clean).square().mean()))


@pytest.mark.parametrize("change", [*ALL, perturb.vary])
def test_random_state_alone_decides(change: Callable[[Tensor, int, Random], Tensor], wav: Tensor) -> None:
    before = wav.clone()
    results = [change(wav, RATE, Random(seed)) for seed in (1, 1, 2, 3)]
    assert torch.equal(results[0], results[1])
    assert any(r.shape != results[0].shape or not torch.equal(r, results[0]) for r in results[2:])
    assert torch.equal(wav, before)
    assert all(torch.isfinite(r).all() and r.shape[0] == 1 for r in results)
    if change not in (perturb.speed, perturb.vary):
        assert all(r.shape == wav.shape for r in results)


@pytest.mark.parametrize("change", ALL[1:-1])
def test_other_levels_change_nothing_else(change: Callable[[Tensor, int, Random], Tensor], wav: Tensor) -> None:
    loud, soft = change(wav, RATE, Random(5)), change(wav / 8, RATE, Random(5))
    factor = 1 if change is perturb.level else 8
    assert float((soft * factor - loud).norm() / loud.norm()) < 1e-4


def test_add_at_keeps_the_ratio_asked_for(wav: Tensor) -> None:
    other = torch.randn(wav.shape, generator=torch.Generator().manual_seed(0))
    for ratio in (0.0, 20.0):
        assert snr_db(wav, perturb.add_at(wav, 7 * other, ratio)) == pytest.approx(ratio, abs=1e-3)


def test_speed_changes_length_and_pitch_together() -> None:
    tone = torch.sin(2 * torch.pi * 400 * torch.arange(RATE) / RATE)[None]
    fast = perturb.speed(tone, RATE, Random(4))
    ratio = tone.shape[1] / fast.shape[1]
    assert 0.8 < ratio < 1.25 and abs(ratio - 1) > 0.01
    peak = int(torch.fft.rfft(fast[0]).abs().argmax()) * RATE / fast.shape[1]
    assert peak == pytest.approx(400 * ratio, rel=0.01)


def test_band_limit_leaves_nothing_above_7_khz() -> None:
    white = torch.randn(1, RATE, generator=torch.Generator().manual_seed(0))
    power = torch.fft.rfft(perturb.band_limit(white, RATE, Random(1))).abs().square()[0]
    assert power[7001:].sum() < 1e-6 * power.sum()
    assert power[400:3400].sum() > 0.4 * power.sum()


def test_room_adds_a_tail_that_dies_away() -> None:
    click = torch.zeros(1, RATE)
    click[0, 1000] = 1.0
    heard = perturb.room(click, RATE, Random(2))
    assert heard[0, 1000] == pytest.approx(1.0, abs=1e-4)
    assert heard[0, :1000].abs().max() < 1e-4
    early, late = heard[0, 1100:2700].square().sum(), heard[0, 13000:].square().sum()
    assert early > 100 * late


@pytest.mark.parametrize(("codec", "low", "high"), [("MP3", 16, 64), ("OPUS", 8, 32)])
def test_compression_stays_in_step_and_costs_less_at_a_higher_rate(
    codec: str, low: float, high: float, wav: Tensor
) -> None:
    loud = wav * 5  # 1.5 times full scale: must not clip
    kept = [snr_db(loud, perturb.compressed(loud, RATE, codec, kbits)) for kbits in (low, high)]
    assert 3 < kept[0] < kept[1]


@pytest.mark.parametrize("rate", [16000, 22050, 24000, 44100])
@pytest.mark.parametrize(("codec", "kbits"), [("MP3", 64), ("MP3", 32), ("OPUS", 24)])
def test_compression_at_any_rate(codec: str, kbits: float, rate: int) -> None:
    time = torch.arange(rate) / rate
    tone = (0.3 * torch.sin(2 * torch.pi * 440 * time) * (time > 0.5))[None]  # its beginning shows a shift
    heard = perturb.compressed(tone, rate, codec, kbits)
    assert heard.shape == tone.shape
    assert snr_db(tone, heard) > 10


def test_the_bit_rate_is_the_one_asked_for(wav: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    read = soundfile.read

    def measured(file: io.BytesIO, **options: Any) -> Any:
        sizes.append(len(file.getvalue()))
        return read(file, **options)

    monkeypatch.setattr(soundfile, "read", measured)
    long = wav.repeat(1, 20)
    for kbits in (16, 64):
        perturb.compressed(long, RATE, "MP3", kbits)
        assert sizes[-1] * 8 / 1000 / (long.shape[1] / RATE) == pytest.approx(kbits, rel=0.1)


def test_babble_is_made_of_the_others_and_stays_below(wav: Tensor) -> None:
    asked: list[int] = []

    def others() -> Tensor:
        asked.append(1)
        return torch.randn(1, 9000, generator=torch.Generator().manual_seed(len(asked)))

    assert 5 <= snr_db(wav, perturb.babble(wav, others, Random(6))) <= 20.001
    assert 3 <= len(asked) <= 6
