"""Make a corpus of synthetic speech: `python -m train.synthesize --text FILE|digits|orders|nonspeech …`.

Every utterance follows from (seed, index) alone, so an interrupted run goes on where it stopped and gives the same
corpus. Train utterances vary in voice, rate, pitch, level and noise; dev and test ones do not, and the voices of those
splits speak in turn, each its own sentences.
"""

import hashlib
import re
import string
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import typer
from rich.console import Console

from speechllm.data.ambience import nonspeech, recorded_noise, room_for
from speechllm.data.manifest import Split
from speechllm.data.recorded import Sentence
from speechllm.data.synthesis import SAMPLE_RATE, Engine, EngineError, Voice, require_voice, speak, voices
from speechllm.errors import InputError
from speechllm.metrics import normalize_text
from speechllm.tasks import Segment
from train.commands import plain_errors
from train.making import Outcome, make_corpus, report, write_utterance
from train.orders import ORDERS, read_or_make

BUILT_IN = ("digits", ORDERS, "nonspeech")  # texts that are no files
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATES, PITCHES = (0.85, 1.2), (0.9, 1.1)  # factors
LEVELS_DB = (-30.0, -12.0)  # dBFS, rms of the speech
CLEAN_LEVEL_DB = -23.0  # of dev and test
NOISE_SHARE, SNRS_DB = 0.3, (10.0, 30.0)
MAX_FRAGMENT = 4  # words
MAX_DIGITS = 6
SHORTEST_WORD = 3  # letters of a word that is spoken by itself
WORD_SPLITS: tuple[Split, ...] = ("dev", "test") + ("train",) * 14


@dataclass(frozen=True)
class Plan:
    """What every utterance of a run follows from. The text is built in, or the file of the sentences."""

    name: str
    out: Path
    text: str
    sentences: tuple[Sentence, ...]
    language: str
    split: Split
    fragments: float
    seed: int
    noise: Path | None
    engines: tuple[str, ...] = get_args(Engine)
    words: int = 0

    def settings(self) -> dict[str, Any]:
        """What the utterances depend on, as JSON holds it."""
        return {
            "text": self.text,
            "sentences": hashlib.sha256(repr(self.sentences).encode()).hexdigest()[:16],
            "language": self.language,
            "split": self.split,
            "fragments": self.fragments,
            "seed": self.seed,
            "noise": None if self.noise is None else str(self.noise),
            "voices": [voice.name for voice in self.voices()],
            "words": self.words,
        }

    def voices(self) -> list[Voice]:
        return [voice for voice in voices(self.split, self.language) if voice.engine in self.engines]

    def require_voices(self) -> None:
        """InputError when there is no voice for what is to be spoken, or one of them is not installed."""
        if self.text == "nonspeech":
            return
        if not self.voices():
            raise InputError(
                f"none of the engines {' '.join(self.engines)} has a voice for --split {self.split} "
                f"--language {self.language}"
            )
        for voice in self.voices():
            require_voice(voice)


def prepare(
    text: str,
    out: Path,
    language: str = "en",
    split: Split = "train",
    fragments: float = 0.0,
    seed: int = 1,
    noise: Path | None = None,
    engines: tuple[str, ...] = (),
    words: int = 0,
) -> Plan:
    """Read the sentences; no engine means all of them. With ``words`` so many of their words take their place.

    Raises:
        InputError: an engine is unknown, the file of sentences cannot be read or has none in the language, or a setting
            is not for such a text or split.
    """
    if unknown := set(engines) - set(get_args(Engine)):
        raise InputError(f"--engine {' '.join(sorted(unknown))}: give any of {', '.join(get_args(Engine))}")
    if noise is not None and split != "train":
        raise InputError(f"--noise {noise}: {split} speech has no recorded noise; leave it out")
    if fragments and text in ("digits", "nonspeech"):
        raise InputError(f"--fragments {fragments:g}: {text} are no sentences to take fragments of; leave it out")
    if engines and text == "nonspeech":
        raise InputError("--engine: nobody speaks in nonspeech; leave it out")
    sentences = tuple(read_or_make(text, language) if text == ORDERS or text not in BUILT_IN else ())
    if language != "en":
        if text in BUILT_IN:
            raise InputError(f"--language {language}: {text} are spoken in English only")
        sentences = tuple(sentence for sentence in sentences if language in sentence.texts())
        if not sentences:
            raise InputError(f"{text}: no sentence in {language}")
    if words:
        if text in BUILT_IN:
            raise InputError(f"--words: {text} are no sentences to take words from")
        sentences = tuple(single_words([sentence.texts()[language] for sentence in sentences], words, language, split))
    return Plan(
        *(out.resolve().name, out, text, sentences, language, split, fragments, seed, noise),
        engines or get_args(Engine),
        words,
    )


def fragment_of(text: str, rng: np.random.Generator) -> str:
    """A random run of 1 to 4 consecutive words, without punctuation at its ends."""
    words = text.split()
    size = int(rng.integers(1, min(MAX_FRAGMENT, len(words)) + 1))
    start = int(rng.integers(0, len(words) - size + 1))
    return " ".join(words[start : start + size]).strip(string.punctuation + " ")


def single_words(texts: Iterable[str], most: int, language: str, split: Split) -> list[Sentence]:
    """The ``most`` frequent words of the texts, those of the split alone: a word is spoken by itself in one of them."""
    counts = Counter(word for text in texts for word in normalize_text(text).split() if len(word) >= SHORTEST_WORD)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[:most]
    return [Sentence(word, word, language=language) for word in ranked if split_of(word) == split]


