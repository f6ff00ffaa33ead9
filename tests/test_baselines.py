"""Baselines: they tell what can be told, are at chance where nothing can, and say what they do not do."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import RATE, require_engine
from pyannote.core import Segment as Stretch
from pyannote.core import Timeline
from test_answerer import lively

from serve.answer import Answer
from serve.answerer import Answerer
from serve.inputs import NO_AUDIO
from speechllm.checkpoint import Checkpoint
from speechllm.data.corpus import read_corpus
from speechllm.data.manifest import Utterance, write_manifest
from speechllm.data.synthesis import SAMPLE_RATE, VOICES, speak
from speechllm.errors import InputError
from speechllm.metrics import wer
from speechllm.tasks import TASKS, ParsedAnswer, Segment, Task
from train.baseline_features import CEPSTRA, SIZE, STATISTICS, features
from train.baseline_labels import Majority, Svm
from train.baseline_vad import EnergyVad, SileroVad
from train.baseline_words import Cascade, PocketSphinx
from train.baselines import BASELINES, make_baseline
from train.questions import Advance, Question, pose

EMOTION, ACTIVITY, TRANSCRIBE = TASKS["emotion"], TASKS["activity"], TASKS["transcribe"]
SPLITS = {"train": 40, "dev": 16, "test": 24}
SENTENCE = "Ten men ran in the sun."


def hum(hertz: float, seconds: float, seed: int) -> np.ndarray:
    """A voice of sorts, its pitch rising, with some noise over it; float32 at RATE."""
    time = np.arange(round(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(hertz * (1 + 0.1 * time)) / RATE
    wave = sum(np.sin(number * phase) / number for number in range(1, 6))
    return (0.1 * wave + 0.005 * np.random.default_rng(seed).standard_normal(len(time))).astype(np.float32)


def made(folder: Path, label: Callable[[int, Random], str], hertz: Callable[[int], float]) -> Path:
    """A set of hums with an emotion each, in three splits."""
    rng, utterances = Random(0), list[Utterance]()
    for split, count in SPLITS.items():
        for number in range(count):
            name, seed = f"{split}-{number}", len(utterances)
            soundfile.write(
                folder / f"{name}.wav", hum(hertz(number) + 3 * (seed % 7), 0.5 + 0.01 * number, seed), RATE
            )
            facts: Any = {"split": split, "duration": 0.5 + 0.01 * number, "labels": {"emotion": label(number, rng)}}
            utterances.append(Utterance(id=name, audio=f"{name}.wav", source="made", **facts))
    write_manifest(folder / "manifest.jsonl", utterances)
    return folder


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Anger is high, sadness low; a third of the clips is angry."""
    return made(
        tmp_path_factory.mktemp("told"),
        lambda number, rng: "sadness" if number % 3 else "anger",
        lambda number: 110.0 if number % 3 else 240.0,
    )


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sounds, labels at random."""
    return made(
        tmp_path_factory.mktemp("shuffled"),
        lambda number, rng: rng.choice(["sadness", "anger"]),
        lambda number: 110.0 if number % 3 else 240.0,
    )


def answered(system: Any, data: Path, task: Task) -> tuple[list[ParsedAnswer], list[ParsedAnswer]]:
    """What is right about the test split, and what the system says, whose progress is told to the last clip."""
    questions = pose(read_corpus([data], "test"), task)
    told: list[int] = []
    said = system.answer(questions, task, told.append)
    assert sum(told) == len(said) == len(questions) > 0
    return [task.read(question.answer) for question in questions], said


def recall(true: Sequence[ParsedAnswer], said: Sequence[ParsedAnswer]) -> float:
    """Unweighted average recall."""
    shares = []
    for label in {one.label for one in true}:
        own = [s.label == label for t, s in zip(true, said, strict=True) if t.label == label]
        shares.append(sum(own) / len(own))
    return sum(shares) / len(shares)


def test_features_tell_pitch_and_not_the_level() -> None:
    low, high = (features(torch.from_numpy(hum(hertz, 1.0, 0))[None]) for hertz in (110.0, 220.0))
    assert low.shape == (SIZE,)
    pitches = 2 * (CEPSTRA + 1) * STATISTICS  # where those of pitch begin: the mean, in octaves
    assert float(low[pitches]) == pytest.approx(np.log2(110 * 1.05), abs=0.03)
    assert float(high[pitches] - low[pitches]) == pytest.approx(1.0, abs=0.03)
    assert float(low[pitches + STATISTICS - 1]) > 0.03  # it rises
    voiced, begins, length = low[-3:].tolist()
    assert voiced > 0.9
    assert begins == pytest.approx(1.0, abs=0.1)  # one stretch in a second
    assert length > 90  # frames
    quiet = features(0.01 * torch.from_numpy(hum(110.0, 1.0, 0))[None])
    torch.testing.assert_close(quiet, low, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("samples", [1, 399, 400, 401, RATE])
def test_features_of_anything_are_finite(samples: int) -> None:
    for wav in (torch.zeros(1, samples), torch.ones(1, samples), torch.randn(1, samples)):
        assert features(wav).shape == (SIZE,)
        assert features(wav).isfinite().all()


def test_svm_tells_what_can_be_told(told: Path) -> None:
    true, said = answered(make_baseline("svm", told, NOBODY, list), told, EMOTION)
    assert recall(true, said) == 1.0
    assert {one.label for one in said} == {"angry", "sad"}
    assert all(one == EMOTION.read((one.text,)) and not one.faults for one in said)


def test_svm_is_at_chance_where_nothing_can_be_told(shuffled: Path) -> None:
    assert 0.25 < recall(*answered(Svm(shuffled), shuffled, EMOTION)) < 0.75


def test_svm_does_not_learn_from_the_test_split(told: Path, tmp_path: Path) -> None:
    """Labels of test swapped: it is wrong about all of them."""
    swapped = {"anger": "sadness", "sadness": "anger"}
    utterances = []
    for split in SPLITS:
        for item in read_corpus([told], split):  # type: ignore[arg-type]
            one = item.utterance.model_copy(update={"audio": str(told / item.utterance.audio)})
            emotion = str(one.labels["emotion"])
            utterances.append(
                one.model_copy(update={"labels": {"emotion": swapped[emotion] if split == "test" else emotion}})
            )
    write_manifest(tmp_path / "manifest.jsonl", utterances)
    assert recall(*answered(Svm(tmp_path), tmp_path, EMOTION)) == 0.0


def test_majority(told: Path) -> None:
    true, said = answered(make_baseline("majority", told, NOBODY, list), told, EMOTION)
    assert {one.label for one in said} == {"sad"}
    assert recall(true, said) == 0.5
    _, said = answered(Majority(told), told, TASKS["is_emotion"])
    assert len({one.label for one in said}) == 1
    assert said[0].label in ("yes", "no")


def test_majority_of_intents(tmp_path: Path) -> None:
    """The intent alone: of slots there is no commonest."""
    utterances = []
    for number, (split, intent) in enumerate(
        [("train", "play"), ("train", "stop"), ("train", "stop"), ("test", "stop")]
    ):
        facts: Any = {"split": split, "intent": intent, "slots": {"what": f"song {number}"}}
        utterances.append(Utterance(id=str(number), audio="a.wav", duration=1.0, source="made", **facts))
    write_manifest(tmp_path / "manifest.jsonl", utterances)
    _, (said,) = answered(Majority(tmp_path), tmp_path, TASKS["intent"])
    assert (said.label, said.slots, said.faults, said.text) == ("stop", {}, (), "stop()")


@pytest.fixture(scope="module")
def pauses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three recordings: two sentences with a second around each, the same in noise, and noise alone."""
    require_engine("flite")
    folder = tmp_path_factory.mktemp("pauses")
    voice = next(voice for voice in VOICES if voice.name == "flite-rms")
    pieces, segments, seconds = [], [], 1.0
    for text in (SENTENCE, "Six kids sit in the city."):
        loud = speak(text, voice)
        heard = np.flatnonzero(np.abs(loud) > 0.02 * np.abs(loud).max())
        loud = loud[heard[0] : heard[-1] + 1]
        segments.append(Segment(None, seconds, seconds + len(loud) / SAMPLE_RATE))
        seconds = segments[-1].end + 1
        pieces += [np.zeros(SAMPLE_RATE, np.float32), loud]
    assert SAMPLE_RATE == RATE
    clean = np.concatenate([*pieces, np.zeros(RATE, np.float32)])
    clean = 0.5 * clean / np.abs(clean).max()
    noise = np.random.default_rng(0).standard_normal(len(clean)).astype(np.float32)
    utterances = []
    for name, samples, known in (
        ("clean", clean + 1e-4 * noise, segments),
        ("noisy", clean + 10 ** (-15 / 20) * np.sqrt(np.mean(clean**2)) * noise, segments),
        ("noise", 0.05 * noise, []),
    ):
        soundfile.write(folder / f"{name}.wav", samples, RATE)
        facts: Any = {"segments": known} if known else {"text": ""}
        utterances.append(
            Utterance(id=name, audio=f"{name}.wav", duration=len(clean) / RATE, split="test", source="made", **facts)
        )
    write_manifest(folder / "manifest.jsonl", utterances)
    return folder


