"""Conversations from single utterances: who speaks when, the mix, and the command."""

import json
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from random import Random

import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer import Typer
from typer.testing import CliRunner

from speechllm.audio import read_audio, write_audio
from speechllm.data import conversations
from speechllm.data.conversations import Clip, casts, clips_of, describe, draw, mix, overlap_share, people, spans, trim
from speechllm.data.corpus import Item
from speechllm.data.manifest import Utterance, read_manifest, write_manifest
from speechllm.data.synthesis import SAMPLE_RATE
from speechllm.errors import InputError
from train.converse import main, make, prepare

HERTZ = {"anna": 900.0, "ben": 1700.0, "carl": 2900.0, "dora": 4300.0}  # each speaker's tone
WORDS = ("One", "Two two", "three", "four four", "Five", "six")


def tone(hertz: float, seconds: float) -> torch.Tensor:
    return torch.sin(2 * torch.pi * hertz * torch.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE)[None]


def said(speaker: str | None, text: str | None, duration: float = 1.0, **known: object) -> Utterance:
    facts = {"id": f"{speaker}-{text}", "audio": f"{speaker}-{text}.wav", "source": "tones", "split": "train"}
    return Utterance.model_validate(facts | {"speaker": speaker, "text": text, "duration": duration} | known)


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of tones of 0.2 to 0.8 s with up to 0.3 s of silence before and after, two splits of two and four."""
    folder = tmp_path_factory.mktemp("tones")
    rng = Random(1)
    utterances = []
    for split, speakers in (("train", list(HERTZ)), ("dev", ["dev-anna"]), ("test", ["test-anna", "test-ben"])):
        for speaker in speakers:
            for number, text in enumerate(WORDS):
                silence = [torch.zeros(1, round(rng.uniform(0, 0.3) * SAMPLE_RATE)) for _ in range(2)]
                voice = 0.3 * tone(HERTZ[speaker.rpartition("-")[2]], rng.uniform(0.2, 0.8))
                wav = torch.cat([silence[0], voice, silence[1]], 1)
                name = f"{speaker}-{number}"
                write_audio(folder / f"{name}.wav", wav, SAMPLE_RATE)
                known = {"id": name, "audio": f"{name}.wav", "split": split, "language": "en"}
                utterances.append(said(speaker, text, round(wav.shape[-1] / SAMPLE_RATE, 3), **known))
    write_manifest(folder / "manifest.jsonl", utterances)
    return folder / "manifest.jsonl"


def items(utterances: list[Utterance], root: Path = Path("nowhere")) -> list[Item]:
    return [Item(utterance, root) for utterance in utterances]


def train_items(manifest: Path) -> list[Item]:
    return items([u for u in read_manifest(manifest) if u.split == "train"], manifest.parent)


@pytest.mark.parametrize("floor_db", [None, -45.0, -33.0])
def test_speech_is_found_within_a_block_and_keeps_a_faded_margin(floor_db: float | None) -> None:
    speech = 0.3 * tone(1500, 0.7)
    wav = torch.nn.functional.pad(speech, (8000, 6000))
    if floor_db is not None:
        wav = wav + torch.randn(wav.shape, generator=torch.Generator().manual_seed(1)) * 10 ** (floor_db / 20) * 0.3
    clip = trim(wav)
    assert clip is not None
    assert clip.end - clip.start == pytest.approx(speech.shape[-1], abs=2 * 160)
    assert (clip.start, clip.wav.shape[-1] - clip.end) == (1600, 1600)
    first = next(n for n in range(7500, 8500) if torch.equal(wav[:, n : n + 5000], clip.wav[:, 1600:6600]))
    assert first == pytest.approx(8000, abs=160)
    assert clip.wav[0, 0] == 0 and clip.wav[0, -1] == 0


def test_clicks_and_silence_are_not_speech() -> None:
    speech = torch.nn.functional.pad(0.3 * tone(1500, 0.5), (8000, 8000))
    clicks = speech.clone()
    clicks[:, 1000:1100], clicks[:, -1000:-800] = 0.5, 0.5
    found, alone = trim(clicks), trim(speech)
    assert found is not None and alone is not None and torch.equal(found.wav, alone.wav)
    consonant = speech.clone()  # nearer than a fifth of a second it is part of a word
    consonant[:, 16000 + 1600 : 16000 + 1900] = 0.3 * torch.sin(torch.arange(300.0))
    found = trim(consonant)
    assert found is not None and found.end - found.start > alone.end - alone.start + 1500
    for silent in (torch.zeros(1, 16000), torch.zeros(1, 100), 1e-5 * torch.randn(1, 16000), clicks[:, :4000]):
        assert trim(silent) is None


def test_who_can_talk_to_whom() -> None:
    timed = {"segments": [{"speaker": "anna", "start": 0.1, "end": 0.9, "text": "b"}]}  # as synthesised
    usable = [said("anna", "a"), said("anna", "b", **timed), said("ben", None, id="x"), said("flite-slt", "a")]
    unusable = [
        said(None, "a", id="who"),
        said("carl", " "),
        said("carl", "a b", segments=[{"speaker": "carl", "start": n / 2, "end": n / 2 + 0.4} for n in range(2)]),
    ]
    other = [said("rhvoice-slt", "a"), said("anna", "c", source="elsewhere")]
    found = people(items(usable + unusable + other))
    voices = {person: [[i.utterance.id for i in voice] for voice in voices] for person, voices in found.items()}
    assert voices == {
        "anna": [["anna-a", "anna-b"], ["anna-c"]],
        "ben": [["x"]],
        "slt": [["flite-slt-a"], ["rhvoice-slt-a"]],  # two engines, one person
    }
    able = casts(found, 20.0)
    assert {size: sorted(cast.people) for size, cast in able.items()} == {
        1: ["anna"],  # whoever speaks alone needs two things to say
        2: ["anna", "ben", "slt"],
        3: ["anna", "ben", "slt"],
    }
    for seed in range(60):
        plan = draw(able, 20.0, True, Random(seed))
        assert not {"flite-slt", "rhvoice-slt"} <= plan.levels.keys()
        assert len({turn.item.utterance.source for turn in plan.turns if turn.speaker == "anna"}) <= 1
    with pytest.raises(InputError, match="two speakers with clips short enough"):
        casts(found, 4.0)
    with pytest.raises(InputError, match="of 1 known speaker there"):
        casts(people(items([said("anna", "a"), said("anna", "b")])), 20.0)


def test_who_has_more_to_say_is_heard_more_often_but_not_in_proportion() -> None:
    many = [said("anna", f"sentence {n}") for n in range(100)]
    few = [said(f"p{n}", "yes") for n in range(10)]
    able = casts(people(items(many + few)), 20.0)
    plans = [draw(able, 20.0, True, Random(seed)) for seed in range(600)]
    pairs = [plan.levels.keys() for plan in plans if len(plan.levels) == 2]
    with_anna = sum("anna" in pair for pair in pairs) / len(pairs)
    expected = 0.5 + 0.5 * 10 / 19  # first: 10 of 20, or second, of the 19 that are then left
    assert with_anna == pytest.approx(expected, abs=0.08)
    assert {name for pair in pairs for name in pair} == {"anna", *(f"p{n}" for n in range(10))}


def test_words_that_nobody_says_are_not_told(tones: Path) -> None:
    spelt = [
        item
        if item.utterance.speaker != "anna"
        else replace(
            item, utterance=item.utterance.model_copy(update={"labels": {"text_note": "spelt letter by letter"}})
        )
        for item in train_items(tones)
    ]
    plan = draw(casts(people(spelt), 12.0), 12.0, False, Random(3))
    segments = describe(plan, clips_of(plan))["segments"]
    assert isinstance(segments, tuple)
    assert {bool(segment.text) for segment in segments if segment.speaker != "anna"} == {True}
    alone = casts(people([item for item in spelt if item.utterance.speaker in ("anna", "ben")]), 12.0)
    plan = next(p for p in (draw(alone, 12.0, False, Random(s)) for s in range(99)) if "anna" in p.levels)
    segments = describe(plan, clips_of(plan))["segments"]
    assert isinstance(segments, tuple)
    assert {segment.text for segment in segments if segment.speaker == "anna"} == {""}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.floats(4, 40), st.booleans(), st.randoms(use_true_random=False))
def test_plans_hold_what_they_promise(seed: int, max_seconds: float, varied: bool, rng: Random) -> None:
    """Also for clips without a sample of silence around the speech, which are longest."""
    corpus = [
        said(name, text, rng.uniform(0.05, 0.25 if n < 3 else 12.0)) for name in HERTZ for n, text in enumerate(WORDS)
    ]
    able = casts(people(items(corpus)), max_seconds)
    plan = draw(able, max_seconds, varied, Random(seed))
    assert plan == draw(able, max_seconds, varied, Random(seed))
    assert 2 <= len(plan.turns) <= 8 and 1 <= len(plan.levels) <= 3
    assert {turn.speaker for turn in plan.turns} == set(plan.levels)
    assert all(abs(a - b) <= 6 for a, b in combinations(plan.levels.values(), 2))
    repeated = len(plan.turns) - len({str(turn.item.utterance.text) for turn in plan.turns})
    assert repeated == 0 or max_seconds < 8, "each has three sentences of at most 0.25 s"
    assert varied or plan.rt60 is plan.snr_db is None
    sizes = [round(turn.item.utterance.duration * SAMPLE_RATE) for turn in plan.turns]
    clips = [Clip(torch.zeros(1, size), 0, size) for size in sizes]
    placed = spans(plan, clips)
    assert placed[-1][1] / SAMPLE_RATE + plan.edges[1] <= max_seconds
    assert [end - start for start, end in placed] == sizes
    assert placed == sorted(placed) and all(a[1] < b[1] for a, b in pairwise(placed))
    assert all(a[1] <= c[0] for a, c in zip(placed, placed[2:], strict=False)), "never three at once"
    for (before, after), (turn, following) in zip(pairwise(placed), pairwise(plan.turns), strict=True):
        seconds = (after[0] - before[1]) / SAMPLE_RATE
        if following.pause is None:
            assert turn.speaker != following.speaker
            assert 0 <= -seconds * SAMPLE_RATE <= plan.overlap * min(before[1] - before[0], after[1] - after[0])
        else:
            assert seconds == pytest.approx(following.pause, abs=1e-4) and 0.1 <= following.pause <= 1.2
    # with every turn but the first overlapping
    assert plan.overlap <= 0.4 and 0 <= overlap_share(placed) <= plan.overlap / (1 - plan.overlap)
    heard = [0] * placed[-1][1]
    for start, end in placed:
        heard[start:end] = [n + 1 for n in heard[start:end]]
    assert overlap_share(placed) == pytest.approx(heard.count(2) / (len(heard) - heard.count(0)))


def test_a_sentence_is_repeated_only_when_there_is_nothing_else() -> None:
    able = casts(people(items([said("anna", "Hi!"), said("ben", "hi")])), 20.0)
    for seed in range(20):
        assert sorted(turn.speaker for turn in draw(able, 20.0, True, Random(seed)).turns) == ["anna", "ben"]


def test_conversations_differ_in_size_and_turns_change_hands() -> None:
    able = casts(people(items([said(name, text) for name in HERTZ for text in "abcdefgh"])), 20.0)
    plans = [draw(able, 20.0, True, Random(seed)) for seed in range(300)]
    assert {len(plan.levels) for plan in plans} == {1, 2, 3} and {len(plan.turns) for plan in plans} == set(range(2, 9))
    changes = [a.speaker != b.speaker for plan in plans if len(plan.levels) > 1 for a, b in pairwise(plan.turns)]
    assert 0.7 < sum(changes) / len(changes) < 0.95
    assert {plan.rt60 is None for plan in plans} == {plan.snr_db is None for plan in plans} == {True, False}


def energy_where(wav: torch.Tensor, hertz: float) -> torch.Tensor:
    """Power around a frequency in 10 ms blocks of ``wav [1, samples]``: ``[blocks]``."""
    blocks = wav[0, : wav.shape[-1] // 160 * 160].reshape(-1, 160)
    phase = 2 * torch.pi * hertz * torch.arange(160) / SAMPLE_RATE
    window = torch.hann_window(160)
    return (blocks @ (window * torch.cos(phase))) ** 2 + (blocks @ (window * torch.sin(phase))) ** 2


@pytest.mark.parametrize("seed", range(12))
def test_segments_are_where_each_speaker_sounds(tones: Path, seed: int) -> None:
    plan = draw(casts(people(train_items(tones)), 12.0), 12.0, False, Random(seed))
    clips = clips_of(plan)
    wav, known = mix(plan, clips), describe(plan, clips)
    assert wav.dtype == torch.float32 and wav.shape[0] == 1 and wav.shape[-1] <= 12 * SAMPLE_RATE
    labels, segments = known["labels"], known["segments"]
    assert isinstance(labels, dict) and isinstance(segments, tuple)
    assert labels["num_speakers"] == len(plan.levels) and known["language"] == "en"
    for speaker in HERTZ:
        energy = energy_where(wav, HERTZ[speaker])
        expected = torch.zeros(len(energy))
        for segment in segments:
            if segment.speaker == speaker:
                expected[round(segment.start * 100) : round(segment.end * 100)] = 1
                assert segment.text in WORDS
        found = (energy > 0.02 * energy.max()).float() if expected.any() else (energy > 0.1).float()
        turns = sum(segment.speaker == speaker for segment in segments)
        assert (found != expected).sum() <= 6 * turns, "two edges a turn, each off by three blocks at most"


def test_the_mix_is_the_sum_of_its_sources(tones: Path) -> None:
    able = casts(people(train_items(tones)), 12.0)
    for seed in range(8):
        plan = draw(able, 12.0, False, Random(seed))
        clips = clips_of(plan)
        wav = mix(plan, clips)
        total = torch.zeros_like(wav)
        for turn, clip, (start, end) in zip(plan.turns, clips, spans(plan, clips), strict=True):
            speech = clip.wav[:, clip.start : clip.end]
            gain = 10 ** (plan.levels[turn.speaker] / 20) / speech.square().mean().sqrt()
            total[:, start - clip.start : end + clip.wav.shape[-1] - clip.end] += gain * clip.wav
        assert total.abs().max() < 0.99 and torch.allclose(wav, total, atol=1e-6)


def test_room_and_noise_are_added_and_nothing_clips(tones: Path) -> None:
    plain = draw(casts(people(train_items(tones)), 12.0), 12.0, False, Random(3))
    clips = clips_of(plain)
    facts = {"turns": plain.turns, "overlap": plain.overlap, "edges": plain.edges, "levels": plain.levels, "seed": 5}
    dry, wet = mix(plain, clips), mix(conversations.Plan(**facts, rt60=0.5), clips)
    assert wet.shape == dry.shape
    first, _ = spans(plain, clips)[0]
    direct = slice(first, first + 40)  # no reflection arrives within 2.5 ms
    assert torch.allclose(wet[:, direct], dry[:, direct], atol=1e-4) and not torch.allclose(wet, dry, atol=1e-3)
    noisy = mix(conversations.Plan(**facts, snr_db=20.0), clips)
    ratio = 10 * torch.log10(dry.square().mean() / (noisy - dry).square().mean())
    assert float(ratio) == pytest.approx(20, abs=0.05)
    loud = mix(conversations.Plan(**facts | {"levels": dict.fromkeys(plain.levels, 6.0)}), clips)
    assert float(loud.abs().max()) == pytest.approx(0.99, abs=1e-4)


def command(*arguments: object) -> tuple[int, str]:
    app = Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_command_resumes_and_gives_the_same_files(tones: Path, tmp_path: Path) -> None:
    line = (tones, "--seed", 7, "--max-seconds", 10, "--count")
    code, output = command(*line, 6, "--out", tmp_path / "a" / "talk", "--jobs", 1)
    assert code == 0 and "6 made, 0 kept" in output
    code, output = command(*line, 2, "--out", tmp_path / "b" / "talk", "--jobs", 2)
    assert code == 0
    with (tmp_path / "b" / "talk" / "manifest.jsonl").open("a") as file:
        file.write('{"id": "talk/2", "aud')  # what a kill leaves behind
    code, output = command(*line, 6, "--out", tmp_path / "b" / "talk", "--jobs", 2)
    assert code == 0 and "4 made, 2 kept" in output
    files = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert len(files) == 8
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    for utterance in read_manifest(tmp_path / "a" / "talk" / "manifest.jsonl"):
        assert (utterance.text, utterance.speaker, utterance.split) == (None, None, "train")
        assert 2 <= len(utterance.segments) <= 8 and {s.speaker for s in utterance.segments} <= set(HERTZ)
        wav = read_audio(tmp_path / "a" / "talk" / utterance.audio, SAMPLE_RATE)
        assert utterance.duration == pytest.approx(wav.shape[-1] / SAMPLE_RATE, abs=1e-3) and utterance.duration <= 10
    code, output = command(*line, 6, "--out", tmp_path / "a" / "talk", "--split", "test")
    assert code == 2 and "a corpus made with other settings is here" in output


def test_speakers_are_of_the_split_and_only_the_clips_needed_are_read(tones: Path, tmp_path: Path) -> None:
    plan = prepare([tones], tmp_path / "one", "test", seed=1, max_seconds=8)
    made = [make(plan, index).utterance for index in range(6)]
    assert {s.speaker for u in made if u is not None for s in u.segments} == {"test-anna", "test-ben"}
    elsewhere = tmp_path / "manifest.jsonl"  # the same without any audio
    elsewhere.write_text(tones.read_text())
    plan = prepare([elsewhere], tmp_path / "two", "train")
    outcome = make(plan, 0)
    assert outcome.utterance is None and outcome.failure.startswith("conversation 0: ") and ".wav" in outcome.failure
    needed = conversations.draw(plan.casts, plan.max_seconds, True, Random(f"{plan.seed} 0")).turns
    for turn in needed:
        name = turn.item.utterance.audio
        (tmp_path / name).write_bytes((tones.parent / name).read_bytes())
    assert make(plan, 0).utterance is not None


def test_clips_that_are_not_what_their_manifest_says_fail_alone(tones: Path, tmp_path: Path) -> None:
    for utterance in read_manifest(tones):
        write_audio(tmp_path / utterance.audio, torch.zeros(1, 8000), SAMPLE_RATE)
    (tmp_path / "manifest.jsonl").write_text(tones.read_text())
    assert "no speech in it" in make(prepare([tmp_path / "manifest.jsonl"], tmp_path / "o", "train"), 0).failure
    long = [u.model_copy(update={"duration": 0.1}) for u in read_manifest(tones)]
    write_manifest(tmp_path / "manifest.jsonl", long)
    assert "not 0.1 s" in make(prepare([tmp_path / "manifest.jsonl"], tmp_path / "o", "train"), 0).failure
    code, output = command(tmp_path / "manifest.jsonl", "--count", 2, "--jobs", 1, "--out", tmp_path / "o")
    assert code == 1 and "0 made, 0 kept from before, 2 failed" in output


def test_noise_of_a_recorded_set(tones: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hiss"
    folder.mkdir()
    soundfile.write(folder / "a.wav", torch.randn(16000).mul(0.1).numpy(), SAMPLE_RATE)
    (folder / "manifest.jsonl").write_text(json.dumps({"audio": "a.wav", "duration": 1.0, "split": "train"}) + "\n")
    plan = prepare([tones], tmp_path / "o", "train", noise=folder)
    labels = [utterance.labels for index in range(16) if (utterance := make(plan, index).utterance)]
    assert len(labels) == 16 and any("snr_db" in label for label in labels) and any("rt60" in label for label in labels)


def test_bad_input_is_one_line_and_exit_code_2(tones: Path, tmp_path: Path) -> None:
    rest = ("--count", 1, "--jobs", 1, "--out", tmp_path / "o")
    for arguments, message in (
        ((tones, "--split", "dev"), "needs two speakers with clips short enough"),
        ((tones, "--split", "nowhere"), "--split"),
        ((tones, "--max-seconds", 1), "--max-seconds"),
        ((tones, "--split", "test", "--noise", tmp_path), "test conversations have no noise"),
        ((tones, "--noise", tmp_path / "no"), "no such manifest"),
        ((tones, "--noise", tmp_path), "no manifest.jsonl in this folder"),
        ((tones, tones), "more than one clip has this id"),
        ((tmp_path / "none.jsonl",), "no such manifest"),
    ):
        code, output = command(*arguments, *rest)
        assert code == 2 and message in " ".join(output.split()), output
        assert "Traceback" not in output
    assert not (tmp_path / "o").exists()
