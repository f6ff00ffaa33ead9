"""Which ids may come next in an answer, by its task: any text, one of some labels, or segments with times in order.

What a grammar lets through is read by its task without faults, and what the task writes is let through.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from enum import Enum, auto
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from speechllm.errors import InputError
from speechllm.tasks import Task
from speechllm.tasks.labels import Label
from speechllm.tasks.timed import NO_SPEECH, Timed, VoiceActivity
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary

State = Hashable
_S = TypeVar("_S", bound=Hashable)

_CACHED_BYTES = 2**25  # of masks kept, at a byte an id
_CACHED_LABELS = 64  # sets of labels kept


class Grammar(ABC, Generic[_S]):
    """What may come next in an answer. Immutable: where one hypothesis becomes two, both go on from the same state.

    start: the state before the first id.
    """

    start: _S

    @abstractmethod
    def allowed(self, state: _S) -> Tensor:
        """Bool [vocabulary], true somewhere. The same tensor whenever the situation is the same: not to be changed."""

    @abstractmethod
    def next(self, state: _S, index: int) -> _S:
        """The state after an id that was allowed. The end id, after which nothing comes, leaves it as it was."""


class Grammars:
    """The grammars of one checkpoint's ids; made once, for the masks that they share."""

    def __init__(self, vocabulary: Vocabulary, text: TextTokenizer) -> None:
        self._vocabulary = vocabulary
        self._text = text
        self._masks = _Masks(vocabulary, text)
        self._labels = lru_cache(_CACHED_LABELS)(self._make_labels)

    def of(self, task: Task, seconds: float | None = None) -> Grammar:
        """The grammar of a task's answers.

        seconds: length of the audio asked about: no time is later, but for being rounded up to a mark.

        Raises InputError for a label that is no text, and for a task that is answered with marks of time where the
        vocabulary has none.
        """
        if isinstance(task, Label):
            return self._labels(tuple(task.answers)) if task.answers else _Readable(self._masks, task)
        if isinstance(task, Timed | VoiceActivity):
            return self._segments(task, seconds)
        # Intents too: names and values are open, and pieces cross the brackets between them.
        return _PlainText(self._masks)

    def _make_labels(self, labels: tuple[str, ...]) -> _Labels:
        return _Labels(self._masks, [self._ids(label) for label in labels])

    def _ids(self, label: str) -> tuple[int, ...]:
        """The label as an answer, its end too."""
        try:
            return (*self._vocabulary.text_ids(self._text.encode(label)).tolist(), self._vocabulary.end)
        except InputError as error:
            raise InputError(f"label {label!r}: {error}") from error

    def _segments(self, task: Timed | VoiceActivity, seconds: float | None) -> _Segments:
        vocabulary, step = self._vocabulary, self._vocabulary.TIME_STEP
        if not vocabulary.times:
            raise InputError(
                f"the task {task.name} is answered with marks of time, and this checkpoint has no marks of time: "
                "use one that was trained with them, or ask for the words alone"
            )
        steps = vocabulary.times - 1
        if seconds is not None:
            steps = min(steps, math.ceil(round(seconds / step, 6)))
        last = vocabulary.time(steps * step)
        if isinstance(task, Timed):
            silence = (vocabulary.end,)
            return _Segments(self._masks, last, silence, speakers=task.speakers, words=task.words, overlap=True)
        return _Segments(self._masks, last, self._ids(NO_SPEECH), speakers=False, words=False, overlap=False)


