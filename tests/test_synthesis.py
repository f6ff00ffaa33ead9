"""Voices, engines, and the command that makes a corpus with them."""

import gzip
import json
import shutil
import string
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import require_engine, table
from typer import Typer
from typer.testing import CliRunner

from speechllm.data import synthesis
from speechllm.data.ambience import MAX_SILENCE, room_for
from speechllm.data.manifest import read_manifest
from speechllm.data.recorded import Sentence
from speechllm.data.synthesis import SAMPLE_RATE, VOICES, Voice, speak, voices
from speechllm.errors import InputError
from speechllm.tasks import TASKS, Facts
from train.making import indices_done
from train.synthesize import DIGITS, Plan, digits_text, fragment_of, main, make

BY_NAME = {voice.name: voice for voice in VOICES}
CAPTIONS = ("A man in a red hat & scarf, waiting.", "Two dogs run.", "A boy jumps into the lake.", "She sings.")

ENGINES = ("--engine", "flite", "--engine", "espeak")  # those that CI has


def pitch_of(wav: np.ndarray) -> float:
    """Median over the voiced 40 ms pieces of the autocorrelation's best period, in Hz."""
    size, shortest, longest = SAMPLE_RATE // 25, SAMPLE_RATE // 350, SAMPLE_RATE // 60
    found = []
    for start in range(0, len(wav) - size, size):
        piece = wav[start : start + size] - wav[start : start + size].mean()
        similarity = np.correlate(piece, piece, "full")[size - 1 :]
        period = shortest + int(similarity[shortest:longest].argmax())
        if similarity[0] > 0.1 and similarity[period] > 0.5 * similarity[0]:
            found.append(SAMPLE_RATE / period)
    return float(np.median(found))


def test_no_person_is_in_two_splits_and_names_are_unique() -> None:
    splits = defaultdict(set)
    for voice in VOICES:
        splits[voice.person].add(voice.split)
    assert len(splits) >= 8
    assert all(len(found) == 1 for found in splits.values())
    assert len(BY_NAME) == len(VOICES)
    # The same recorded speaker must carry the same person, whatever the engine: these pairs are one voice donor each.
    assert BY_NAME["flite-slt"].person == BY_NAME["rhvoice-slt"].person
    assert BY_NAME["flite-awb"].person == BY_NAME["rhvoice-alan"].person
    assert BY_NAME["flite-kal16"].person == BY_NAME["festival-kal"].person


def test_every_split_of_every_language_has_voices_and_none_is_most_of_it() -> None:
    accented = {"mbrola-us3", "mbrola-de4-en", "mbrola-de5-en"}
    assert {voice.name for voice in voices("test")} == {"rhvoice-clb", "rhvoice-bdl", *accented}
    assert {voice.name for voice in voices("dev")} == {"festival-ked", "pico-en-gb"}
    for language in ("en", "de", "fr"):
        shares = [voice.share for voice in voices("train", language)]
        assert min(shares) > 0 and max(shares) < sum(shares) / 2
        assert voices("dev", language) and voices("test", language)
    assert voices("train", "cs") == []


