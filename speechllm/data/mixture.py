"""From encoded utterances to training sequences: which tasks a recording can teach, and what is asked and answered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from random import Random
from time import perf_counter

import numpy as np
import torch
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets import Sequence as Values
from datasets.fingerprint import Hasher
from torch import Tensor

import speechllm
from speechllm.data.encoded import row_codes, row_facts
from speechllm.errors import InputError
from speechllm.prompt import Batch, Example, collate, render
from speechllm.tasks import TASKS, TRAITS, Facts, Parts, Speaker, Task, Time
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary

CHARACTERS_PER_PIECE = 3.7  # of text, about
AROUND = 4  # control ids of a sequence


@dataclass(frozen=True)
class Draw:
    """An utterance, by its row, and the task it is to teach."""

    task: str
    row: int


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """A batch for the LM, and the transcripts for CTC on the audio positions of its examples, row by row."""

    lm: Batch
    example_ids: Tensor  # int64 [B, seq]: the example a position belongs to, in the order of ``draws``; -1 on padding
    audio_mask: Tensor  # bool [B, seq]: the audio ids and the end-of-audio id
    audio_lengths: Tensor  # int64 [examples]: how many of them are an example's
    transcripts: Tensor  # int64 [examples, pieces], text ids padded with 0
    transcript_lengths: Tensor  # int64 [examples]; 0 where there is no transcript
    traits: Tensor  # int64 [examples, traits]: what is heard of TRAITS, as places of their labels; -1 where not known
    draws: tuple[Draw, ...]  # [examples]
    audio_seconds: float  # that its examples hear
    seconds: float  # that making the batch took

    @property
    def tasks(self) -> tuple[str, ...]:
        """Of each example."""
        return tuple(draw.task for draw in self.draws)

    def to(self, device: torch.device) -> TrainingBatch:
        """The same batch on ``device``."""
        lm = Batch(*(getattr(self.lm, f.name).to(device) for f in fields(self.lm)))
        return replace(
            self,
            lm=lm,
            example_ids=self.example_ids.to(device),
            audio_mask=self.audio_mask.to(device),
            audio_lengths=self.audio_lengths.to(device),
            transcripts=self.transcripts.to(device),
            transcript_lengths=self.transcript_lengths.to(device),
            traits=self.traits.to(device),
        )


@dataclass(frozen=True, eq=False)
class Pool:
    """The recordings of one corpus that have an answer for one task, shortest first."""

    rows: np.ndarray  # int64 [recordings]
    lengths: np.ndarray  # float [recordings]: ids of their sequences, about


@dataclass(frozen=True)
class CodeNoise:
    """Augmentation of codes: what the LM hears now and then differs from what was said.

    replaced: share of frames whose codes are random ones. masked: share of frames that are hidden, in spans of up to
    ``MAX_SPAN`` (time masking, Park et al. 2019).
    """

    replaced: float = 0.0
    masked: float = 0.0

    MAX_SPAN = 10  # frames

    def __call__(self, codes: Tensor, card: int, rng: Random) -> Tensor:
        """Codes ``[n_q, frames]``, another tensor of the same shape."""
        frames = codes.shape[1]
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        hit = torch.rand(frames, generator=generator) < self.replaced
        codes = torch.where(hit, torch.randint(card, codes.shape, generator=generator), codes)
        # spans of 1 … MAX_SPAN frames that begin anywhere, even before the clip, so that its ends are hidden as often
        # as its middle; so many that they leave 1 - masked of the frames, though some overlap
        chance = -math.log1p(-self.masked) * 2 / (self.MAX_SPAN + 1)
        for _ in range(sum(rng.random() < chance for _ in range(frames + self.MAX_SPAN - 1))):
            start = rng.randrange(1 - self.MAX_SPAN, frames)
            end = start + rng.randint(1, self.MAX_SPAN)
            codes[:, max(0, start) : max(0, end)] = Vocabulary.MASKED
        return codes


def describe(row: dict, tasks: Sequence[str], vocabulary: Vocabulary, max_seconds: float) -> dict:
    """What planning needs of a row: ``tasks`` it has answers for (by place), and ids of their sequences, about."""
    facts = row_facts(row)
    fits = facts.duration <= max_seconds
    posed = [TASKS[name].pose(facts, Random(0)) if fits else None for name in tasks]
    able = [place for place, asked in enumerate(posed) if asked and writable(asked[1], vocabulary)]
    heard = len(vocabulary.audio_ids(row_codes(row, vocabulary.n_q))) if able else 0
    said = [size(*asked) for asked in map(posed.__getitem__, able) if asked]
    lengths = [n + heard * TASKS[tasks[place]].listens for place, n in zip(able, said, strict=True)]
    return {"tasks": able, "lengths": lengths}


def size(instruction: str, answer: Parts) -> float:
    """Ids of a question and its answer, about."""
    characters = len(instruction) + sum(len(part) for part in answer if isinstance(part, str))
    return AROUND + characters / CHARACTERS_PER_PIECE + sum(not isinstance(part, str) for part in answer)


def writable(answer: Parts, vocabulary: Vocabulary) -> bool:
    """Whether there is a mark for each time and speaker of an answer."""
    try:
        for part in answer:
            if isinstance(part, Time):
                vocabulary.time(part.seconds)
            elif isinstance(part, Speaker):
                vocabulary.speaker(part.number)
    except InputError:
        return False
    return True


@cache
def _source() -> str:
    """A hash of the package's code."""
    return Hasher.hash([path.read_bytes() for path in sorted(Path(speechllm.__file__).parent.rglob("*.py"))])


