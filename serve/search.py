"""Which id comes next: greedy, drawn at random, or the best of several hypotheses; within the answer's grammar."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from speechllm.grammar import Grammar, State
from speechllm.options import Options

Finish = Literal["stop", "length", "repetition", "timeout", "cancelled"]

REPEATS, REPEATED_IDS = 8, 24  # the same ids so often, and so many ids in all: nothing else will come
LONGEST_REPEAT = 16  # ids


@dataclass(frozen=True)
class Hypothesis:
    """An answer so far: ids without the end id, the log-probability (natural) of each id chosen, the end id too.

    Log-probabilities are of the model's distribution over what the grammar allows.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    state: State

    @property
    def score(self) -> float:
        """Mean log-probability of an id."""
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else 0.0


class Search(ABC):
    """The decoding of one answer, a row of logits for each of its ``hypotheses`` at a time.

    width: rows it may come to need. hypotheses: those that go on; empty when it has finished. best: the answer so far.
    """

    width = 1

    def __init__(self, grammar: Grammar, end_id: int, max_tokens: int):
        self._grammar, self._end_id, self.max_tokens = grammar, end_id, max_tokens
        self.best = Hypothesis((), (), grammar.start)
        self.hypotheses = [self.best]
        self.finish: Finish | None = None

    def allowed(self) -> list[Tensor]:
        """bool ``[vocabulary]`` for each hypothesis."""
        return [self._grammar.allowed(hypothesis.state) for hypothesis in self.hypotheses]

    @abstractmethod
    def advance(self, log_probs: Tensor) -> list[int]:
        """Take ``log_probs [hypotheses, vocabulary]``, -inf where nothing is allowed; for each of the hypotheses that
        now go on, which of the former it continues."""

    def _finish(self, finish: Finish) -> None:
        self.finish, self.hypotheses = finish, []
        if finish == "repetition" and (loop := repeated(self.best.ids)):
            self.best = replace(self.best, ids=self.best.ids[:-loop], logprobs=self.best.logprobs[:-loop])

    def _grown(self, hypothesis: Hypothesis, index: int, log_prob: float) -> Hypothesis:
        if index == self._end_id:
            return replace(hypothesis, logprobs=(*hypothesis.logprobs, log_prob))
        state = self._grammar.next(hypothesis.state, index)
        return Hypothesis((*hypothesis.ids, index), (*hypothesis.logprobs, log_prob), state)


class Single(Search):
    """One hypothesis: the likeliest id each time, or one drawn at random."""

    def __init__(self, grammar: Grammar, end_id: int, max_tokens: int, options: Options):
        super().__init__(grammar, end_id, max_tokens)
        self._options = options
        self._generator = torch.Generator().manual_seed(options.seed) if options.temperature else None

    def advance(self, log_probs: Tensor) -> list[int]:
        index = int(log_probs[0].argmax()) if self._generator is None else self._draw(log_probs[0])
        self.best = self._grown(self.best, index, float(log_probs[0, index]))
        self.hypotheses = [self.best]
        if index == self._end_id:
            self._finish("stop")
        elif repeated(self.best.ids):
            self._finish("repetition")
        elif len(self.best.ids) == self.max_tokens:
            self._finish("length")
        return [0] * len(self.hypotheses)

    def _draw(self, log_probs: Tensor) -> int:
        below = (log_probs - log_probs.max()).cpu().double()  # the likeliest stays 0 at any temperature
        probs, ids = (below / self._options.temperature).softmax(-1).sort(descending=True, stable=True)
        kept = probs.cumsum(0) - probs < self._options.top_p  # the first is always among them
        return int(ids[torch.multinomial(probs * kept, 1, generator=self._generator)])


class Beams(Search):
    """Beam search: the ``width`` likeliest hypotheses go on, until one that has ended is likelier by id than each."""

    def __init__(self, grammar: Grammar, end_id: int, max_tokens: int, width: int):
        super().__init__(grammar, end_id, max_tokens)
        self.width = width
        self._ended: Hypothesis | None = None

    def advance(self, log_probs: Tensor) -> list[int]:
        totals = torch.tensor([sum(h.logprobs) for h in self.hypotheses], device=log_probs.device)
        size = log_probs.shape[1]
        found = (totals[:, None] + log_probs).flatten().topk(min(2 * self.width, log_probs.numel()))
        grown: list[tuple[int, Hypothesis]] = []
        for total, place in zip(found.values.tolist(), found.indices.tolist(), strict=True):
            row, index = divmod(place, size)
            if math.isinf(total) or len(grown) == self.width:
                break
            hypothesis = self._grown(self.hypotheses[row], index, float(log_probs[row, index]))
            if index != self._end_id:
                grown.append((row, hypothesis))
            elif self._ended is None or hypothesis.score > self._ended.score:
                self._ended = hypothesis
        self.hypotheses = [hypothesis for _, hypothesis in grown]
        ended = [self._ended] if self._ended else []
        self.best = max((*ended, *self.hypotheses), key=lambda hypothesis: hypothesis.score)
        if self.best is self._ended:
            self._finish("stop")
        elif len(self.best.ids) == self.max_tokens:
            self._finish("length")
        elif repeated(self.best.ids):
            self._finish("repetition")
        return [row for row, _ in grown] if self.hypotheses else []


def make_search(grammar: Grammar, end_id: int, max_tokens: int, options: Options) -> Search:
    """The search that the options ask for."""
    limit = max_tokens if options.max_tokens is None else min(options.max_tokens, max_tokens)
    if options.beams > 1:
        return Beams(grammar, end_id, limit, options.beams)
    return Single(grammar, end_id, limit, options)


def repeated(ids: Sequence[int]) -> int:
    """How many ids at the end only say again what stands before them; 0 unless there are REPEATS of the same."""
    for size in range(1, min(LONGEST_REPEAT, len(ids) // REPEATS) + 1):
        length = size * max(REPEATS, -(-REPEATED_IDS // size))
        tail = ids[-length:]
        if len(ids) >= length and all(tail[i] == tail[i - size] for i in range(size, length)):
            return length - size
    return 0
