"""Validation while training: loss, the listening gap, and decoded WER and BLEU on the dev corpora."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from transformers import PreTrainedModel

from speechllm.codec import Codec
from speechllm.data.encoded import read_encoded
from speechllm.data.mixture import Mixture
from speechllm.generate import generate
from speechllm.metrics import bleu, wer
from speechllm.prompt import IGNORE_INDEX, Example, answer_text, collate, next_ids, render
from speechllm.tasks import TASKS
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train.pretrain_config import Pretraining

CHUNK = 16  # clips in one forward pass


@dataclass(frozen=True, eq=False)
class DevSet:
    """Examples of one task on one dev corpus; this rank's share of them."""

    name: str
    task: str
    examples: list[Example]


class Validation:
    """Scores the LM on every task of the mixture, on every dev corpus that has answers for it."""

    def __init__(
        self, config: Pretraining, codec: Codec, vocabulary: Vocabulary, text: TextTokenizer, rank: int, world: int
    ):
        self.vocabulary, self.text, self.world = vocabulary, text, world
        self.max_answer_tokens = config.max_answer_tokens
        self.sets = []
        for folder in config.dev_corpora:
            mixture = Mixture(read_encoded([folder], "dev", codec), vocabulary, text, config.tasks)
            for name in config.tasks:
                examples = dev_examples(mixture, name, config.decode_examples)
                if examples:
                    self.sets.append(DevSet(f"{Path(folder).name}", name, examples[rank::world]))

    def run(self, lm: PreTrainedModel) -> dict[str, float]:
        """``loss_…``, ``gap_…`` and ``wer_…`` (percent) or ``bleu_…`` of each task and corpus, same on all ranks."""
        lm.eval()
        scores: dict[str, float] = {}
        for dev in self.sets:
            label = f"{dev.task}_{dev.name}"
            own, foreign = self.losses(lm, dev)
            scores[f"loss_{label}"], scores[f"gap_{label}"] = own, foreign - own
            answers = self.gather([self.decode(lm, dev), [e.answer for e in dev.examples]])
            hypotheses = [text for part, _ in answers for text in part]
            references = [text for _, part in answers for text in part]
            if TASKS[dev.task].metric == "wer":
                scores[f"wer_{label}"] = 100 * wer(references, hypotheses)
            else:
                scores[f"bleu_{label}"] = bleu(references, hypotheses)[0]
        lm.train()
        return scores

    @torch.inference_mode()
    def losses(self, lm: PreTrainedModel, dev: DevSet) -> tuple[float, float]:
        """Loss per answer id with each clip's own audio, and with the next clip's audio in its place."""
        sums = torch.zeros(3, device=lm.device)  # where the ranks of a job on GPUs can add them up
        for start in range(0, len(dev.examples), CHUNK):
            chunk = dev.examples[start : start + CHUNK]
            swapped = [
                Example(other.codes, e.instruction, e.answer)
                for e, other in zip(chunk, chunk[1:] + chunk[:1], strict=True)
            ]
            own, count = self.summed_loss(lm, chunk)
            sums += torch.stack([own, self.summed_loss(lm, swapped)[0], count]).to(sums.device)
        if self.world > 1:
            distributed.all_reduce(sums)
        own_mean, foreign_mean = (sums[:2] / sums[2]).tolist()
        return own_mean, foreign_mean

    def summed_loss(self, lm: PreTrainedModel, examples: list[Example]) -> tuple[Tensor, Tensor]:
        """Summed loss over the answers' ids, and their number."""
        batch = collate([render(e, self.vocabulary, self.text) for e in examples], self.vocabulary.pad)
        logits = lm(input_ids=batch.input_ids.to(lm.device)).logits[:, :-1].float().cpu()
        target = next_ids(batch.labels)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        return loss, (target != IGNORE_INDEX).sum().float()

    def decode(self, lm: PreTrainedModel, dev: DevSet) -> list[str]:
        """The LM's own answers to the examples."""
        answers: list[str] = []
        for start in range(0, len(dev.examples), CHUNK):
            prompts = [
                render(Example(e.codes, e.instruction), self.vocabulary, self.text).ids
                for e in dev.examples[start : start + CHUNK]
            ]
            completions = generate(
                lm,
                prompts,
                end_id=self.vocabulary.end,
                pad_id=self.vocabulary.pad,
                max_new_tokens=self.max_answer_tokens,
            )
            answers += [answer_text(c.ids, self.vocabulary, self.text) for c in completions]
        return answers

    def gather(self, value: list) -> list[list]:
        """``value`` of every rank."""
        if self.world == 1:
            return [value]
        values: list = [None] * self.world
        distributed.all_gather_object(values, value)
        return values

    def panels(self) -> dict[str, list[str]]:
        """What the plot at the end of a run shows."""
        labels = [f"{dev.task}_{dev.name}" for dev in self.sets]
        return {
            "training loss": ["answer", "ctc", "aux"],
            "validation loss": [f"loss_{label}" for label in labels],
            "listening gap": [f"gap_{label}" for label in labels],
            "WER %": [f"wer_{label}" for label in labels],
            "BLEU": [f"bleu_{label}" for label in labels],
            "share of an expert": ["busiest_expert", "idlest_expert"],
        }


def dev_examples(mixture: Mixture, task: str, most: int) -> list[Example]:
    """Up to ``most`` examples of ``task``, spread over the corpus, asked with the task's first wording."""
    able = [i for i, row in enumerate(mixture.rows) if TASKS[task] in mixture.answers(row)]
    chosen = able[:: max(1, len(able) // most)][:most]
    return [
        Example(mixture.codes[i].long(), TASKS[task].wordings[0], mixture.answers(mixture.rows[i])[TASKS[task]], task)
        for i in chosen
    ]
