"""The task: words that ask, a way to write the answer, a way to read it back, and a metric."""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Literal

from speechllm.tasks.answer import Facts, ParsedAnswer, Parts
from speechllm.tasks.phrases import CHOICE, drawn

PHRASED = 0.5  # share of training's instructions that are drawn from phrases, where a task has them
Others = Callable[[], Facts]  # draws another recording of the corpus
Metric = Literal["wer", "bleu", "accuracy", "turns", "activity", "slots"]


def collapsed(text: str) -> str:
    """Without white space at its ends, and one blank for any other; case and punctuation stay."""
    return " ".join(text.split())


normalize_instruction = collapsed  # what users type and what is trained pass here


@dataclass(frozen=True)
class Task(ABC):
    """What every task has. The wordings of some have a gap, ``{}``, for what is asked about: a word, an emotion.

    wordings: instructions for training; the first is what evaluations ask. held_out: instructions never trained on, nor
    known by (:meth:`match`), to test unseen wordings. phrases: of many wordings each, for the other half of training;
    see :mod:`speechllm.tasks.phrases`.
    listens: whether the answer comes from the audio; otherwise the instruction holds all that is needed.
    marks: whether answers hold marks of times or speakers.
    """

    name: str
    metric: Metric
    wordings: tuple[str, ...]
    held_out: tuple[str, ...]
    phrases: tuple[str, ...] = ()
    listens: bool = True
    marks: bool = False

    def argument(self, facts: Facts, rng: Random, others: Others | None = None) -> str | None:
        """What to ask about: the filling of the gap, "" for wordings without one; None where there is nothing."""
        return ""

    @abstractmethod
    def write(self, facts: Facts, argument: str = "") -> Parts | None:
        """The answer, () where nobody speaks; None when the data do not hold it. White space is collapsed."""

    @abstractmethod
    def read(self, parts: Parts) -> ParsedAnswer:
        """Read a generated answer back. Never raises: what is malformed is told in ``faults``."""

    def pose(
        self, facts: Facts, rng: Random, wordings: tuple[str, ...] | None = None, others: Others | None = None
    ) -> tuple[str, Parts] | None:
        """An instruction, drawn from ``wordings`` (unless given, from all that are trained, half of them from the
        phrases), and its answer; None if unknown.

        Without ``others`` nothing is asked that is to be answered with no.
        """
        if self.listens and not facts.duration:
            return None
        argument = self.argument(facts, rng, others)
        answer = None if argument is None else self.write(facts, argument)
        if answer is None:
            return None
        assert argument is not None
        if wordings is None and self.phrases and rng.random() < PHRASED:
            wording = drawn(rng.choice(self.phrases), rng)
        else:
            wording = rng.choice(self.wordings if wordings is None else wordings)
        return wording.replace("{}", argument), answer

    def fits(self, argument: str) -> bool:
        """Whether the gap of a wording may be filled with this."""
        return True

    def match(self, instruction: str) -> str | None:
        """The argument with which ``instruction`` is a wording of this task, or of its phrases, or None when it is not.

        Case, white space and final punctuation do not matter.
        """
        typed = bare(instruction)
        for pattern in _patterns(self.wordings + self.phrases):
            if found := pattern.fullmatch(typed):
                argument = found[1].strip() if pattern.groups else ""
                if self.fits(argument):
                    return argument
        return None


@cache
def _patterns(wordings: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    """Of wordings, and of phrases."""
    patterns = []
    for wording in wordings:
        before, gap, after = wording.casefold().partition("{}")
        patterns.append(re.compile(f"{_source(before, False)}(.+){_source(after)}" if gap else _source(before)))
    return tuple(patterns)


def _source(text: str, ends: bool = True) -> str:
    """A regular expression for a text with choices: without final punctuation where it ``ends`` the instruction."""
    pieces = CHOICE.split(text)  # what is fixed, and choices, in turn
    if ends:
        pieces[-1] = _unended(pieces[-1])
    pieces[::2] = map(re.escape, pieces[::2])
    pieces[1::2] = [f"(?:{'|'.join(map(re.escape, choice.split('|')))})" for choice in pieces[1::2]]
    return "".join(pieces)


def bare(text: str) -> str:
    """Lower case, white space collapsed, and no final punctuation."""
    return _unended(re.sub(r"\s+", " ", text).casefold()).lstrip()


def _unended(text: str) -> str:
    end = len(text)
    while end and (unicodedata.category(text[end - 1])[0] == "P" or text[end - 1].isspace()):
        end -= 1
    return text[:end]


def words_of(parts: Parts) -> str:
    """The text of an answer, its marks left out."""
    return collapsed(" ".join(part for part in parts if isinstance(part, str)))