@pytest.mark.parametrize("name", ["energy_vad", "silero_vad"])
def test_voice_activity(pauses: Path, name: str) -> None:
    threads = torch.get_num_threads()
    true, said = answered(make_baseline(name, pauses, NOBODY, list), pauses, ACTIVITY)
    assert torch.get_num_threads() == threads
    for right, one in zip(true[:2], said[:2], strict=True):
        assert len(one.segments) == 2
        assert not one.faults
        own, other = (
            Timeline([Stretch(segment.start, segment.end) for segment in answer.segments]) for answer in (right, one)
        )
        both = sum(stretch.duration for stretch in own.crop(other))
        assert 2 * both / (own.duration() + other.duration()) > 0.93
    assert said[2] == ACTIVITY.read(("no speech",)) == true[2]


def test_pocketsphinx(tmp_path: Path) -> None:
    require_engine("flite")
    voice = next(voice for voice in VOICES if voice.name == "flite-slt")
    soundfile.write(tmp_path / "a.wav", speak(SENTENCE, voice), SAMPLE_RATE)
    soundfile.write(tmp_path / "b.wav", np.zeros(RATE), RATE)
    utterances = [
        Utterance(id=name, audio=f"{name}.wav", duration=2.0, text=text, split="test", source="made", language=language)
        for name, text, language in (("a", SENTENCE, "en"), ("b", "", None))
    ]
    write_manifest(tmp_path / "manifest.jsonl", utterances)
    _, said = answered(make_baseline("pocketsphinx", tmp_path, NOBODY, list), tmp_path, TRANSCRIBE)
    assert wer([SENTENCE], [said[0].text]) < 0.7
    assert said[0] == TRANSCRIBE.read((said[0].text,))
    german = [one.model_copy(update={"language": "de"}) for one in utterances]
    write_manifest(tmp_path / "manifest.jsonl", german)
    with pytest.raises(InputError, match="pocketsphinx: a is 'de'; its model is English"):
        answered(PocketSphinx(), tmp_path, TRANSCRIBE)


