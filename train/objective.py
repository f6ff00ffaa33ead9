"""What the LM is trained to do, as one module so that DeepSpeed wraps all of it."""

from __future__ import annotations

from collections.abc import Sequence

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from speechllm.data.mixture import TrainingBatch
from speechllm.errors import InputError
from speechllm.model import experts, keep_apart
from speechllm.prompt import IGNORE_INDEX, next_ids
from speechllm.tasks import TRAITS
from speechllm.vocabulary import Vocabulary
from train.balance import Balance, TaskLosses
from train.expert_load import count_choices


class Objective(nn.Module):
    """Next-id loss on answers and on audio; balance and z-loss of the experts' router; CTC and traits on the audio.

    A part whose weight is 0 is left out, except the balance of the experts, which is measured always. Raises InputError
    for a z-loss of a model without experts.

    The CTC head reads the transcript's text pieces off the hidden states behind layer ``ctc_layer`` at the audio
    positions; those of the traits (gender, emotion, …) read them off the mean of these states. They make a decoder
    trained from scratch listen early, to words and to voices; they are not part of the checkpoint.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        vocabulary: Vocabulary,
        balance: Balance,
        ctc_layer: int,
        ctc_weight: float,
        aux_weight: float,
        audio_weight: float = 0.0,
        router_z_weight: float = 0.0,
        trait_weight: float = 0.0,
    ):
        super().__init__()
        router = experts(lm.config)
        self.router = router if router and router[0] > 1 else None  # one expert leaves nothing to choose
        if router_z_weight and self.router is None:
            raise InputError("router_z_weight: the model has no experts, and so no router: set it to 0")
        self.lm, self.vocabulary, self.balance = lm, vocabulary, balance
        self.ctc_layer, self.ctc_weight, self.aux_weight = ctc_layer, ctc_weight, aux_weight
        self.audio_weight, self.router_z_weight = audio_weight, router_z_weight
        self.trait_weight = trait_weight
        if ctc_weight:
            self.ctc_head = nn.Linear(lm.config.hidden_size, vocabulary.text_size + 1)  # 0 is the blank
        self.trait_heads = nn.ModuleList(
            nn.Linear(lm.config.hidden_size, len(trait.labels)) for trait in TRAITS if trait_weight
        )

    @property
    def config(self) -> PreTrainedConfig:
        """The LM's, which DeepSpeed asks for how many experts there are."""
        config: PreTrainedConfig = self.lm.config
        return config

    def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Losses: ``loss`` is the one to minimise; its parts ``answer`` (per answer id, whatever the balance of the
        tasks), ``audio``, ``aux``, ``router_z``, ``ctc``, ``traits``; ``tasks``, for
        :meth:`Balance.observe`; ``choices`` of the router, for :meth:`ExpertLoad.add`. No ``aux`` and ``choices`` for a
        dense model.
        """
        ids, mask = batch.lm.input_ids, batch.lm.attention_mask
        # no mask of the padding: it is on the right, where causal attention cannot see it; positions that begin anew
        # tell transformers to keep the sequences of a row apart, all else is told by keep_apart
        output = self.lm.base_model(
            input_ids=ids,
            position_ids=batch.lm.position_ids,
            use_cache=False,
            output_hidden_states=True,
            **({"output_router_logits": True} if self.router else {}),
            **keep_apart(self.lm, batch.lm.position_ids, any(draw.also for draw in batch.draws)),
        )
        hidden = output.last_hidden_state[:, :-1]
        answers = self.answers(hidden, batch)
        losses = {"answer": answers.mean}
        losses["loss"], weights = self.balance(answers, [p for p in self.lm.parameters() if p.requires_grad])
        losses["tasks"] = torch.stack([answers.sums.detach(), answers.counts, weights])
        if self.audio_weight:
            losses["audio"] = self.audio(hidden, batch)
            losses["loss"] = losses["loss"] + self.audio_weight * losses["audio"]
        if self.router:
            number, top_k = self.router
            losses["aux"] = load_balance(output.router_logits, number, top_k, mask)
            losses["loss"] = losses["loss"] + self.aux_weight * losses["aux"]
            if self.router_z_weight:
                losses["router_z"] = router_z(output.router_logits, mask)
                losses["loss"] = losses["loss"] + self.router_z_weight * losses["router_z"]
            with torch.no_grad():
                losses["choices"] = count_choices(
                    output.router_logits, top_k, batch, self.balance.tasks, self.vocabulary
                )
        if self.ctc_weight or self.trait_weight:  # clips, each [audio, hidden]
            heard = output.hidden_states[self.ctc_layer][batch.audio_mask].split(batch.audio_lengths.tolist())
            if self.ctc_weight:
                losses["ctc"] = self.ctc(heard, batch)
                losses["loss"] = losses["loss"] + self.ctc_weight * losses["ctc"]
            if self.trait_weight:
                losses["traits"] = self.traits(heard, batch)
                losses["loss"] = losses["loss"] + self.trait_weight * losses["traits"]
        return losses

    def answers(self, hidden: Tensor, batch: TrainingBatch) -> TaskLosses:
        """Next-id loss on the answers, by task, of ``hidden [B, seq - 1, hidden]``."""
        target = next_ids(batch.lm.labels)
        scored = target != IGNORE_INDEX
        number = torch.tensor([self.balance.tasks.index(task) for task in batch.tasks], device=target.device)
        task = number[next_ids(batch.example_ids)[scored]]  # [ids]
        return TaskLosses.of(log_probs(self.lm, hidden[scored]), target[scored], task, len(self.balance.tasks))

    def audio(self, hidden: Tensor, batch: TrainingBatch) -> Tensor:
        """Next-id loss per audio id of ``hidden [B, seq - 1, hidden]``; hidden codes are no targets, random ones are.

        The first is predicted from `audio_begin`, so that none is predicted from another example.
        """
        target = next_ids(batch.lm.input_ids)
        scored = self.vocabulary.is_audio(target) & (target != self.vocabulary.mask)
        total = F.nll_loss(log_probs(self.lm, hidden[scored]), target[scored], reduction="sum")
        return total / scored.sum().clamp_min(1)  # a batch may be text alone

    def ctc(self, heard: Sequence[Tensor], batch: TrainingBatch) -> Tensor:
        """CTC loss per text piece (Graves et al. 2006) of the states ``[audio, hidden]`` of each clip."""
        log_probs = self.ctc_head(pad_sequence(list(heard))).float().log_softmax(-1)  # [audio, examples, text_size + 1]
        losses = F.ctc_loss(
            log_probs,
            batch.transcripts + 1,
            batch.audio_lengths,
            batch.transcript_lengths,
            reduction="none",
            zero_infinity=True,
        )
        known = batch.transcript_lengths > 0  # an unknown transcript must not teach that nothing was said
        return losses[known].sum() / batch.transcript_lengths.sum().clamp_min(1)

    def traits(self, heard: Sequence[Tensor], batch: TrainingBatch) -> Tensor:
        """Cross entropy of the traits that are known, from the mean of the states ``[audio, hidden]`` of each clip.

        Summed over the traits; each is a mean over the clips that have it, so that rare ones count alike.
        """
        means = torch.stack([states.mean(0) for states in heard])  # [clips, hidden]
        total = means.new_zeros(())
        for head, target in zip(self.trait_heads, batch.traits.T, strict=True):
            loss = F.cross_entropy(head(means).float(), target, ignore_index=-1, reduction="sum")
            total = total + loss / (target >= 0).sum().clamp_min(1)
        return total


def log_probs(lm: PreTrainedModel, hidden: Tensor) -> Tensor:
    """``[positions, ids]`` of ``hidden [positions, hidden]``, which should be those that are scored alone."""
    logits: Tensor = lm.get_output_embeddings()(hidden)
    return logits.float().log_softmax(-1)


def load_balance(router_logits: Sequence[Tensor], number: int, top_k: int, mask: Tensor) -> Tensor:
    """Load-balancing loss (Fedus et al. 2021, Switch Transformers, eq. 4), the mean over the layers; ``top_k`` at best.

    Each layer's own: given all layers at once transformers adds their choices up, and each may then have favourites of
    its own. router_logits and mask as for :func:`router_z`.
    """
    of_layers: list[Tensor] = []
    for logits in router_logits:
        own = load_balancing_loss_func((logits,), number, top_k, mask)
        assert isinstance(own, Tensor)
        of_layers.append(own)
    return torch.stack(of_layers).mean()


def router_z(router_logits: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Router z-loss (Zoph et al. 2022, ST-MoE, eq. 5): mean of logsumexp(logits)² over layers and positions.

    router_logits: of each layer, [B · seq, experts]. mask: int64 [B, seq], 0 on padding, which does not count.
    """
    squares = torch.stack([logits.float().logsumexp(-1).square() for logits in router_logits])  # [layers, B · seq]
    return (squares * mask.flatten()).sum() / (mask.sum() * len(router_logits))
