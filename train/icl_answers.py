"""What a checkpoint answers after shots: among labels as with ``--label``, or in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from speechllm.audio import to_samples
from speechllm.checkpoint import Checkpoint
from speechllm.errors import InputError
from speechllm.generate import generate
from speechllm.grammar import Grammar, Grammars
from speechllm.prompt import Example, answer_parts, render
from speechllm.tasks import Task
from speechllm.tasks.base import words_of
from speechllm.tasks.labels import Choice
from train.icl_clips import HEARD, Clip
from train.objective import log_probs

BATCH_IDS = 16384  # of prompts that are answered together, padding too

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Shot:
    """A solved example; without a clip nothing is heard in it."""

    clip: Clip | None
    answer: str


class Listener:
    """A checkpoint that hears each clip once, and answers questions about it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.vocabulary, self.text, self.lm = checkpoint.vocabulary, checkpoint.text, checkpoint.lm
        self.positions: int = self.lm.config.max_position_embeddings
        self._grammars = Grammars(self.vocabulary, self.text)
        self._codes: dict[str, Tensor] = {}

    def codes(self, clip: Clip | None) -> Tensor:
        """What is heard of a clip, int64 ``[n_q, frames]``; no frames without one."""
        if clip is None:
            return torch.zeros(self.vocabulary.n_q, 0, dtype=torch.int64)
        codec = self.checkpoint.codec
        if clip.key not in self._codes:
            with torch.inference_mode():
                self._codes[clip.key] = self.checkpoint.encode(clip.wav(codec.sample_rate))
        codes = self._codes[clip.key]
        return codes if clip.whole else codes[:, : to_samples(HEARD, codec.frame_rate)]

    def turn_ids(self, seconds: float, instruction: str, answer: str) -> float:
        """The most ids of a clip of this length with its question and answer; of one that is too long infinity."""
        if seconds > self.checkpoint.settings.max_audio_seconds:
            return math.inf
        frames = int(seconds * self.checkpoint.codec.frame_rate) + 2  # a last one that is not full, and rounding
        codes = (torch.arange(frames) % self.vocabulary.card).expand(self.vocabulary.n_q, -1)  # no repeats to merge
        return len(render(Example(codes, instruction, answer), self.vocabulary, self.text).ids)

    def prompt(self, instruction: str, clip: Clip, shots: Sequence[Shot], answer_ids: int) -> Tensor:
        """Ids ``[seq]`` of a question about ``clip``, which the shots were asked too.

        Raises InputError where no answer of ``answer_ids`` ids fits the model's positions behind them.
        """
        solved = [Example(self.codes(shot.clip), instruction, shot.answer) for shot in shots]
        ids = render(Example(self.codes(clip), instruction), self.vocabulary, self.text, solved).ids
        if len(ids) + answer_ids > self.positions:
            raise InputError(
                f"{clip.key}: {len(shots)} shots and the question take {len(ids)} ids, which with an answer exceed "
                f"the model's {self.positions} positions: ask for fewer --shots"
            )
        return ids

    def answer_ids(self, answers: Sequence[str]) -> int:
        """Ids of the longest of the answers and its end."""
        return 1 + max(len(self.text.encode(answer)) for answer in answers)

    @torch.inference_mode()
    def choose(self, prompts: Sequence[Tensor], labels: Sequence[tuple[str, ...]], advance: Advance) -> list[str]:
        """One of each prompt's labels, by greedy decoding within the grammar of ``--label``."""
        grammars = [self._grammars.of(Choice("choice", "accuracy", (), (), labels=own)) for own in labels]
        answers: list[list[int]] = [[] for _ in prompts]
        states = [grammar.start for grammar in grammars]
        open_ = [n for n in range(len(prompts)) if self._follow(n, grammars, states, answers)]
        advance(len(prompts) - len(open_))
        while open_:
            texts = {n: torch.cat([prompts[n], torch.tensor(answers[n], dtype=torch.int64)]) for n in open_}
            decided = []
            for batch in batches([len(texts[n]) for n in open_]):
                own = [open_[place] for place in batch]
                scores = self._next([texts[n] for n in own])  # [batch, ids]
                for n, score in zip(own, scores, strict=True):
                    allowed = grammars[n].allowed(states[n])
                    answers[n].append(int(score.masked_fill(~allowed, -torch.inf).argmax()))
                    states[n] = grammars[n].next(states[n], answers[n][-1])
                    if not self._follow(n, grammars, states, answers):
                        decided.append(n)
                        advance(1)
            open_ = [n for n in open_ if n not in decided]
        return [words_of(answer_parts(ids, self.vocabulary, self.text)) for ids in answers]

    def say(self, prompts: Sequence[Tensor], answer_ids: int, advance: Advance, task: Task | None = None) -> list[str]:
        """What is answered to each prompt in up to ``answer_ids`` ids: anything, or what a task's grammar lets through.

        That grammar has to be one where at any place the same may come, as that of words.
        """
        allowed = None
        if task is not None:
            grammar = self._grammars.of(task)
            allowed = grammar.allowed(grammar.start)
        said = [""] * len(prompts)
        for batch in batches([len(prompt) for prompt in prompts]):
            completions = generate(
                self.lm,
                [prompts[n] for n in batch],
                end_id=self.vocabulary.end,
                pad_id=self.vocabulary.pad,
                max_new_tokens=answer_ids,
                allowed=allowed,
            )
            for n, completion in zip(batch, completions, strict=True):
                said[n] = words_of(answer_parts(completion.ids, self.vocabulary, self.text))
            advance(len(batch))
        return said

    def _follow(self, n: int, grammars: Sequence[Grammar], states: list, answers: Sequence[list[int]]) -> bool:
        """Add to an answer what must come next; whether there is something to choose after it."""
        end = self.vocabulary.end
        while not answers[n] or answers[n][-1] != end:
            ids = grammars[n].allowed(states[n]).nonzero().flatten().tolist()
            if len(ids) > 1:
                return True
            answers[n] += ids
            states[n] = grammars[n].next(states[n], ids[0])
        return False

    def _next(self, texts: Sequence[Tensor]) -> Tensor:
        """Log-probabilities ``[batch, ids]`` of what follows each text."""
        # padding is on the right, where causal attention cannot see it
        padded = pad_sequence(list(texts), batch_first=True, padding_value=self.vocabulary.pad).to(self.lm.device)
        hidden = self.lm.base_model(input_ids=padded, use_cache=False).last_hidden_state
        last = torch.tensor([len(text) - 1 for text in texts], device=hidden.device)
        return log_probs(self.lm, hidden[torch.arange(len(texts), device=hidden.device), last]).cpu()


def batches(lengths: Sequence[int], most: int = BATCH_IDS) -> Iterator[list[int]]:
    """Places of prompts of like length, shortest first, of up to ``most`` ids together, padding too."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda n: lengths[n]):
        if batch and (len(batch) + 1) * lengths[place] > most:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
