"""Tasks answered with a label: emotion, language, gender, accent, number of speakers, yes or no, an intent."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random

from speechllm.metrics import normalize_text
from speechllm.tasks.answer import Facts, ParsedAnswer, Parts
from speechllm.tasks.base import Others, Task, collapsed, words_of

YES, NO = "yes", "no"
# how sets of recordings call an emotion -> how we do, an adjective that fits "Is the speaker …?"
_EMOTIONS = {
    "anger": "angry",
    "boredom": "bored",
    "calm": "calm",
    "disgust": "disgusted",
    "fear": "afraid",
    "happiness": "happy",
    "neutral": "neutral",
    "sadness": "sad",
    "surprise": "surprised",
}
EMOTIONS = tuple(_EMOTIONS.values())
LANGUAGES = {
    "cs": "Czech",
    "de": "German",
    "en": "English",
    "fr": "French",
    "nl": "Dutch",
    "pl": "Polish",
    "ur": "Urdu",
}
# how sets of recordings call an accent of English, or the first language of its speaker -> how we do
ACCENTS = {
    "USA/neutral": "American",
    "GRC/Greek": "Greek",
    "DEU/German": "German",
    "BEL/French": "French",
    **dict.fromkeys(("Hindi", "Marathi", "Kannada", "Tamil", "Telugu"), "Indian"),
    **dict.fromkeys(("Chinese", "Mandarin"), "Chinese"),
    **{name: name for name in ("American", "British", "Scottish", "Russian", "German", "French", "Greek", "Dutch")},
    **{name: name for name in ("Swedish", "Hungarian", "Polish", "Spanish")},
}
NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight")


@dataclass(frozen=True)
class Label(Task):
    """One of a closed set of words.

    labels: the answers there are.
    """

    labels: tuple[str, ...] = ()

    @property
    def answers(self) -> dict[str, str]:
        """All that may be written, and the label that each tells; none where it is open. A label alone is read too."""
        return {label: label for label in self.labels}

    def read(self, parts: Parts) -> ParsedAnswer:
        words, answers = words_of(parts), {label: label for label in self.labels} | self.answers
        known = {normalize_text(answer): label for answer, label in answers.items()} | answers
        label = known.get(words) or known.get(normalize_text(words))
        faults = () if label else (f"{words!r} is none of {', '.join(answers)}",)
        return ParsedAnswer(words, label=label, faults=faults)


@dataclass(frozen=True)
class Choice(Label):
    """Labels that a caller names: answers are read, and none is known beforehand."""

    def write(self, facts: Facts, argument: str = "") -> Parts | None:
        return None


@dataclass(frozen=True)
class Trait(Label):
    """A label that a recording has, whatever is asked about it."""

    @abstractmethod
    def of(self, facts: Facts) -> str | None:
        """The label of a recording, None when it is not known."""

    def write(self, facts: Facts, argument: str = "") -> Parts | None:
        label = self.of(facts)
        return None if label is None else (label,)


def emotion_named(name: object) -> str | None:
    """The one of ``EMOTIONS`` that is called so: by its noun, or as we call it; None where there is none."""
    word = normalize_text(str(name))
    return word if word in EMOTIONS else _EMOTIONS.get(word)


@dataclass(frozen=True)
class Emotion(Trait):
    labels: tuple[str, ...] = EMOTIONS

    def of(self, facts: Facts) -> str | None:
        return emotion_named(facts.labels.get("emotion"))


@dataclass(frozen=True)
class Language(Trait):
    labels: tuple[str, ...] = tuple(LANGUAGES.values())

    def of(self, facts: Facts) -> str | None:
        return None if facts.text == "" else LANGUAGES.get(facts.language or "")


@dataclass(frozen=True)
class Gender(Trait):
    labels: tuple[str, ...] = ("female", "male")

    def of(self, facts: Facts) -> str | None:
        return facts.gender


@dataclass(frozen=True)
class Accent(Trait):
    labels: tuple[str, ...] = tuple(dict.fromkeys(ACCENTS.values()))

    def of(self, facts: Facts) -> str | None:
        return ACCENTS.get(str(facts.labels.get("accent") or facts.labels.get("native_language")))


@dataclass(frozen=True)
class NumberOfSpeakers(Trait):
    labels: tuple[str, ...] = NUMBERS

    def of(self, facts: Facts) -> str | None:
        if facts.text == "":
            return NUMBERS[0]
        speakers = {segment.speaker for segment in facts.segments}
        return NUMBERS[len(speakers)] if 0 < len(speakers) < len(NUMBERS) and None not in speakers else None


@dataclass(frozen=True)
class YesNo(Label):
    """Whether something is so of the recording. Half of the questions are about what is so of it and not of another
    recording of the corpus, half the other way round, so that the question alone tells little. It does tell something
    where most of a corpus is alike: of what is frequent there the answer is "yes" more often than "no".
    """

    labels: tuple[str, ...] = (YES, NO)

    DRAWS = 20  # of other recordings, to find one that differs

    @abstractmethod
    def of(self, facts: Facts) -> frozenset[str] | None:
        """All that is so, None when it is not known."""

    def argument(self, facts: Facts, rng: Random, others: Others | None = None) -> str | None:
        own = self.of(facts)
        if not own:
            return None
        for _ in range(self.DRAWS if others else 0):
            assert others is not None
            other = self.of(others()) or frozenset()
            if own - other and other - own:
                return rng.choice(sorted(own - other if rng.random() < 0.5 else other - own))
        return rng.choice(sorted(own))

    def write(self, facts: Facts, argument: str = "") -> Parts | None:
        own = self.of(facts)
        return None if own is None else (YES if argument in own else NO,)


@dataclass(frozen=True)
class IsEmotion(YesNo):
    """The emotion is told before the answer, ``sad: no``: then only hearing is left to learn, and that is learnt from
    other tasks too (chain of thought, Wei et al. 2022). An answer that had to do both at once was not learnt.
    """

    @property
    def answers(self) -> dict[str, str]:
        return {f"{emotion}: {label}": label for emotion in EMOTIONS for label in self.labels}

    def write(self, facts: Facts, argument: str = "") -> Parts | None:
        own = self.of(facts)
        return None if own is None else (f"{', '.join(own)}: {YES if argument in own else NO}",)

    def fits(self, argument: str) -> bool:
        return argument in EMOTIONS

    def of(self, facts: Facts) -> frozenset[str] | None:
        emotion = emotion_named(facts.labels.get("emotion"))
        return None if emotion is None else frozenset([emotion])


@dataclass(frozen=True)
class SpokenWord(YesNo):
    """All that is heard is told before the answer, in any words, ``left: no``; what follows from it is reading."""

    SHORTEST = 3  # letters of a word that is asked about

    @property
    def answers(self) -> dict[str, str]:
        return {}

    def read(self, parts: Parts) -> ParsedAnswer:
        return replace(super().read((words_of(parts).rpartition(":")[2],)), text=words_of(parts))

    def write(self, facts: Facts, argument: str = "") -> Parts | None:
        own = self.of(facts)
        if own is None:
            return None
        return (": ".join(filter(None, (normalize_text(facts.text or ""), YES if argument in own else NO))),)

    def fits(self, argument: str) -> bool:
        return '"' not in argument

    def of(self, facts: Facts) -> frozenset[str] | None:
        if facts.text is None:
            return None
        return frozenset(word for word in normalize_text(facts.text).split() if len(word) >= self.SHORTEST)


@dataclass(frozen=True)
class Intent(Task):
    """``intent(slot=value, …)``; slots in the order of their names."""

    def write(self, facts: Facts, argument: str = "") -> Parts | None:
        if facts.intent is None:
            return None
        return (write_intent(facts.intent, facts.slots),)

    def read(self, parts: Parts) -> ParsedAnswer:
        words = words_of(parts)
        intent, slots, faults = read_intent(words)
        return ParsedAnswer(words, label=intent, slots=slots, faults=faults)


def write_intent(intent: str, slots: Mapping[str, str]) -> str:
    """What has a meaning in the grammar is taken out of names and values; slots of which nothing is left are too."""
    pairs = ((_plain(name), _plain(value)) for name, value in sorted(slots.items()))
    return f"{_plain(intent)}({', '.join(f'{name}={value}' for name, value in pairs if name and value)})"


def read_intent(text: str) -> tuple[str | None, dict[str, str], tuple[str, ...]]:
    """Intent (None when there is none), slots, and faults of what :func:`write_intent` wrote, or a model did."""
    found = re.fullmatch(r"([^()=,]+)\((.*?)(\)?)", text.strip(), re.DOTALL)
    if not found:
        return None, {}, (f"{text!r} is no intent(slot=value, …)",)
    faults = [] if found[3] else ["the closing bracket is missing"]
    slots: dict[str, str] = {}
    for pair in filter(None, (pair.strip() for pair in found[2].split(","))):
        name, equals, value = (piece.strip() for piece in pair.partition("="))
        if not (name and equals and value) or name in slots:
            faults.append(f"{pair!r} is no new slot=value")
        else:
            slots[name] = value
    return found[1].strip(), slots, tuple(faults)


def _plain(text: str) -> str:
    return collapsed(re.sub(r"[(),=]", " ", text))
