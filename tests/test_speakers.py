"""Speakers keep their number over a file whose spans were answered one by one."""

import random
from itertools import combinations, permutations

import pytest
import torch
from conftest import require_engine, tone
from torch import Tensor
from torch.distributions import MultivariateNormal

from serve import speakers
from serve.speakers import SIZE, WINDOW_SECONDS, link_speakers, measure_voices
from speechllm.audio import resample
from speechllm.data.synthesis import SAMPLE_RATE, VOICES, speak
from speechllm.tasks import Part, Parts, Speaker, Time

SENTENCES = (
    "A man in a red shirt is riding a bicycle down the street.",
    "Two dogs run through the snow, and one of them carries a stick.",
    "Several people wait at the station for the late train home.",
    "A little girl climbs into a wooden playhouse behind the barn.",
)
NAMES = ("flite-rms", "flite-slt", "espeak-m3")


@pytest.fixture(scope="module")
def spoken() -> dict[str, list[Tensor]]:
    """Of each voice, a sentence for each span: [samples] at 16 kHz."""
    require_engine("flite")
    require_engine("espeak-ng")
    voices = [voice for voice in VOICES if voice.name in NAMES]
    return {voice.name: [torch.from_numpy(speak(text, voice)) for text in SENTENCES] for voice in voices}


