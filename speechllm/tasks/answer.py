"""What an answer is made of: text, and marks that no text can spell. And what a task may know about a recording."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from speechllm.errors import InputError


@dataclass(frozen=True)
class Segment:
    """A stretch of speech: who spoke from `start` to `end` (seconds), and what; "" where the words are not known."""

    speaker: str | None
    start: float
    end: float
    text: str = ""


@dataclass(frozen=True)
class Time:
    """A mark in an answer: seconds from the start of the recording."""

    seconds: float


@dataclass(frozen=True)
class Speaker:
    """A mark in an answer: speakers are numbered from 1 by their first appearance."""

    number: int


Part = str | Time | Speaker
Parts = tuple[Part, ...]
_MARK = re.compile(r"(<\|(?:[0-9]+(?:\.[0-9]+)?|spk[1-9][0-9]*)\|>)")


def shown(parts: Iterable[Part]) -> str:
    """The answer as people read it: ``<|spk1|><|0.32|> words <|1.20|>``."""
    words = []
    for part in parts:
        if isinstance(part, Time):
            words.append(f"<|{part.seconds:.2f}|>")
        elif isinstance(part, Speaker):
            words.append(f"<|spk{part.number}|>")
        else:
            words.append(part)
    return " ".join(words)


def parts_of(text: str) -> Parts:
    """The inverse of :func:`shown`, for answers that people write; white space is collapsed.

    To be asked only about answers to tasks with marks: anywhere else such text is text. Raises InputError for what
    looks like a mark and is none.
    """
    parts: list[Part] = []
    for number, piece in enumerate(_MARK.split(text)):
        inside = piece[2:-2]
        if number % 2:
            parts.append(Speaker(int(inside[3:])) if inside.startswith("spk") else Time(float(inside)))
        elif words := " ".join(piece.split()):
            if wrong := re.search(r"\S*(?:<\||\|>)\S*", words):
                raise InputError(
                    f"{wrong[0]!r} is no mark: write <|0.32|> for a time in seconds, <|spk1|> for a speaker"
                )
            parts.append(words)
    return tuple(parts)


@dataclass(frozen=True)
class Facts:
    """What is known about a recording. ``text`` is "" where nobody speaks, and None when the words are not known.

    Recordings of several people have ``segments``, and no ``text``. A text alone has no ``duration``.
    """

    duration: float
    text: str | None = None
    language: str | None = None
    gender: str | None = None
    translations: Mapping[str, str] = field(default_factory=dict)
    segments: tuple[Segment, ...] = ()
    intent: str | None = None
    slots: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str | int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class ParsedAnswer:
    """An answer as read back by its task.

    label: for tasks that answer with one; None when the answer is none of them.
    faults: what did not fit the task's grammar, in words; the rest is read all the same.
    """

    text: str
    segments: tuple[Segment, ...] = ()
    label: str | None = None
    slots: Mapping[str, str] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