class Nobody:
    """Ours where a baseline does not ask it."""

    name = "nobody"

    def answer(self, questions: Sequence[Question], task: Task, advance: Advance) -> list[ParsedAnswer]:
        raise AssertionError


NOBODY = Nobody()


class Direct:
    """Our model without a server."""

    name = "speechllm"

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.answerer = Answerer(checkpoint)

    def texts(self, files: Sequence[str], instructions: Sequence[str]) -> list[str]:
        answers = list(self.answerer.ask(files, instructions))
        assert all(isinstance(answer, Answer) for answer in answers)
        return [answer.text for answer in answers if isinstance(answer, Answer)]

    def answer(self, questions: Sequence[Question], task: Task, advance: Advance) -> list[ParsedAnswer]:
        found = []
        for question in questions:
            (text,) = self.texts([str(question.item.root / question.item.utterance.audio)], [question.instruction])
            found.append(task.read((text,) if text else ()))
            advance(1)
        return found

    def ask_text(self, instructions: Sequence[str]) -> list[str]:
        return self.texts([NO_AUDIO], instructions)


@pytest.fixture(scope="module")
def direct(tiny_checkpoint: Path) -> Direct:
    return Direct(lively(tiny_checkpoint))


def test_cascade(direct: Direct, tmp_path: Path) -> None:
    utterances = []
    for name, samples in (("a", hum(110.0, 1.0, 0)), ("b", np.zeros(RATE)), ("c", hum(240.0, 1.0, 1))):
        soundfile.write(tmp_path / f"{name}.wav", samples, RATE)
        facts: Any = {"text": "hum", "translations": {"de": "summ"}}
        utterances.append(Utterance(id=name, audio=f"{name}.wav", duration=1.0, split="test", source="made", **facts))
    write_manifest(tmp_path / "manifest.jsonl", utterances)
    _, said = answered(make_baseline("cascade", tmp_path, direct, direct.ask_text), tmp_path, TASKS["translate_de"])
    heard = direct.texts([str(tmp_path / f"{name}.wav") for name in "abc"], [TRANSCRIBE.wordings[0]])
    assert heard[0] and heard[2] and heard[0] != heard[2] and not heard[1]
    expected = direct.ask_text([f"Translate to German: {text}" for text in (heard[0], heard[2])])
    assert [one.text for one in said] == [expected[0], "", expected[1]]
    assert expected[0] and expected[0] != heard[0]