class _Masks:
    """Tensors of allowed ids, each made once while it is in use.

    get: takes ids, a range of ids, and whether any text may come; gives bool [vocabulary].
    """

    def __init__(self, vocabulary: Vocabulary, text: TextTokenizer) -> None:
        self.vocabulary = vocabulary
        self.text = text
        self._said = vocabulary.is_text(torch.arange(vocabulary.size))  # [vocabulary]
        self._said[text.hidden_ids] = False
        self._said[text.size : vocabulary.text_size] = False  # rows of no piece
        self.get = lru_cache(max(256, _CACHED_BYTES // vocabulary.size))(self._make)

    def _make(self, ids: tuple[int, ...] = (), marks: range = range(0), any_text: bool = False) -> Tensor:
        mask = self._said.clone() if any_text else torch.zeros_like(self._said)
        mask[list(ids)] = True
        mask[marks.start : marks.stop] = True
        return mask


class _PlainText(Grammar[None]):
    """Any text, or none."""

    start = None

    def __init__(self, masks: _Masks) -> None:
        self._mask = masks.get(ids=(masks.vocabulary.end,), any_text=True)

    def allowed(self, state: None) -> Tensor:
        return self._mask

    def next(self, state: None, index: int) -> None:
        return None


class _Readable(Grammar[tuple[int, ...]]):
    """Any text that the task reads without faults. A state is the ids so far."""

    start = ()

    def __init__(self, masks: _Masks, task: Task) -> None:
        self._masks = masks
        self._task = task

    def allowed(self, state: tuple[int, ...]) -> Tensor:
        faults = self._task.read((self._masks.text.decode(list(state)),)).faults
        return self._masks.get(ids=() if faults else (self._masks.vocabulary.end,), any_text=True)

    def next(self, state: tuple[int, ...], index: int) -> tuple[int, ...]:
        return state if index == self._masks.vocabulary.end else (*state, index)


class _Labels(Grammar[int]):
    """One of some sequences of ids, each with its end. A state is a node of their trie."""

    start = 0

    def __init__(self, masks: _Masks, sequences: Sequence[Sequence[int]]) -> None:
        self._masks = masks
        self._nodes: list[dict[int, int]] = [{}]  # id: the node after it
        for *pieces, end in sequences:
            node = self.start
            for index in pieces:
                if index not in self._nodes[node]:
                    self._nodes[node][index] = len(self._nodes)
                    self._nodes.append({})
                node = self._nodes[node][index]
            self._nodes[node][end] = node
        self._allowed = [tuple(sorted(node)) for node in self._nodes]

    def allowed(self, state: int) -> Tensor:
        return self._masks.get(ids=self._allowed[state])

    def next(self, state: int, index: int) -> int:
        return self._nodes[state][index]


class _Place(Enum):
    """What is to come."""

    SEGMENT = auto()  # or the end
    START = auto()
    WORDS = auto()
    END = auto()  # of the segment, or more of its words
    SILENCE = auto()  # the rest of the words that say that there is none


class _Point(NamedTuple):
    """Where an answer of segments is.

    highest: number of speakers so far. earliest: the mark before which the next segment may not start; within a
    segment, its start. closing: the ids that end the answer, once it can. pieces: the words of the segment while they
    may yet be read as none.
    """

    place: _Place
    highest: int
    earliest: int
    closing: tuple[int, ...]
    pieces: tuple[int, ...] = ()


class _Segments(Grammar[_Point]):
    """Segments ``[speaker] time [words] time`` in order, or `silence`. Marks of time are ids in their order.

    last: the latest mark. silence: an answer without segments, its end too. overlap: segments are in order of their
    starts; else each starts where the one before it ends, or later.
    """

    def __init__(
        self, masks: _Masks, last: int, silence: tuple[int, ...], *, speakers: bool, words: bool, overlap: bool
    ) -> None:
        vocabulary = masks.vocabulary
        self._masks = masks
        self._times = range(vocabulary.time(0.0), last + 1)
        self._numbers = {vocabulary.speaker(n): n for n in range(1, vocabulary.MAX_SPEAKERS + 1)}  # by id
        self._speakers = speakers
        self._words = words
        self._overlap = overlap
        self._end = vocabulary.end
        self.start = _Point(_Place.SEGMENT, 0, self._times.start, silence)

    def allowed(self, state: _Point) -> Tensor:
        get, last = self._masks.get, self._times[-1]
        if state.place is _Place.END:
            return get(marks=range(state.earliest + 1, last + 1), any_text=self._words)
        if state.place is _Place.WORDS:
            return get(any_text=True)
        if state.place is _Place.SILENCE:
            return get(ids=state.closing[:1])
        starts = range(state.earliest, last)  # what starts at the last mark could not end
        if state.place is _Place.START:
            return get(marks=starts)
        if self._speakers:
            known = state.highest + 1 if starts else 0
            return get(ids=(*(index for index, n in self._numbers.items() if n <= known), state.closing[0]))
        return get(ids=state.closing[:1], marks=starts)

    def next(self, state: _Point, index: int) -> _Point:
        if index == self._end:
            return state
        if index in self._numbers:
            return state._replace(place=_Place.START, highest=max(state.highest, self._numbers[index]))
        if index not in self._times:  # text
            return self._silent(state) if state.place in (_Place.SEGMENT, _Place.SILENCE) else self._said(state, index)
        if state.place in (_Place.SEGMENT, _Place.START):
            return state._replace(place=_Place.WORDS if self._words else _Place.END, earliest=index)
        earliest = state.earliest if self._overlap else index
        return _Point(_Place.SEGMENT, state.highest, earliest, (self._end,))

    def _silent(self, state: _Point) -> _Point:
        return state._replace(place=_Place.SILENCE, closing=state.closing[1:])

    def _said(self, state: _Point, index: int) -> _Point:
        """After another piece of words. A segment ends only after something that is read as words."""
        if state.place is _Place.END and not state.pieces:
            return state
        pieces = (*state.pieces, index)
        words = self._masks.text.decode(list(pieces)).strip()
        # U+FFFD may be the beginning of a character, and that a space; any other character stays what it is.
        settled = bool(words.replace("\ufffd", "").strip())
        return state._replace(place=_Place.END if words else _Place.WORDS, pieces=() if settled else pieces)
