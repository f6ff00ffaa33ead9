"""From encoded utterances to training sequences: which task, which wording, which answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from random import Random

import torch
from datasets import Dataset
from torch import Tensor

from speechllm.data.encoded import row_codes
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
        self.rows = [row for row in rows if self.answers(row)]
        self.codes = [row_codes(row, vocabulary.n_q).to(torch.int16) for row in self.rows]
        for row in self.rows:
            del row["codes"]
        # the audio is most of a sequence; the instruction takes a dozen ids
        self.lengths = [
            len(vocabulary.audio_ids(codes)) + len(text.encode(row["text"] or "")) + 12.0
            for row, codes in zip(self.rows, self.codes, strict=True)
        ]

    def answers(self, row: Mapping) -> dict[Task, str]:
        """The tasks of the mixture that this utterance has an answer for."""
        translations = json.loads(row["translations"])
        written = {task: task.write(row["text"], translations) for task in self.weights}
        return {task: answer for task, answer in written.items() if answer is not None}

    def example(self, index: int, rng: Random) -> Example:
        """Utterance ``index`` with a task, a training wording and the task's answer."""
        row, codes = self.rows[index], self.codes[index].long()
        answers = self.answers(row)
        task = rng.choices(list(answers), [self.weights[t] for t in answers])[0]
        if self.code_noise:
            generator = torch.Generator().manual_seed(rng.getrandbits(62))
            hit = torch.rand(codes.shape[1], generator=generator) < self.code_noise
            noise = torch.randint(self.vocabulary.card, codes.shape, generator=generator)
            codes = torch.where(hit, noise, codes)
        return Example(codes, rng.choice(task.wordings), answers[task], task.name, row["language"], row["speaker"])

    def batch(self, indices: list[int], rng: Random) -> TrainingBatch:
        """The utterances as padded sequences with their loss mask and transcripts."""
        lm = collate([render(self.example(i, rng), self.vocabulary, self.text) for i in indices], self.vocabulary.pad)
        transcripts = [torch.tensor(self.text.encode(self.rows[i]["text"] or ""), dtype=torch.int64) for i in indices]
        return TrainingBatch(
            lm=lm,
            audio_mask=self.vocabulary.is_audio(lm.input_ids) | (lm.input_ids == self.vocabulary.audio_end),
            transcripts=torch.nn.utils.rnn.pad_sequence(transcripts, batch_first=True),
            transcript_lengths=torch.tensor([len(t) for t in transcripts]),
        )
