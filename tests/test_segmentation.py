"""Long audio is cut at pauses, into pieces of bounded length, and no speech is left out."""

import sys

import pytest
import torch
from conftest import require_engine
from silero_vad import load_silero_vad
from torch import Tensor

from serve import segmentation
from serve.segmentation import THRESHOLD, is_silent, speech_probabilities, speech_spans
from speechllm.audio import resample
from speechllm.data.synthesis import SAMPLE_RATE, VOICES, speak

SENTENCES = (
    "A man in a red shirt is riding a bicycle down the street.",
    "Two dogs run through the snow, and one of them carries a stick.",
    "Seven.",
    "A little girl climbs into a wooden playhouse.",
)
LIMIT = 8.0  # seconds


@pytest.fixture(scope="module")
def sentences() -> list[Tensor]:
    """Each [1, samples] at 16 kHz."""
    require_engine("flite")
    voice = next(voice for voice in VOICES if voice.name == "flite-rms")
    return [torch.from_numpy(speak(sentence, voice)).unsqueeze(0) for sentence in SENTENCES]


def pause(seconds: float) -> Tensor:
    return torch.zeros(1, round(seconds * SAMPLE_RATE))


def loud_samples(wav: Tensor) -> Tensor:
    """Bool [samples]: the 10 ms less than 30 dB below the loudest."""
    size = SAMPLE_RATE // 100
    power = wav[0, : wav.shape[1] // size * size].reshape(-1, size).square().mean(1)
    return (power > power.max() * 1e-3).repeat_interleave(size)


def covered(spans: list[tuple[int, int]], samples: int) -> Tensor:
    """Bool [samples]. Checks on the way that the spans are in order and apart."""
    mask = torch.zeros(samples, dtype=torch.bool)
    for start, end in spans:
        assert 0 <= start < end <= samples
        assert not mask[start:].any()
        mask[start:end] = True
    return mask


def test_short_clip_is_one_span() -> None:
    wav = torch.zeros(1, int(LIMIT * SAMPLE_RATE))
    assert speech_spans(wav, SAMPLE_RATE, LIMIT) == [(0, wav.shape[1])]
    assert speech_spans(wav[:, :1], SAMPLE_RATE, LIMIT) == [(0, 1)]


@pytest.mark.parametrize("noise", [0.0, 1e-3])
@pytest.mark.parametrize("level", [1.0, 0.01])
def test_all_speech_is_covered_within_the_limit(sentences: list[Tensor], noise: float, level: float) -> None:
    pauses = (0.3, 2.5, 0.8, 4.0, 0.1, 0.5, 6.0, 0.2, 0.4, 1.5)
    parts = [part for i, p in enumerate(pauses) for part in (sentences[i % len(sentences)], pause(p))]
    clean = torch.cat(parts, dim=1)
    generator = torch.Generator().manual_seed(0)
    wav = level * (clean + noise * torch.randn(clean.shape, generator=generator))
    spans = speech_spans(wav, SAMPLE_RATE, LIMIT)
    mask = covered(spans, wav.shape[1])
    loud = loud_samples(clean)
    assert loud.float().mean() > 0.3
    assert mask[: len(loud)][loud].all()
    assert max(end - start for start, end in spans) <= LIMIT * SAMPLE_RATE
    assert len(spans) >= 4
    left_out = (~mask).sum() / SAMPLE_RATE
    assert left_out > 8  # of 12 s in the four longest pauses and at the end


def test_only_what_the_detector_calls_no_speech_is_left_out(sentences: list[Tensor]) -> None:
    wav = torch.cat([sentences[0], pause(3), sentences[1], pause(3), sentences[3]], dim=1)
    mask = covered(speech_spans(wav, SAMPLE_RATE, LIMIT), wav.shape[1])
    speech = (speech_probabilities(wav, SAMPLE_RATE) >= THRESHOLD).repeat_interleave(512)[: wav.shape[1]]
    assert speech.any() and not speech.all()
    assert mask[speech].all()


def test_speech_without_a_pause_is_cut_where_it_is_quietest(sentences: list[Tensor]) -> None:
    wav = torch.cat([sentences[0], sentences[1]] * 4, dim=1)
    wav = wav + 1e-4 * torch.randn(wav.shape, generator=torch.Generator().manual_seed(0))
    dip = int(0.8 * LIMIT * SAMPLE_RATE)
    wav[:, dip : dip + SAMPLE_RATE // 20] = 0.0  # 50 ms: far too short for a pause
    spans = speech_spans(wav, SAMPLE_RATE, LIMIT)
    assert len(spans) >= 3
    assert max(end - start for start, end in spans) <= LIMIT * SAMPLE_RATE
    assert [start for start, _ in spans[1:]] == [end for _, end in spans[:-1]]  # nothing between them
    assert covered(spans, wav.shape[1])[: int(0.9 * wav.shape[1])].all()
    assert dip <= spans[0][1] <= dip + SAMPLE_RATE // 20


def test_cuts_at_the_longest_pause(sentences: list[Tensor]) -> None:
    wav = torch.cat([sentences[2], pause(0.6), sentences[0], pause(0.9), sentences[1], sentences[3]], dim=1)
    assert wav.shape[1] > LIMIT * SAMPLE_RATE
    spans = speech_spans(wav, SAMPLE_RATE, LIMIT)
    longest = sentences[2].shape[1] + sentences[0].shape[1] + int(0.6 * SAMPLE_RATE)
    assert longest < spans[0][1] <= spans[1][0] < longest + 0.9 * SAMPLE_RATE
    assert len(spans) == 2


def test_another_sample_rate_gives_the_same_spans(sentences: list[Tensor]) -> None:
    wav = torch.cat([sentences[0], pause(3), sentences[1], pause(3), sentences[3]], dim=1)
    spans = speech_spans(wav, SAMPLE_RATE, LIMIT)
    others = speech_spans(resample(wav, SAMPLE_RATE, 24000), 24000, LIMIT)
    assert len(spans) == len(others) == 3
    for (start, end), (other_start, other_end) in zip(spans, others, strict=True):
        assert abs(start / SAMPLE_RATE - other_start / 24000) < 0.1
        assert abs(end / SAMPLE_RATE - other_end / 24000) < 0.1


def test_no_speech_in_long_silence() -> None:
    assert speech_spans(pause(20), SAMPLE_RATE, LIMIT) == []


def test_lanes_see_what_one_pass_sees(sentences: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    wav = torch.cat([part for _ in range(4) for s in sentences for part in (s, pause(1.3))], dim=1)
    assert wav.shape[1] > 45 * SAMPLE_RATE  # more than four lanes of 10 s
    ours = speech_probabilities(wav, SAMPLE_RATE)
    detector = load_silero_vad()
    signal = wav[0] * max(1.0, 0.5 / float(wav.abs().max()))
    theirs = torch.tensor([
        detector(torch.nn.functional.pad(piece, (0, 512 - len(piece))), SAMPLE_RATE).item()
        for piece in signal.split(512)
    ])  # fmt: skip
    assert len(ours) == len(theirs)
    monkeypatch.setattr(segmentation, "_LANES", 1)
    torch.testing.assert_close(speech_probabilities(wav, SAMPLE_RATE), ours, atol=1e-4, rtol=0)
    assert ((ours >= THRESHOLD) == (theirs >= THRESHOLD)).float().mean() > 0.99
    # The first windows differ: ours come after a silence, the detector's own before it has heard anything.
    torch.testing.assert_close(ours[100:900], theirs[100:900], atol=0.15, rtol=0)
    assert (ours - theirs)[100:900].abs().mean() < 0.005


def test_loading_the_detector_leaves_the_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "silero_vad"]:
        monkeypatch.delitem(sys.modules, name)
    segmentation._detector.cache_clear()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        speech_probabilities(pause(0.1), SAMPLE_RATE)
        assert "silero_vad" in sys.modules
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_silence_is_a_matter_of_level() -> None:
    noise = torch.randn(1, SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
    assert is_silent(torch.zeros(1, SAMPLE_RATE), SAMPLE_RATE)
    assert is_silent(torch.zeros(1, 1), SAMPLE_RATE)
    assert is_silent(0.3 + 1e-4 * noise, SAMPLE_RATE)  # a constant offset cannot be heard
    assert is_silent(10 ** (-70 / 20) * noise, SAMPLE_RATE)
    assert not is_silent(10 ** (-60 / 20) * noise, SAMPLE_RATE)
    word = torch.zeros(1, 10 * SAMPLE_RATE)
    word[:, 50000:51600] = 0.01 * noise[:, :1600]  # 0.1 s in 10 s
    assert not is_silent(word, SAMPLE_RATE)
    assert not is_silent(word[:, 50000:50100], SAMPLE_RATE)