def split_of(word: str) -> Split:
    """Where a word is spoken by itself, whatever the corpus: seven eighths of all words train."""
    return WORD_SPLITS[zlib.crc32(word.encode()) % len(WORD_SPLITS)]


def digits_text(rng: np.random.Generator) -> str:
    """A single digit word half of the time, 2 to 6 of them otherwise."""
    size = 1 if rng.random() < 0.5 else int(rng.integers(2, MAX_DIGITS + 1))
    return " ".join(DIGITS[digit] for digit in rng.integers(0, len(DIGITS), size))


@cache
def _order(count: int, seed: int, turn: int) -> np.ndarray:
    """The order of the sentences [count] when they are gone through for the `turn`-th time."""
    return np.random.default_rng([seed, turn]).permutation(count)


def _voice(plan: Plan, index: int, rng: np.random.Generator) -> Voice:
    """By share in train, in turn in dev and test."""
    choices = plan.voices()
    if plan.split != "train":
        return choices[index % len(choices)]
    shares = np.array([voice.share for voice in choices])
    return choices[int(rng.choice(len(choices), p=shares / shares.sum()))]


def make(plan: Plan, index: int) -> Outcome:
    """Speak and write utterance `index`."""
    rng = np.random.default_rng([plan.seed, 0, index])
    if plan.text == "nonspeech":
        return Outcome(write_utterance(plan, index, nonspeech(plan.noise, rng), SAMPLE_RATE, text=""))
    labels: dict[str, str | int | float] = {}
    translations: dict[str, str] = {}
    meaning: dict[str, Any] = {}
    if plan.sentences:
        turn, place = divmod(index, len(plan.sentences))
        sentence = plan.sentences[_order(len(plan.sentences), plan.seed, turn)[place]]
        translations = sentence.texts()
        text = " ".join(translations.pop(plan.language).split())
        labels["sentence_id"] = sentence.id
        meaning = {"intent": sentence.intent, "slots": sentence.slots}
        if rng.random() < plan.fragments:
            fragment = fragment_of(text, rng)
            if re.search(r"\w", fragment):  # a run of punctuation alone cannot be spoken
                text, translations, meaning = fragment, {}, {}
    else:
        text = digits_text(rng)
    voice = _voice(plan, index, rng)
    labels["voice"] = voice.name
    if voice.accent is not None:
        labels["accent"] = voice.accent
    varied = plan.split == "train"
    rate, pitch, level_db = rng.uniform(*RATES), rng.uniform(*PITCHES), rng.uniform(*LEVELS_DB)
    if not varied:
        rate, pitch, level_db = 1.0, 1.0, CLEAN_LEVEL_DB
    snr_db = round(rng.uniform(*SNRS_DB), 1) if varied and rng.random() < NOISE_SHARE else None
    if snr_db is not None:
        labels["snr_db"] = snr_db
    try:
        speech = speak(text, voice, rate, pitch)
    except EngineError as error:
        return Outcome(None, f"utterance {index}: {error}")
    wav, start = room_for(speech, level_db, snr_db, plan.noise, rng)
    end = start + len(speech)
    spoken = Segment(voice.name, round(start / SAMPLE_RATE, 3), round(end / SAMPLE_RATE, 3), text)
    known = {"speaker": voice.name, "gender": voice.gender, "language": plan.language, **meaning}
    return Outcome(
        write_utterance(
            plan,
            index,
            wav,
            SAMPLE_RATE,
            text=text,
            translations=translations,
            segments=(spoken,),
            labels=labels,
            **known,
        )
    )


def synthesize(plan: Plan, count: int, jobs: int, console: Console) -> Counter[str]:
    """Make what is missing of utterances 0 ... count - 1, in order; counts of 'made', 'kept' and 'failed'."""
    plan.require_voices()
    if plan.noise is not None:
        recorded_noise(plan.noise)
    return make_corpus(plan, make, count, jobs, console)


def main(
    text: Annotated[
        str,
        typer.Option(
            help="Sentences: JSON Lines with id, en, de, fr, cs, intent, slots, or a .txt with one of the language a "
            "line, gzipped or not; 'digits', 'orders' (of coffee) or 'nonspeech'"
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for audio/ and manifest.jsonl; an earlier run there is continued")],
    count: Annotated[int, typer.Option(min=1, help="Number of utterances")],
    language: Annotated[str, typer.Option(help="That is spoken: en, de or fr")] = "en",
    split: Annotated[Split, typer.Option(help="Whose voices speak")] = "train",
    fragments: Annotated[
        float, typer.Option(min=0, max=1, help="Share that speaks only 1-4 words of a sentence")
    ] = 0.0,
    words: Annotated[
        int, typer.Option(min=0, help="Speak single words, of so many frequent ones those that the split has")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="The corpus follows from it")] = 1,
    noise: Annotated[Path | None, typer.Option(help="Recorded set whose train split is mixed in as noise")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="Only voices of this engine; repeatable")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes")] = 2,
) -> None:
    """Make a corpus of synthetic speech."""
    console = Console(stderr=True)
    with plain_errors(f"stopped; the same command goes on from {out}"):
        plan = prepare(text, out, language, split, fragments, seed, noise, tuple(engine or ()), words)
        tally = synthesize(plan, count, jobs, console)
    report(out, tally)


if __name__ == "__main__":
    typer.run(main)