def conversation(turns: list[tuple[Tensor, int]]) -> tuple[Tensor, Parts]:
    """One turn after the other, 0.2 s between them, and the answer that tells who speaks when, by these numbers."""
    wav, parts = torch.zeros(1, 0), list[Part]()
    for speech, number in turns:
        start = wav.shape[1] / SAMPLE_RATE
        parts += [Speaker(number), Time(start), "words", Time(start + len(speech) / SAMPLE_RATE)]
        wav = torch.cat([wav, speech[None], torch.zeros(1, SAMPLE_RATE // 5)], dim=1)
    return wav, tuple(parts)


def numbers(answers: list[Parts]) -> list[list[int]]:
    return [[part.number for part in parts if isinstance(part, Speaker)] for parts in answers]


def drawn(count: int, seed: int) -> tuple[list[Tensor], list[Parts]]:
    """Spans of 5 s with two of four made-up voices each, and their answers."""
    torch.manual_seed(seed)
    people = torch.randn(4, SIZE)
    voices: list[Tensor] = []
    answers: list[Parts] = []
    for _ in range(count):
        both = people[torch.randperm(4)[:2]].repeat_interleave(10, 0)
        voices.append((both + torch.randn(20, SIZE)).half())
        answers.append((Speaker(1), Time(0.0), Time(2.5), Speaker(2), Time(2.5), Time(5.0)))
    return voices, answers


@pytest.mark.parametrize("rate", [16000, 24000])
def test_voices_are_known_again_in_later_spans(spoken: dict[str, list[Tensor]], rate: int) -> None:
    casts = [(0, 1), (1, 2), (2, 0), (1, 0)]
    wavs, answers = [], []
    for span, cast in enumerate(casts):
        turns = [(spoken[NAMES[who]][(span + who) % len(SENTENCES)], local) for local, who in enumerate(cast, start=1)]
        wav, parts = conversation(turns)
        wavs.append(resample(wav, SAMPLE_RATE, rate))
        answers.append(parts)
    linked = link_speakers([measure_voices(wav, rate) for wav in wavs], answers)
    assert numbers(linked) == [[who + 1 for who in cast] for cast in casts]
    assert numbers(answers) == [[1, 2]] * 4
    rest = [[part for part in parts if not isinstance(part, Speaker)] for parts in (*answers, *linked)]
    assert rest[:4] == rest[4:]


def test_one_speaker_stays_one(spoken: dict[str, list[Tensor]]) -> None:
    for name in NAMES:
        wavs, answers = zip(*[conversation([(speech, 1)]) for speech in spoken[name]], strict=True)
        voices = [measure_voices(wav, SAMPLE_RATE) for wav in wavs]
        assert numbers(link_speakers(voices, answers)) == [[1]] * len(SENTENCES)


def test_two_of_one_span_stay_two(spoken: dict[str, list[Tensor]]) -> None:
    speech = spoken[NAMES[0]]
    spans = [conversation([(speech[0], 1), (speech[1], 2)]), conversation([(speech[2], 1), (speech[3], 2)])]
    voices = [measure_voices(wav, SAMPLE_RATE) for wav, _ in spans]
    first, second = numbers(link_speakers(voices, [parts for _, parts in spans]))
    assert first == [1, 2]
    assert set(second) == {1, 2}


def test_numbering_in_a_span_does_not_matter() -> None:
    voices, answers = drawn(6, seed=1)
    rng = random.Random(0)
    swapped = []
    for parts in answers:
        other = rng.choice(list(permutations((4, 7))))
        swapped.append(tuple(Speaker(other[p.number - 1]) if isinstance(p, Speaker) else p for p in parts))
    assert link_speakers(voices, swapped) == link_speakers(voices, answers)
    found = numbers(link_speakers(voices, answers))
    assert found[0] == [1, 2]
    assert {number for span in found for number in span} == {1, 2, 3, 4}


def test_who_cannot_be_judged_joins_somebody() -> None:
    voices, answers = drawn(6, seed=1)
    known = numbers(link_speakers(voices, answers))
    # never alone, without an end, after the last window
    hidden: list[Parts] = [
        (Speaker(1), Time(0.0), Time(2.0), Speaker(2), Time(0.5), Time(1.0)),
        (Speaker(1), Time(1.0)),
        (Speaker(1), Time(9.0), Time(9.5)),
    ]
    linked = numbers(link_speakers([*voices, *voices[:3]], [*answers, *hidden]))
    assert linked[:6] == known
    assert linked[6][0] == known[0][0] != linked[6][1]
    assert {number for span in linked for number in span} == {1, 2, 3, 4}


def test_answers_without_speakers_are_left_alone() -> None:
    nothing = torch.zeros(0, SIZE, dtype=torch.float16)
    answers: list[Parts] = [("words",), (), (Time(0.0), "more", Time(1.0))]
    assert link_speakers([nothing] * 3, answers) == answers
    assert link_speakers([], []) == []
    alone = [(Speaker(1), Time(0.0), Time(1.0))]
    assert link_speakers([nothing], alone) == alone


def test_windows_count_as_far_as_one_speaks_alone() -> None:
    turns = {1: [(0.0, 0.5), (1.0, 1.1)], 2: [(0.375, 0.75)]}
    assert torch.stack(speakers._alone(turns, 6)).tolist() == [
        pytest.approx([1, 0.5, 0, 0, 0.4, 0]),
        pytest.approx([0, 0, 1, 0, 0, 0]),
    ]


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 24000, 48000])
def test_what_is_kept_of_a_sound(rate: int) -> None:
    wav = resample(torch.from_numpy(tone(3.1))[None], 16000, rate)
    kept = measure_voices(wav, rate)
    assert kept.dtype == torch.float16
    assert kept.shape == (int(3.1 / WINDOW_SECONDS), SIZE)
    assert kept.isfinite().all()
    for loudness in (1e-4, 8.0, 1e30):  # is no trait of a voice
        assert torch.allclose(measure_voices(wav * loudness, rate), kept, atol=0.1)
    assert kept.abs().max() > 10
    for short in (wav[:, :1], wav[:, : rate // 10], torch.zeros(1, rate // 5)):
        assert measure_voices(short, rate).shape == (1, SIZE)
        assert measure_voices(short, rate).isfinite().all()


def test_groups_are_those_of_the_likelihood_itself() -> None:
    """The same merges as by the density of all means together, computed anew for each pair."""
    torch.manual_seed(3)
    windows = torch.tensor([8.0, 3.0, 20.0, 1.0, 5.0, 12.0, 4.0, 9.0], dtype=torch.float64)
    spans = torch.tensor([0, 0, 1, 1, 2, 2, 3, 4])
    people = torch.randn(3, SIZE, dtype=torch.float64)
    means = people[[0, 1, 2, 1, 0, 1, 2, 0]] + 0.6 * torch.randn(8, SIZE, dtype=torch.float64)

    def log_prob(group: list[int]) -> float:
        noise = speakers._TURN + 1 / windows[group]
        shared = torch.full((len(group), len(group)), speakers._VOICE, dtype=torch.float64)
        return float(
            MultivariateNormal(torch.zeros(len(group)).double(), shared + noise.diag()).log_prob(means[group].T).sum()
        )

    groups = [[index] for index in range(8)]
    while True:
        gains = {
            (a, b): log_prob(groups[a] + groups[b]) - log_prob(groups[a]) - log_prob(groups[b])
            for a, b in combinations(range(len(groups)), 2)
            if not set(spans[groups[a]].tolist()) & set(spans[groups[b]].tolist())
        }
        if not gains or max(gains.values()) < speakers._MERGE:
            break
        a, b = max(gains, key=lambda pair: gains[pair])
        groups = [group for index, group in enumerate(groups) if index not in (a, b)] + [groups[a] + groups[b]]
    found = speakers._grouped(means, windows, spans)
    assert {frozenset(group) for group in groups} == {
        frozenset(index for index in range(8) if found[index] == one) for one in found
    }
    assert 1 < len(groups) < 8
