"""Whether what tests is new to what trains: speakers (the persons behind synthetic voices) and sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from speechllm.data.conversations import person
from speechllm.data.manifest import Utterance
from speechllm.errors import InputError
from speechllm.metrics import normalize_text
from speechllm.tasks import TASKS

Newness = Literal["new", "shared", "unknown"]


@dataclass(frozen=True)
class Heard:
    """Who speaks in some recordings and what is said, as normalize_text writes it; None stands for what is unknown."""

    persons: frozenset[str | None] = frozenset()
    sentences: frozenset[str | None] = frozenset()

    def __or__(self, other: Heard) -> Heard:
        return Heard(self.persons | other.persons, self.sentences | other.sentences)

    def __and__(self, other: Heard) -> Heard:
        """What is known to be in both."""
        return Heard(self.persons & other.persons - {None}, self.sentences & other.sentences - {None})


@dataclass(frozen=True)
class Trial:
    """A task on the recordings of a test set that hold an answer for it: are speakers, are sentences new?

    "shared": at least one is trained on. "unknown": of at least one recording they are not known, or nobody speaks.
    """

    task: str
    test: str
    recordings: int
    speakers: Newness
    sentences: Newness

    @property
    def unseen(self) -> bool:
        """Both are new; a task on text alone has no speakers."""
        return self.sentences == "new" and (self.speakers == "new" or not TASKS[self.task].listens)


def persons(utterances: Iterable[Utterance]) -> frozenset[str | None]:
    """Who speaks. One name is taken for one person, in whatever corpus."""
    speakers: set[str | None] = set()
    for known in utterances:
        if known.segments:
            speakers |= {segment.speaker or known.speaker for segment in known.segments}
        elif known.text != "" and known.audio:
            speakers.add(known.speaker)
    return frozenset(person(speaker) if speaker else None for speaker in speakers)


def sentences(utterances: Iterable[Utterance], written: bool = False) -> frozenset[str | None]:
    """What is said, the turns of conversations one by one; with ``written`` the translations too, which train tasks."""
    said: set[str | None] = set()
    for known in utterances:
        turns = {segment.text or None for segment in known.segments}
        if known.text is not None:  # the words of all segments, whether or not these tell them too
            turns = turns - {None} | {known.text}
        said |= turns or {None}
        if written:
            said |= set(known.translations.values())
    return frozenset(None if text is None else normalize_text(text) for text in said) - {""}


def heard(utterances: Sequence[Utterance], written: bool = False) -> Heard:
    """Who speaks, and what is said; see :func:`persons` and :func:`sentences`."""
    return Heard(persons(utterances), sentences(utterances, written))


def answering(utterances: Iterable[Utterance]) -> dict[str, list[Utterance]]:
    """Every task -> the recordings that hold an answer for it; the empty one, where nobody speaks, does not count."""
    rng = Random(0)  # draws the wording, and which word or emotion is asked about: not whether there is an answer
    found: dict[str, list[Utterance]] = {name: [] for name in TASKS}
    for utterance in utterances:
        facts = utterance.facts()
        for name, task in TASKS.items():
            posed = task.pose(facts, rng)
            if posed and posed[1]:
                found[name].append(utterance)
    return found


def trials(trained: Heard, tests: Mapping[str, Sequence[Utterance]]) -> list[Trial]:
    """Every task on every test set that holds answers for it; ``tests`` are their recordings by name."""
    found = []
    for name, utterances in tests.items():
        for task, recordings in answering(utterances).items():
            if recordings:
                tested = heard(recordings)
                shared = tested & trained
                newness = (
                    _newness(tested.persons, shared.persons),
                    _newness(tested.sentences, shared.sentences),
                )
                found.append(Trial(task, name, len(recordings), *newness))
    return found


def _newness(tested: frozenset[str | None], shared: frozenset[str | None]) -> Newness:
    if shared:
        return "shared"
    return "unknown" if None in tested or not tested else "new"


def untested(found: Iterable[Trial]) -> list[str]:
    """Tasks without a test set whose speakers and sentences are all known to be new, in the order of TASKS."""
    tested = {trial.task for trial in found if trial.unseen}
    return [name for name in TASKS if name not in tested]


def hold_out_sentences(utterances: Sequence[Utterance], share: float) -> list[Utterance]:
    """The recordings left when ``share`` of all sentences, drawn at random, are kept for the test split alone.

    Other sentences leave the test split, these leave the others: the speakers of a split stay its own.

    Raises:
        InputError: the words of a recording are not known, or no recording is left to train or to test.
    """
    if unknown := [utterance.id for utterance in utterances if not normalize_text(utterance.text or "")]:
        raise InputError(f"{unknown[0]}: has no text, so nobody knows which sentence it is")
    everything = sorted({normalize_text(utterance.text or "") for utterance in utterances})
    kept = set(Random(0).sample(everything, round(share * len(everything))))
    left = [u for u in utterances if (u.split == "test") == (normalize_text(u.text or "") in kept)]
    if missing := {"train", "test"} - {utterance.split for utterance in left}:
        raise InputError(f"a share of {share:g} of {len(everything)} sentences leaves no {min(missing)} recording")
    return left