class Mixture:
    """Rows of several corpora as examples of tasks. Everything random depends on the given random state alone.

    pools: task -> corpus -> the recordings that can teach it.
    """

    def __init__(
        self,
        corpora: Mapping[str, Dataset],
        vocabulary: Vocabulary,
        text: TextTokenizer,
        tasks: Sequence[str],
        max_seconds: float = float("inf"),
        noise: CodeNoise | None = None,
    ):
        """Recordings of more than ``max_seconds`` are left out."""
        self.vocabulary, self.text, self.noise = vocabulary, text, noise
        self.rows = concatenate_datasets(list(corpora.values()))
        self._facts = self.rows.select_columns("facts")
        told = self.rows.map(
            describe,
            fn_kwargs={"tasks": list(tasks), "vocabulary": vocabulary, "max_seconds": max_seconds},
            remove_columns=self.rows.column_names,
            features=Features({"tasks": Values(Value("int64")), "lengths": Values(Value("float64"))}),
            # kept in the cache of datasets, which by itself would not notice that a task is another
            new_fingerprint=Hasher.hash(
                [self.rows._fingerprint, [TASKS[t] for t in tasks], vocabulary.to_dict(), max_seconds, _source()]
            ),
            desc="tasks of each recording",
        )
        able: list[list[int]] = [[] for _ in tasks]
        sizes: list[list[float]] = [[] for _ in tasks]
        for row, (places, lengths) in enumerate(zip(told["tasks"], told["lengths"], strict=True)):
            for place, length in zip(places, lengths, strict=True):
                able[place].append(row)
                sizes[place].append(length)
        self._names, self._ends = list(corpora), np.cumsum([len(rows) for rows in corpora.values()])
        self.pools: dict[str, dict[str, Pool]] = {}
        for name, found, length in zip(tasks, able, sizes, strict=True):
            cuts = np.searchsorted(found, self._ends[:-1])
            parts = zip(np.split(np.array(found, int), cuts), np.split(np.array(length), cuts), strict=True)
            for corpus, (rows, lengths) in zip(corpora, parts, strict=True):
                if len(rows):
                    order = np.argsort(lengths, kind="stable")
                    self.pools.setdefault(name, {})[corpus] = Pool(rows[order], lengths[order])

    def named(self, draws: Sequence[Draw]) -> str:
        """The utterances and tasks drawn, for messages."""
        return ", ".join(f"{self.rows[draw.row]['id']} ({draw.task})" for draw in draws)

    def facts(self, row: int) -> Facts:
        """What is known about the recording of a row."""
        return row_facts(self._facts[row])

    def example(self, draw: Draw, rng: Random, wordings: tuple[str, ...] | None = None) -> Example:
        """The utterance with an instruction (drawn from ``wordings``, the trained ones unless given) and its answer."""
        row, task = self.rows[draw.row], TASKS[draw.task]
        facts = row_facts(row)
        corpus = self._names[int(np.searchsorted(self._ends, draw.row, "right"))]
        alike = self.pools[draw.task][corpus].rows
        posed = task.pose(facts, rng, wordings, lambda: self.facts(int(rng.choice(alike))))
        assert posed is not None, f"{row['id']} has no answer for {draw.task}"
        return Example(self._heard(row, task, rng), *posed, task.name, facts.language, row["speaker"])

    def _heard(self, row: dict, task: Task, rng: Random) -> Tensor:
        """The codes of a row ``[n_q, frames]`` as the LM gets them."""
        codes = row_codes(row, self.vocabulary.n_q)
        if not task.listens:
            return codes[:, :0]
        return self.noise(codes, self.vocabulary.card, rng) if self.noise else codes

    def batch(self, draws: Sequence[Draw], row_length: int, rng: Random) -> TrainingBatch:
        """The draws as sequences packed into rows of up to ``row_length`` ids (or the longest sequence, if longer)."""
        begun = perf_counter()
        examples = [self.example(draw, rng) for draw in draws]
        rendered = [render(example, self.vocabulary, self.text) for example in examples]
        rows = pack([len(sequence.ids) for sequence in rendered], row_length)
        order = [index for row in rows for index in row]
        lm = collate([[rendered[index] for index in row] for row in rows], self.vocabulary.pad)
        example_ids = torch.full_like(lm.input_ids, -1)
        lengths = torch.tensor([len(rendered[index].ids) for index in order])
        example_ids[lm.attention_mask.bool()] = torch.arange(len(order)).repeat_interleave(lengths)
        facts = [self.facts(draw.row) for draw in draws]
        heard = [self._transcript(facts[index], examples[index]) for index in order]
        transcripts = [torch.tensor(self.text.encode(text), dtype=torch.int64) for text in heard]
        return TrainingBatch(
            lm=lm,
            example_ids=example_ids,
            audio_mask=self._listening(lm.input_ids),
            audio_lengths=torch.tensor([int(self._listening(rendered[index].ids).sum()) for index in order]),
            transcripts=torch.nn.utils.rnn.pad_sequence(transcripts, batch_first=True),
            transcript_lengths=torch.tensor([len(t) for t in transcripts]),
            traits=torch.tensor([self._traits(facts[index], examples[index]) for index in order]),
            draws=tuple(draws[index] for index in order),
            audio_seconds=sum(f.duration for f, draw in zip(facts, draws, strict=True) if TASKS[draw.task].listens),
            seconds=perf_counter() - begun,
        )

    def _transcript(self, facts: Facts, example: Example) -> str:
        if not example.codes.numel():
            return ""
        return facts.text or " ".join(segment.text for segment in facts.segments)

    def _traits(self, facts: Facts, example: Example) -> list[int]:
        labels = [trait.of(facts) if example.codes.numel() else None for trait in TRAITS]
        return [
            trait.labels.index(label) if label in trait.labels else -1
            for trait, label in zip(TRAITS, labels, strict=True)
        ]

    def _listening(self, ids: Tensor) -> Tensor:
        return self.vocabulary.is_audio(ids) | (ids == self.vocabulary.audio_end)


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Sequences into rows of up to ``row_length`` ids: longest first, each into the first row with room for it.

    A sequence longer than that has a row of its own. Returns indices, row by row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((n for n, left in enumerate(room) if lengths[index] <= left), None)
        if place is None:
            place = len(rows)
            rows.append([])
            room.append(max(row_length, lengths[index]))
        rows[place].append(index)
        room[place] -= lengths[index]
    return rows
