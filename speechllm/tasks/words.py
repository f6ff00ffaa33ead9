"""Tasks answered with plain text: transcripts, translations, and tasks on text alone."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from speechllm.tasks.answer import Facts, ParsedAnswer, Parts, Speaker, Time
from speechllm.tasks.base import Others, Task, collapsed, words_of


@dataclass(frozen=True)
class PlainText(Task):
    """Any text is an answer; marks in it are faults."""

    def read(self, parts: Parts) -> ParsedAnswer:
        faults = ("marks of times or speakers in plain text",) if any(map(is_mark, parts)) else ()
        return ParsedAnswer(words_of(parts), faults=faults)


@dataclass(frozen=True)
class Words(PlainText):
    """The words of the speech, or their translation.

    target: ISO 639-1 code of the language to translate into; None keeps the language of the speech.
    """

    target: str | None = None

    def write(self, facts: Facts, argument: str = "") -> Parts | None:
        if facts.text is not None and not facts.text.strip():
            return ()
        answer = facts.text if self.target is None else facts.translations.get(self.target)
        return None if answer is None else (collapsed(answer),)


@dataclass(frozen=True)
class TextTranslation(PlainText):
    """Text in the instruction, its translation in the answer; no audio."""

    listens: bool = False
    target: str = ""

    def argument(self, facts: Facts, rng: Random, others: Others | None = None) -> str | None:
        return collapsed(facts.text or "") or None

    def write(self, facts: Facts, argument: str = "") -> Parts | None:
        answer = facts.translations.get(self.target)
        return None if answer is None else (collapsed(answer),)


@dataclass(frozen=True)
class NextText(PlainText):
    """The beginning of a sentence in the instruction, the rest in the answer; no audio."""

    listens: bool = False

    def argument(self, facts: Facts, rng: Random, others: Others | None = None) -> str | None:
        words = (facts.text or "").split()
        return " ".join(words[: rng.randrange(1, len(words))]) if len(words) > 1 else None

    def write(self, facts: Facts, argument: str = "") -> Parts | None:
        text = collapsed(facts.text or "")
        return (text[len(argument) :].strip(),) if argument and text.startswith(argument) else None


def is_mark(part: str | Time | Speaker) -> bool:
    return isinstance(part, Time | Speaker)