@pytest.mark.parametrize(
    ("name", "task", "words"),
    [
        ("pocketsphinx", "emotion", "it transcribes, and does not answer emotion"),
        ("cascade", "transcribe", "it translates speech, and does not answer transcribe"),
        ("cascade", "translate_text_de", "does not answer translate_text_de"),
        ("majority", "transcribe", "no labels to count"),
        ("majority", "gender", "no train clip has a label of the task gender"),
        ("svm", "is_emotion", "does not answer is_emotion"),
        ("svm", "gender", "no train clip has a label of the task gender"),
        ("energy_vad", "diarize", "does not answer diarize"),
        ("silero_vad", "transcribe", "does not answer transcribe"),
    ],
)
def test_what_they_do_not_do(told: Path, name: str, task: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as raised:
        make_baseline(name, told, NOBODY, list).answer([], TASKS[task], lambda count: None)
    assert str(raised.value).startswith(f"{name}: ")


def test_sets_that_do_not_teach(told: Path, tmp_path: Path) -> None:
    rows = [item.utterance for item in read_corpus([told], "train")]
    rows = [one.model_copy(update={"audio": str(told / one.audio)}) for one in rows]
    write_manifest(tmp_path / "manifest.jsonl", [one for one in rows if one.labels["emotion"] == "anger"])
    with pytest.raises(InputError, match="all of its train split is 'angry'; two labels are needed"):
        Svm(tmp_path).answer([], EMOTION, lambda count: None)
    (tmp_path / "other").mkdir()
    write_manifest(tmp_path / "other" / "manifest.jsonl", rows)
    with pytest.raises(InputError, match=r"no dev utterance in .*other"):
        Svm(tmp_path / "other").answer([], EMOTION, lambda count: None)
    with pytest.raises(InputError, match="no such manifest"):
        Majority(tmp_path / "none.jsonl").answer([], EMOTION, lambda count: None)


def test_names_and_packages(told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BASELINES:
        assert make_baseline(name, told, NOBODY, list).name == name
    with pytest.raises(InputError, match="baseline 'whisper': unknown; known are pocketsphinx, cascade"):
        make_baseline("whisper", told, NOBODY, list)
    for name, module in (("pocketsphinx", "pocketsphinx"), ("svm", "sklearn.preprocessing")):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
        with pytest.raises(InputError, match=rf"baseline {name}: .* is not installed \(pip install"):
            make_baseline(name, told, NOBODY, list).answer([], EMOTION, lambda count: None)


def test_each_has_its_class() -> None:
    assert [one.name for one in (PocketSphinx, Cascade, Majority, Svm, EnergyVad, SileroVad)] == list(BASELINES)
