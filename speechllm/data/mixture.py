"""From encoded utterances to training sequences: which tasks a recording can teach, and what is asked and answered."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from random import Random
from time import perf_counter

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from speechllm.data.code_noise import CodeNoise
from speechllm.data.encoded import row_codes, row_facts
from speechllm.data.episodes import AGAIN, EXCERPT, NAMED, Turn, excerpt, label_turns, transcript_turns
from speechllm.data.pools import find_pools
from speechllm.prompt import Batch, Example, Rendered, collate, render, render_further
from speechllm.tasks import TRAINABLE, TRAITS, Facts, FewShot, FewShotLabel, Parts, Task
from speechllm.tasks.labels import NumberOfSpeakers
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary


@dataclass(frozen=True)
class Draw:
    """An utterance, by its row, and the task it is to teach; and those that it teaches also, heard once for all."""

    task: str
    row: int
    also: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """A batch for the LM, and the transcripts for CTC on the audio positions of its clips, row by row.

    An example is a question and its answer. It has a clip, or as many more as it has shots; or none of its own, where
    it is a further question about that of another.
    """

    lm: Batch
    example_ids: Tensor  # int64 [B, seq]: the example a position belongs to; -1 on padding
    audio_mask: Tensor  # bool [B, seq]: the audio ids, marks among them too, and the end-of-audio id
    audio_lengths: Tensor  # int64 [clips]: how many of them are a clip's
    transcripts: Tensor  # int64 [clips, pieces], text ids padded with 0
    transcript_lengths: Tensor  # int64 [clips]; 0 where there is no transcript
    traits: Tensor  # int64 [clips, traits]: what is heard of TRAITS, as places of their labels; -1 where not known
    tasks: tuple[str, ...]  # [examples]
    draws: tuple[Draw, ...]  # a sequence each, row by row
    audio_seconds: float  # that its examples hear
    seconds: float  # that making the batch took

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
        task_corpora: Mapping[str, Collection[str]] | None = None,
    ):
        """Recordings of more than ``max_seconds`` are left out. task_corpora: task -> the corpora that teach it, for
        tasks that not all are to teach.
        """
        self.vocabulary, self.text, self.noise = vocabulary, text, noise
        self.rows = concatenate_datasets(list(corpora.values()))
        self._facts = self.rows.select_columns("facts")
        sizes = {name: len(rows) for name, rows in corpora.items()}
        self.pools, self._kin = find_pools(self.rows, sizes, tasks, vocabulary, max_seconds, task_corpora or {})
        self._names, self._ends = list(corpora), np.cumsum([*sizes.values()])
        words = self._kin.get("few_shot_word")
        self._words = sorted({word for classes in words.groups.values() for word in classes}) if words else []

    @property
    def used(self) -> int:
        """Recordings that teach any task."""
        rows = [pool.rows for corpora in self.pools.values() for pool in corpora.values()]
        return len(np.unique(np.concatenate(rows))) if rows else 0

    def named(self, draws: Sequence[Draw]) -> str:
        """The utterances and tasks drawn, for messages."""
        return ", ".join(f"{self.rows[draw.row]['id']} ({', '.join((draw.task, *draw.also))})" for draw in draws)

    def facts(self, row: int) -> Facts:
        """What is known about the recording of a row."""
        return row_facts(self._facts[row])

    def turns(self, draw: Draw, rng: Random, wordings: tuple[str, ...] | None = None) -> list[Turn]:
        """Shots, where the task has them, and last the utterance drawn.

        wordings: to draw instructions from; the trained ones unless given. Where they are, nothing is made easier: no
        shot is what is asked about, no instruction names the class.
        """
        task = TRAINABLE[draw.task]
        if isinstance(task, FewShotLabel):
            eased = (NAMED, AGAIN) if wordings is None else ()
            return label_turns(self._kin[task.name], draw.row, self._words, rng, wordings or task.wordings, *eased)
        if isinstance(task, FewShot):
            return transcript_turns(self._kin[task.name], draw.row, self.facts, rng, wordings or task.wordings)
        return [Turn(draw.row, *self._posed(task, draw.row, rng, wordings))]

    def _posed(self, task: Task, row: int, rng: Random, wordings: tuple[str, ...] | None = None) -> tuple[str, Parts]:
        corpus = self._names[int(np.searchsorted(self._ends, row, "right"))]
        alike = self.pools[task.name][corpus].rows
        posed = task.pose(self.facts(row), rng, wordings, lambda: self.facts(int(rng.choice(alike))))
        assert posed is not None, f"row {row} has no answer for {task.name}"
        return posed

    def example(self, turn: Turn, task: Task, rng: Random) -> Example:
        """The utterance of a turn, what is asked about it and the answer."""
        row = self.rows[turn.row]
        codes = row_codes(row, self.vocabulary.n_q)
        if not task.listens:
            codes = codes[:, :0]
        elif not turn.whole:
            codes = excerpt(codes, row_facts(row).duration, rng)
        if self.noise and codes.numel():
            codes = self.noise(codes, self.vocabulary.card, rng)
        return Example(codes, turn.instruction, turn.answer, task.name, row_facts(row).language, row["speaker"])

    def episode(self, draw: Draw, rng: Random, wordings: tuple[str, ...] | None = None) -> list[Example]:
        """Shots, where the task has them, and last what is asked; see :meth:`turns`."""
        return [example for _, example in self._clips(draw, rng, wordings)]

    def sequence(self, draw: Draw, rng: Random) -> Rendered:
        """As the LM sees it."""
        return self._render(self._clips(draw, rng))

    def batch(self, draws: Sequence[Draw], row_length: int, rng: Random) -> TrainingBatch:
        """The draws as sequences packed into rows of up to ``row_length`` ids (or the longest sequence, if longer)."""
        begun = perf_counter()
        clips = [self._clips(draw, rng) for draw in draws]
        rendered = [
            [self._render(own), *self._further(draw, own[-1][1], rng)] for draw, own in zip(draws, clips, strict=True)
        ]
        rows = pack([sum(len(part.ids) for part in parts) for parts in rendered], row_length)
        order = [index for row in rows for index in row]
        lm = collate([[part for index in row for part in rendered[index]] for row in rows], self.vocabulary.pad)
        example_ids = torch.full_like(lm.input_ids, -1)
        lengths = torch.tensor([len(part.ids) for index in order for part in rendered[index]])
        example_ids[lm.attention_mask.bool()] = torch.arange(len(lengths)).repeat_interleave(lengths)
        heard = [clip for index in order for clip in clips[index]]
        facts = [self.facts(turn.row) for turn, _ in heard]
        texts = [self._transcript(f, *clip) for f, clip in zip(facts, heard, strict=True)]
        transcripts = [torch.tensor(self.text.encode(text), dtype=torch.int64) for text in texts]
        return TrainingBatch(
            lm=lm,
            example_ids=example_ids,
            audio_mask=self._listening(lm.input_ids),
            audio_lengths=torch.tensor([self._heard(example) for _, example in heard]),
            transcripts=torch.nn.utils.rnn.pad_sequence(transcripts, batch_first=True),
            transcript_lengths=torch.tensor([len(t) for t in transcripts]),
            traits=torch.tensor([self._traits(f, *clip) for f, clip in zip(facts, heard, strict=True)]),
            tasks=tuple(task for index in order for task in (draws[index].task, *draws[index].also)),
            draws=tuple(draws[index] for index in order),
            audio_seconds=sum(self._seconds(f, *clip) for f, clip in zip(facts, heard, strict=True)),
            seconds=perf_counter() - begun,
        )

    def _clips(self, draw: Draw, rng: Random, wordings: tuple[str, ...] | None = None) -> list[tuple[Turn, Example]]:
        task = TRAINABLE[draw.task]
        return [(turn, self.example(turn, task, rng)) for turn in self.turns(draw, rng, wordings)]

    def _render(self, clips: Sequence[tuple[Turn, Example]]) -> Rendered:
        *shots, last = (example for _, example in clips)
        return render(last, self.vocabulary, self.text, shots, [turn.learnt for turn, _ in clips[:-1]])

    def _further(self, draw: Draw, heard: Example, rng: Random) -> list[Rendered]:
        """What else the draw teaches by the audio of ``heard``."""
        found = []
        for task in (TRAINABLE[name] for name in draw.also):
            assert task.listens and TRAINABLE[draw.task].listens, f"{task.name} or {draw.task} is about no audio"
            assert not isinstance(TRAINABLE[draw.task], FewShot), "of an episode nothing further can be asked"
            instruction, answer = self._posed(task, draw.row, rng)
            example = replace(heard, instruction=instruction, answer=answer, task=task.name)
            found.append(render_further(example, self.vocabulary, self.text))
        return found

    def _heard(self, example: Example) -> int:
        """Ids of the audio, and that of its end."""
        return len(self.vocabulary.audio_ids(example.codes)) + 1

    def _transcript(self, facts: Facts, turn: Turn, example: Example) -> str:
        """What CTC reads: "" where the words are not known, not heard, or only partly."""
        if not (example.codes.numel() and turn.whole):
            return ""
        said = [segment.text for segment in facts.segments]
        return facts.text or (" ".join(said) if all(map(str.strip, said)) else "")

    def _traits(self, facts: Facts, turn: Turn, example: Example) -> list[int]:
        """Of an excerpt it is not known how many speak in it."""
        known = [bool(example.codes.numel()) and (turn.whole or not isinstance(t, NumberOfSpeakers)) for t in TRAITS]
        labels = [trait.of(facts) if told else None for trait, told in zip(TRAITS, known, strict=True)]
        return [
            trait.labels.index(label) if label in trait.labels else -1
            for trait, label in zip(TRAITS, labels, strict=True)
        ]

    def _seconds(self, facts: Facts, turn: Turn, example: Example) -> float:
        """About: of an excerpt as many as they are on average."""
        return facts.duration * bool(example.codes.numel()) if turn.whole else min(facts.duration, sum(EXCERPT) / 2)

    def _listening(self, ids: Tensor) -> Tensor:
        begin, end = ids == self.vocabulary.audio_begin, ids == self.vocabulary.audio_end
        return (begin.cumsum(1) > end.cumsum(1)) & ~begin | end


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
