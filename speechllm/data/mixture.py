"""From encoded utterances to training sequences: which task, which wording, which answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from random import Random

import torch
from datasets import Dataset
from torch import Tensor

from speechllm.data.encoded import row_codes, row_facts
from speechllm.prompt import Batch, Example, collate, render
from speechllm.tasks import TASKS, Task
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """A batch for the LM, and the transcripts for CTC on the audio positions."""

    lm: Batch
    audio_mask: Tensor  # bool [B, seq]: the audio ids and the end-of-audio id
    transcripts: Tensor  # int64 [B, pieces], text ids padded with 0
    transcript_lengths: Tensor  # int64 [B]; 0 where there is no transcript

    def to(self, device: torch.device) -> TrainingBatch:
        """The same batch on ``device``."""
        lm = Batch(*(getattr(self.lm, f.name).to(device) for f in fields(self.lm)))
        return TrainingBatch(
            lm, self.audio_mask.to(device), self.transcripts.to(device), self.transcript_lengths.to(device)
        )


class Mixture:
    """Draws a task and a wording for each utterance; everything depends on the given random state alone."""

    def __init__(
        self,
        rows: Dataset,
        vocabulary: Vocabulary,
        text: TextTokenizer,
        weights: Mapping[str, float],
        code_noise: float = 0.0,
    ):
        """weights: task name -> relative share among the tasks an utterance has an answer for.
        code_noise: probability with which a frame's codes are replaced by random ones."""
        self.vocabulary, self.text, self.code_noise = vocabulary, text, code_noise
        self.weights = {TASKS[name]: weight for name, weight in weights.items()}
        self.rows, self.facts, self.codes = [], [], []
        for row in rows:
            facts = row_facts(row)
            if any(task.pose(facts, Random(0)) for task in self.weights):
                self.codes.append(row_codes(row, vocabulary.n_q).to(torch.int16))
                self.facts.append(facts)
                self.rows.append({name: value for name, value in row.items() if name not in ("codes", "facts")})
        # the audio is most of a sequence; the instruction takes a dozen ids
        self.lengths = [
            len(vocabulary.audio_ids(codes)) + len(text.encode(facts.text or "")) + 12.0
            for facts, codes in zip(self.facts, self.codes, strict=True)
        ]

    def example(self, index: int, rng: Random) -> Example:
        """Utterance ``index`` with a task, a training wording and the task's answer."""
        row, facts = self.rows[index], self.facts[index]
        posed = {task: asked for task in self.weights if (asked := task.pose(facts, rng))}
        task = rng.choices(list(posed), [self.weights[t] for t in posed])[0]
        instruction, answer = posed[task]
        return Example(self.heard(index, task, rng), instruction, answer, task.name, facts.language, row["speaker"])

    def heard(self, index: int, task: Task, rng: Random | None = None) -> Tensor:
        """The codes of an utterance ``[n_q, frames]``, with ``rng`` some replaced where ``code_noise`` says so."""
        codes = self.codes[index].long()
        if not task.listens:
            return codes[:, :0]
        if rng is not None and self.code_noise:
            generator = torch.Generator().manual_seed(rng.getrandbits(62))
            hit = torch.rand(codes.shape[1], generator=generator) < self.code_noise
            noise = torch.randint(self.vocabulary.card, codes.shape, generator=generator)
            codes = torch.where(hit, noise, codes)
        return codes

    def batch(self, indices: list[int], rng: Random) -> TrainingBatch:
        """The utterances as padded sequences with their loss mask and transcripts."""
        examples = [self.example(i, rng) for i in indices]
        lm = collate([render(example, self.vocabulary, self.text) for example in examples], self.vocabulary.pad)
        heard = [self.facts[i].text or "" if e.codes.numel() else "" for i, e in zip(indices, examples, strict=True)]
        transcripts = [torch.tensor(self.text.encode(text), dtype=torch.int64) for text in heard]
        return TrainingBatch(
            lm=lm,
            audio_mask=self.vocabulary.is_audio(lm.input_ids) | (lm.input_ids == self.vocabulary.audio_end),
            transcripts=torch.nn.utils.rnn.pad_sequence(transcripts, batch_first=True),
            transcript_lengths=torch.tensor([len(t) for t in transcripts]),
        )
