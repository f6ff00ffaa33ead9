"""Kinds of episodes: solved examples (shots) and a question, in which only the shots tell what to answer.

A language model follows shots that it was trained to follow (Min et al. 2022, MetaICL). Where recordings are to be told
apart, what they have in common is real (who speaks, which word it is) and the labels are not: they are made up for each
episode, so that nothing but the shots says which belongs to what (symbol tuning, Wei et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from speechllm.metrics import normalize_text
from speechllm.tasks.answer import Facts, ParsedAnswer, Parts
from speechllm.tasks.base import Task, words_of
from speechllm.tasks.labels import Accent, Emotion, Gender, Language, Trait
from speechllm.tasks.words import Words

HOT_WORD_LETTERS, HOT_WORD_RECORDINGS = 5, 25  # the fewest letters of a hot word, the most recordings that have it

LABEL = (
    "Which label fits this audio?",
    "Which label fits?",
    "Label this audio.",
    "Label this recording.",
    "Classify this audio.",
    "Classify this clip.",
    "Which group does this belong to?",
    "Which one is it?",
    "Which of them is it?",
    "What is this called?",
    "What would you call this?",
    "Name this.",
    "Say which it is.",
    "What kind is it?",
    "Which kind of recording is this?",
    "Tell me the label.",
    "Answer as in the examples.",
    "Do the same as above.",
    "What goes here?",
    "And this one?",
    "Is it {}?",
    "Which is it: {}?",
    "Answer {}.",
    "One of {}.",
    "Choose: {}.",
    "Is this one {}?",
)
LABEL_HELD_OUT = (
    "Which category does the recording fall into?",
    "Sort this sound into its group.",
    "Following the examples, what is the answer here?",
    "Give the label that applies.",
    "Would you say {}?",
)


Keys = Callable[[Facts, str | None], Iterable[str | None]]


@dataclass(frozen=True)
class FewShot(Task):
    """What the recordings of an episode share, and what tells them apart.

    keys: what a recording with such facts, by such a speaker, may have in common with others; None counts as nothing.
    most: what more recordings of a corpus share is not looked at. across: recordings are drawn from all corpora at
    once, not from that of the question alone. whole: clips are heard whole; else an excerpt is.
    """

    keys: Keys = lambda facts, speaker: ()
    most: float = math.inf
    across: bool = False
    whole: bool = True


@dataclass(frozen=True)
class FewShotLabel(FewShot):
    """Recordings with the same key have the same label; the label is made up."""

    def write(self, facts: Facts, argument: str = "") -> Parts | None:
        return None  # it is in no data

    def read(self, parts: Parts) -> ParsedAnswer:
        words = words_of(parts)
        return ParsedAnswer(words, label=words)


@dataclass(frozen=True)
class FewShotWords(FewShot, Words):
    """Transcripts, with those of related recordings before them."""


def _word(facts: Facts, speaker: str | None) -> Iterable[str]:
    """The word of a recording of a single one."""
    word = normalize_text(facts.text or "")
    return (word,) if word.isalpha() else ()


def _words(facts: Facts, speaker: str | None) -> Iterable[str]:
    """Long words of a sentence; a recording of a single one would be the answer."""
    words = normalize_text(facts.text or "").split()
    return {word for word in words if len(word) >= HOT_WORD_LETTERS} if len(words) > 1 else ()


def _speech(facts: Facts, speaker: str | None) -> Iterable[str]:
    return () if facts.text is None else ("somebody" if facts.text else "nobody",)


def few_shot_tasks(transcribe: tuple[str, ...], held_out: tuple[str, ...]) -> dict[str, FewShot]:
    """By name. transcribe, held_out: wordings that ask for transcripts."""

    def labels(name: str, keys: Keys, listens: bool = True, whole: bool = True, across: bool = False) -> FewShotLabel:
        return FewShotLabel(
            f"few_shot_{name}",
            "accuracy",
            LABEL,
            LABEL_HELD_OUT,
            keys=keys,
            listens=listens,
            whole=whole,
            across=across,
        )

    def words(name: str, keys: Keys, most: float = math.inf) -> FewShotWords:
        return FewShotWords(f"few_shot_{name}", "wer", transcribe, held_out, keys=keys, most=most)

    def trait(kind: type[Trait]) -> Keys:
        task = kind("", "accuracy", (), ())
        return lambda facts, speaker: (task.of(facts),)

    tasks: tuple[FewShot, ...] = (
        labels("word", _word),
        labels("text", _word, listens=False),  # what words on paper are called: a step towards the others
        labels("speaker", lambda facts, speaker: (speaker,), whole=False),
        labels("gender", trait(Gender), whole=False),
        labels("language", trait(Language), whole=False, across=True),
        labels("emotion", trait(Emotion), whole=False),
        labels("accent", trait(Accent), whole=False),
        labels("intent", lambda facts, speaker: (facts.intent,)),
        labels("speech", _speech, whole=False, across=True),
        words("same_speaker", lambda facts, speaker: (speaker if facts.text else None,)),
        words("hot_words", _words, HOT_WORD_RECORDINGS),
    )
    return {task.name: task for task in tasks}
