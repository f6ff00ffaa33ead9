"""Validation while training: of each task on each dev corpus the loss, the listening gap, and scores of answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from random import Random

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from transformers import PreTrainedModel

from speechllm.codec import Codec
from speechllm.data.encoded import read_encoded
from speechllm.data.mixture import Draw, Mixture
from speechllm.errors import InputError
from speechllm.generate import generate
from speechllm.prompt import IGNORE_INDEX, Example, answer_parts, collate, next_ids, render
from speechllm.tasks import TRAINABLE, Parts
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train.objective import log_probs
from train.pretrain_config import Pretraining
from train.ranks import everywhere, gather
from train.scoring import score

CHUNK = 16  # clips in one forward pass
LABELS = (
    4  # times as many clips of tasks answered by a label: that takes an id or two, and shares of a few clips are noise
)


@dataclass(frozen=True, eq=False)
class DevSet:
    """Examples of one task on one dev corpus; this rank's share of them.

    All ranks have as many, since a model whose layers lie on several must be called by all of them alike: the last
    one may be there once more, and only the first ``counted`` count.
    """

    name: str
    task: str
    examples: list[list[Example]]  # shots, where the task has them, and what is asked
    foreign: list[list[Example]]  # the same with the audio of the next clip, of all ranks', in what is asked
    durations: list[float]  # of the clips that count, in seconds
    counted: int


class Validation:
    """Scores the LM on the tasks of the mixture, on the dev corpora that have answers for them."""

    def __init__(
        self, config: Pretraining, codec: Codec, vocabulary: Vocabulary, text: TextTokenizer, rank: int, world: int
    ):
        self.vocabulary, self.text, self.world = vocabulary, text, world
        self.together = world > 1 and (config.zero_stage == 3 or config.expert_parallel > 1)
        self.max_answer_tokens = config.max_answer_tokens
        self.tasks = list(config.tasks)
        self.sets = []
        for folder in config.dev_corpora:
            rows = read_encoded([folder], "dev", codec)
            scored = config.scored_on(folder)
            mixture = Mixture({folder.name: rows}, vocabulary, text, scored, config.max_audio_seconds)
            if isinstance(config.dev_corpora, dict) and (idle := set(scored) - mixture.pools.keys()):
                raise InputError(
                    f"dev_corpora: {folder} has no answers for {', '.join(sorted(idle))} among its dev clips of up to "
                    f"max_audio_seconds = {config.max_audio_seconds}: leave them out there"
                )
            for task in mixture.pools:
                self.sets.append(dev_set(folder.name, mixture, task, config.decode_examples, rank, world))

    def run(self, lm: PreTrainedModel) -> dict[str, float]:
        """``loss_…``, ``gap_…`` and the scores (``wer_…``) of each task and corpus, the same on all ranks."""
        lm.eval()
        scores: dict[str, float] = {}
        for dev in self.sets:
            label = f"{dev.task}_{dev.name}"
            own, foreign = self.losses(lm, dev)
            scores[f"loss_{label}"] = own
            if TRAINABLE[dev.task].listens:
                scores[f"gap_{label}"] = foreign - own
            answers = [last.answer for *_, last in dev.examples[: dev.counted]]
            shares = gather((self.decode(lm, dev)[: dev.counted], answers, dev.durations))
            said, true, durations = ([*chain(*parts)] for parts in zip(*shares, strict=True))
            read = TRAINABLE[dev.task].read
            for name, value in score(TRAINABLE[dev.task], [*map(read, true)], [*map(read, said)], durations).items():
                scores[f"{name}_{label}"] = value
        lm.train()
        return scores

    @torch.inference_mode()
    def losses(self, lm: PreTrainedModel, dev: DevSet) -> tuple[float, float]:
        """Loss per answer id with each clip's own audio, and with the next clip's audio in its place."""
        sums = torch.zeros(3, device=lm.device)  # where the ranks of a job on GPUs can add them up
        for start in range(0, len(dev.examples), CHUNK):
            chunk, foreign = (some[start : start + CHUNK] for some in (dev.examples, dev.foreign))
            counted = max(0, dev.counted - start)
            own, count = self.summed_loss(lm, chunk, counted)
            sums += torch.stack([own, self.summed_loss(lm, foreign, counted)[0], count]).to(sums.device)
        if self.world > 1:
            distributed.all_reduce(sums)
        own_mean, foreign_mean = (sums[:2] / sums[2]).tolist()
        return own_mean, foreign_mean

    def summed_loss(self, lm: PreTrainedModel, examples: list[list[Example]], counted: int) -> tuple[Tensor, Tensor]:
        """Summed loss over the answers' ids of the first ``counted`` examples, and their number."""
        rows = [[render(last, self.vocabulary, self.text, shots)] for *shots, last in examples]
        batch = collate(rows, self.vocabulary.pad)
        target = next_ids(batch.labels)
        target[counted:] = IGNORE_INDEX
        target = target.to(lm.device)
        scored = target != IGNORE_INDEX
        hidden = lm.base_model(input_ids=batch.input_ids.to(lm.device), use_cache=False).last_hidden_state[:, :-1]
        loss = F.nll_loss(log_probs(lm, hidden[scored]), target[scored], reduction="sum")
        return loss, scored.sum().float()

    def decode(self, lm: PreTrainedModel, dev: DevSet) -> list[Parts]:
        """The LM's own answers to the examples."""
        answers: list[Parts] = []
        for start in range(0, len(dev.examples), CHUNK):
            prompts = [
                render(replace(last, answer=None), self.vocabulary, self.text, shots).ids
                for *shots, last in dev.examples[start : start + CHUNK]
            ]
            completions = generate(
                lm,
                prompts,
                end_id=self.vocabulary.end,
                pad_id=self.vocabulary.pad,
                max_new_tokens=self.max_answer_tokens,
                everywhere=everywhere if self.together else None,
            )
            answers += [answer_parts(c.ids, self.vocabulary, self.text) for c in completions]
        return answers

    def corpora(self) -> dict[str, list[str]]:
        """Each task of the mixture, and the dev corpora it is scored on."""
        return {task: [dev.name for dev in self.sets if dev.task == task] for task in self.tasks}


def dev_set(name: str, mixture: Mixture, task: str, most: int, rank: int, world: int) -> DevSet:
    """This rank's share of up to ``most`` clips (of labels more) of all lengths, asked in the task's first wording."""
    able = mixture.pools[task][name].rows.tolist()
    count = min(most * LABELS if TRAINABLE[task].metric == "accuracy" else most, len(able))
    chosen = [able[n * len(able) // count] for n in range(count)]
    own, wording = chosen[rank::world], TRAINABLE[task].wordings[:1]
    pairs = [*zip(chosen, chosen[1:] + chosen[:1], strict=True)]  # a clip and the next
    filled = pairs[rank::world] + pairs[-1:] * (-(-count // world) - len(own))
    examples, others = (
        [mixture.episode(Draw(task, row), Random(row), wording) for row in rows] for rows in zip(*filled, strict=True)
    )
    foreign = [
        [*shots, replace(last, codes=other[-1].codes)] for (*shots, last), other in zip(examples, others, strict=True)
    ]
    return DevSet(name, task, examples, foreign, [mixture.facts(row).duration for row in own], len(own))