def test_every_english_voice_has_an_accent_that_a_task_knows_and_test_voices_one_that_is_trained() -> None:
    for voice in VOICES:
        known = TASKS["accent"].write(Facts(1.0, labels={} if voice.accent is None else {"accent": voice.accent}))
        assert known == ((voice.accent,) if voice.language == "en" else None), voice.name
    for split in ("dev", "test"):
        assert {voice.accent for voice in voices(split)} <= {voice.accent for voice in voices("train")}
    accents = {name: BY_NAME[name].accent for name in ("mbrola-us3", "mbrola-de4-en", "rhvoice-alan", "pico-en-gb")}
    assert list(accents.values()) == ["American", "German", "Scottish", "British"]
    assert len({voice.accent for voice in voices("test")}) > 1


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("flite-slt", "flite"),
        ("espeak-f2", "espeak-ng"),
        ("espeak-de-m2", "espeak-ng"),
        ("mbrola-de2-en", "mbrola"),
        ("festival-ked", "text2wave"),
        ("pico-en-us", "pico2wave"),
        ("rhvoice-alan", "RHVoice-test"),
    ],
)
def test_engines_speak_and_obey_rate_and_markup_is_text(name: str, program: str) -> None:
    if program in ("flite", "espeak-ng"):
        require_engine(program)
    elif shutil.which(program) is None:
        pytest.skip(f"{program} is optional, and not installed")
    text = "The cat </speed> & the dog < sit on 'a' mat."
    plain = speak(text, BY_NAME[name])
    assert plain.dtype == np.float32
    assert plain.ndim == 1
    assert 1.0 < len(plain) / SAMPLE_RATE < 8.0
    assert 0.01 < np.abs(plain).max() <= 1.01
    slow, fast = (len(speak(text, BY_NAME[name], rate=rate)) for rate in (0.85, 1.2))
    assert slow > 1.15 * fast
    edge = np.abs(plain[-SAMPLE_RATE // 4 :]).max()
    assert edge > 0.003, "the silence after the speech is still there"


@pytest.mark.parametrize(("name", "program"), [("flite-slt", "flite"), ("espeak-m1", "espeak-ng")])
def test_pitch_follows(name: str, program: str) -> None:
    require_engine(program)
    low, high = (pitch_of(speak(CAPTIONS[0], BY_NAME[name], pitch=pitch)) for pitch in (0.9, 1.1))
    assert 1.08 < high / low < 1.4


def test_missing_engine_or_voice_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("RHVoice-test", "text2wave", "espeak-ng"):
        (tmp_path / program).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="apt-get install flite"):
        speak("hello", BY_NAME["flite-slt"])
    for engine, package in (
        ("rhvoice", "rhvoice-english"),
        ("festival", "festvox-kallpc16k"),
        ("mbrola", "mbrola mbrola-such"),
    ):
        with pytest.raises(InputError, match=f"no-such-voice: apt-get install {package}"):
            speak("hello", Voice("x", engine, "no-such-voice", "x", "en", "male", "train", 1.0))  # type: ignore[arg-type]


def test_blank_text_is_the_users_error_and_silence_the_engines() -> None:
    require_engine("espeak-ng")
    with pytest.raises(InputError, match="no text"):
        speak("  \n", BY_NAME["espeak-f1"])
    with pytest.raises(synthesis.EngineError, match="espeak-f1: "):
        speak("...", BY_NAME["espeak-f1"])


def test_fragments_and_digits() -> None:
    rng = np.random.default_rng(0)
    fragments = {fragment_of(CAPTIONS[0], rng) for _ in range(200)}
    assert len(fragments) > 10
    assert all(fragment in CAPTIONS[0] for fragment in fragments)
    assert all(not fragment or fragment[-1] not in string.punctuation for fragment in fragments)
    assert {len(fragment.split()) for fragment in fragments} >= {1, 2, 3, 4}
    sizes = [len(digits_text(rng).split()) for _ in range(400)]
    assert set(sizes) == set(range(1, 7))
    assert 0.4 < sizes.count(1) / 400 < 0.6


def test_level_and_snr_are_what_was_asked_for() -> None:
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    tone = np.sin(2 * np.pi * 440 * time).astype(np.float32)
    clean, start = room_for(tone, -20.0, None, None, np.random.default_rng(1))
    noisy, _ = room_for(tone, -20.0, 15.0, None, np.random.default_rng(1))
    noise_db = 10 * np.log10(np.square(noisy - clean).mean())
    assert 10 * np.log10(np.square(clean).sum() / SAMPLE_RATE) == pytest.approx(-20.0, abs=0.01)
    assert noise_db == pytest.approx(-35.0, abs=0.01)
    assert SAMPLE_RATE <= len(clean) <= 1.6 * SAMPLE_RATE
    assert np.allclose(clean[start : start + SAMPLE_RATE], tone * (0.1 / np.sqrt(0.5)), atol=1e-6)
    assert np.abs(room_for(tone, 0.0, None, None, np.random.default_rng(1))[0]).max() <= 0.9901


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    path = tmp_path / "captions.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for number, text in enumerate(CAPTIONS):
            file.write(json.dumps({"id": f"c{number}", "en": text, "de": f"Satz {number}"}) + "\n")
    return path


def test_utterance_follows_from_seed_and_index(tmp_path: Path) -> None:
    require_engine("flite")
    require_engine("espeak-ng")
    items = tuple(Sentence(f"c{n}", text, {"de": f"Satz {n}"}) for n, text in enumerate(CAPTIONS))
    made = []
    for folder in ("one", "two"):
        plan = Plan(
            "set", tmp_path / folder, "captions.jsonl.gz", items, "en", "train", 0.5, 7, None, ("flite", "espeak")
        )
        made.append([make(plan, index).utterance for index in range(8)])
    assert made[0] == made[1]
    assert None not in made[0]
    for utterance in made[0]:
        assert utterance is not None
        wavs = [soundfile.read(tmp_path / folder / utterance.audio) for folder in ("one", "two")]
        assert np.array_equal(wavs[0][0], wavs[1][0])
        assert wavs[0][1] == SAMPLE_RATE
        assert len(wavs[0][0]) / SAMPLE_RATE == pytest.approx(utterance.duration, abs=1e-3)
        whole = items[int(str(utterance.labels["sentence_id"])[1:])]
        assert utterance.text == whole.text or (str(utterance.text) in whole.text and not utterance.translations)
    turns = [[u.labels["sentence_id"] for u in made[0][start : start + 4] if u] for start in (0, 4)]
    assert all(sorted(turn) == ["c0", "c1", "c2", "c3"] for turn in turns), "every caption once before any repeats"


def test_segments_are_where_the_speech_is(tmp_path: Path) -> None:
    require_engine("flite")
    require_engine("espeak-ng")
    plan = Plan("set", tmp_path, "digits", (), "en", "train", 0.0, 7, None, ("flite", "espeak"))
    clean = 0
    for index in range(8):
        utterance = make(plan, index).utterance
        assert utterance is not None
        ((speaker, start, end, text),) = [(s.speaker, s.start, s.end, s.text) for s in utterance.segments]
        assert (speaker, text) == (utterance.speaker, utterance.text)
        assert 0 <= start <= MAX_SILENCE and utterance.duration - MAX_SILENCE - 1e-3 <= end <= utterance.duration
        if "snr_db" not in utterance.labels:  # silence is exact then
            clean += 1
            sound = np.flatnonzero(soundfile.read(tmp_path / utterance.audio)[0]) / SAMPLE_RATE
            assert start - 1e-3 <= sound[0] < start + 0.06 and end - 0.06 < sound[-1] <= end + 1e-3
    assert clean > 2


def test_what_the_speaker_wants_is_told_of_whole_sentences_alone(tmp_path: Path) -> None:
    require_engine("flite")
    order = Sentence("s0", "A large coffee with milk, please.", {}, "order", {"drink": "coffee"})
    for fragments in (0.0, 1.0):
        out = tmp_path / str(fragments)
        made = make(Plan("set", out, "s", (order,), "en", "train", fragments, 3, None, ("flite",)), 0).utterance
        assert made is not None and made.labels["sentence_id"] == "s0"
        assert made.labels["accent"] == BY_NAME[str(made.speaker)].accent
        assert (made.text == order.text) == (made.intent == "order") == (not fragments)
        assert made.slots == ({} if fragments else {"drink": "coffee"})


def command(*arguments: str) -> tuple[int, str]:
    app = Typer()
    app.command()(main)
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def test_command_is_resumable(tmp_path: Path) -> None:
    require_engine("flite")
    require_engine("espeak-ng")
    out = tmp_path / "digits"
    arguments = ("--text", "digits", "--seed", "3", "--out", str(out), "--jobs", "1", *ENGINES, "--count")
    code, output = command(*arguments, "3")
    assert code == 0
    assert "3 made, 0 kept" in output
    before = (out / "manifest.jsonl").read_text()
    with (out / "manifest.jsonl").open("a") as file:
        file.write('{"id": "digits/3", "audi')  # what a kill leaves behind
    code, output = command(*arguments, "5")
    assert code == 0
    assert "2 made, 3 kept" in output
    assert (out / "manifest.jsonl").read_text().startswith(before)
    utterances = read_manifest(out / "manifest.jsonl")
    assert [utterance.id for utterance in utterances] == [f"digits/{index}" for index in range(5)]
    assert all(set(str(utterance.text).split()) <= set(DIGITS) for utterance in utterances)
    assert indices_done(out / "manifest.jsonl") == set(range(5))
    code, output = command(*arguments, "2")
    assert code == 0
    assert "0 made, 5 kept from before, 0 failed; 3 are beyond --count, and stay in the manifest" in output
    code, output = command("--text", "digits", "--seed", "4", "--out", str(out), *ENGINES, "--count", "9")
    assert code == 2
    assert "a corpus made with other settings is here" in output
    (out / "settings.json").unlink()
    code, output = command(*arguments, "9")
    assert code == 2
    assert "manifest.jsonl: of a corpus that was not made by this command" in output
    assert len(read_manifest(out / "manifest.jsonl")) == 5


def test_command_reports_bad_input_without_a_traceback(tmp_path: Path, captions: Path) -> None:
    code, output = command("--text", str(tmp_path / "no.jsonl.gz"), "--out", str(tmp_path / "o"), "--count", "1")
    assert code == 2
    assert "no such file of sentences" in output
    code, output = command(
        "--text", "digits", "--split", "test", *ENGINES, "--out", str(tmp_path / "o"), "--count", "1"
    )
    assert code == 2
    assert "has a voice for --split test" in output
    code, output = command("--text", str(captions), "--split", "x", "--out", str(tmp_path / "o"), "--count", "1")
    assert code == 2
    assert "--split" in output
    once = ("--count", "1", "--out")
    noise = ("--text", "nonspeech", "--split", "dev", "--noise", str(tmp_path), *once, str(tmp_path / "o"))
    for given, told in (
        (noise, "dev speech has no recorded noise"),
        (("--text", "digits", "--fragments", "0.5", *once, str(tmp_path / "o")), "no sentences to take fragments of"),
        (("--text", "nonspeech", *ENGINES, *once, str(tmp_path / "o")), "nobody speaks in nonspeech"),
        (("--text", "nonspeech", *once, str(captions)), "cannot be made (File exists)"),
    ):
        code, output = command(*given)
        assert (code, output.count("error: ")) == (2, 1), output
        assert told in output


def test_other_sentences_are_another_corpus(tmp_path: Path) -> None:
    require_engine("espeak-ng")
    text = table(tmp_path / "own.txt", "A dog runs.", "It rains.")
    command_line = ("--text", str(text), "--engine", "espeak", "--jobs", "1", "--out", str(tmp_path / "o"), "--count")
    assert command(*command_line, "1")[0] == 0
    table(text, "A cat runs.", "It rains.")
    code, output = command(*command_line, "2")
    assert code == 2
    assert "a corpus made with other settings is here" in output


def test_captions_are_spoken_in_the_language_asked_for(tmp_path: Path, captions: Path) -> None:
    require_engine("espeak-ng")
    command_line = ("--text", str(captions), "--engine", "espeak", "--jobs", "1", "--count", "2", "--out")
    assert command(*command_line, str(tmp_path / "de"), "--language", "de")[0] == 0
    for utterance in read_manifest(tmp_path / "de" / "manifest.jsonl"):
        number = str(utterance.labels["sentence_id"])[1:]
        assert (utterance.language, utterance.text) == ("de", f"Satz {number}")
        assert utterance.translations == {"en": CAPTIONS[int(number)]}
        assert BY_NAME[str(utterance.speaker)].language == "de"
    code, output = command(*command_line, str(tmp_path / "fr"), "--language", "fr")
    assert code == 2
    assert "no sentence in fr" in output
    code, output = command("--text", "digits", "--language", "de", "--count", "1", "--out", str(tmp_path / "d"))
    assert code == 2
    assert "spoken in English only" in output


def test_lines_of_a_text_are_spoken_in_the_language_asked_for(tmp_path: Path) -> None:
    require_engine("espeak-ng")
    (tmp_path / "own.txt").write_text("Ein Hund bellt.\n\nEs regnet.\n")
    command_line = ("--text", str(tmp_path / "own.txt"), "--engine", "espeak", "--jobs", "1", "--count", "2")
    assert command(*command_line, "--out", str(tmp_path / "de"), "--language", "de")[0] == 0
    utterances = read_manifest(tmp_path / "de" / "manifest.jsonl")
    assert {(u.labels["sentence_id"], u.text, u.language) for u in utterances} == {
        ("1", "Ein Hund bellt.", "de"),
        ("3", "Es regnet.", "de"),
    }
    assert all(u.translations == {} for u in utterances)


def test_nonspeech_has_an_empty_text_and_no_speaker(tmp_path: Path) -> None:
    plan = Plan("quiet", tmp_path, "nonspeech", (), "en", "train", 0.0, 3, None)
    for index in range(12):
        utterance = make(plan, index).utterance
        assert utterance is not None and utterance.text == "" and utterance.speaker is None
        assert utterance.segments == () and "accent" not in utterance.labels
        wav, rate = soundfile.read(tmp_path / utterance.audio)
        assert rate == SAMPLE_RATE and np.isfinite(wav).all() and np.abs(wav).max() <= 1.0
        assert utterance.duration == pytest.approx(len(wav) / rate, abs=1e-4)
