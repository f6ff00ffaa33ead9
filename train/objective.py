"""What the LM is trained to do, as one module so that DeepSpeed wraps all of it."""

from __future__ import annotations

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from speechllm.data.mixture import TrainingBatch
from speechllm.prompt import IGNORE_INDEX, next_ids


class Objective(nn.Module):
    """Next-id loss on answers, load balance of the experts, and CTC on the audio positions.

    The CTC head reads the transcript's text pieces off the hidden states behind layer ``ctc_layer`` at the audio
    positions. It makes a decoder trained from scratch listen early; it is not part of the checkpoint.
    """

    def __init__(self, lm: PreTrainedModel, text_size: int, ctc_layer: int, ctc_weight: float, aux_weight: float):
        super().__init__()
        self.lm, self.ctc_layer, self.ctc_weight, self.aux_weight = lm, ctc_layer, ctc_weight, aux_weight
        self.ctc_head = nn.Linear(lm.config.hidden_size, text_size + 1)  # 0 is the blank

    def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Losses: ``loss`` is the one to minimise; ``answer``, ``ctc``, ``aux`` its parts; ``load [experts]``."""
        ids, labels, mask = batch.lm.input_ids, batch.lm.labels, batch.lm.attention_mask
        router = hasattr(self.lm.config, "num_local_experts")
        # no attention mask: padding is on the right, where causal attention cannot see it; positions that begin anew
        # tell transformers to keep the sequences of a row apart
        output = self.lm.base_model(
            input_ids=ids,
            position_ids=batch.lm.position_ids,
            use_cache=False,
            output_hidden_states=True,
            **({"output_router_logits": True} if router else {}),
        )
        target = next_ids(labels)
        scored = target != IGNORE_INDEX
        # only answers are scored, so only they pay for the softmax over the vocabulary
        logits = self.lm.get_output_embeddings()(output.last_hidden_state[:, :-1][scored])
        answer = F.cross_entropy(logits.float(), target[scored])
        losses = {"answer": answer, "loss": answer}
        if router:
            experts, top_k = self.lm.config.num_local_experts, self.lm.config.num_experts_per_tok
            aux = load_balancing_loss_func(output.router_logits, experts, top_k, mask)
            assert isinstance(aux, Tensor)
            losses["aux"] = aux
            losses["loss"] = losses["loss"] + self.aux_weight * losses["aux"]
            with torch.no_grad():
                chosen = torch.stack([r.topk(top_k).indices for r in output.router_logits])
                losses["load"] = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
        if self.ctc_weight:
            losses["ctc"] = self.ctc(output.hidden_states[self.ctc_layer], batch)
            losses["loss"] = losses["loss"] + self.ctc_weight * losses["ctc"]
        return losses

    def ctc(self, hidden: Tensor, batch: TrainingBatch) -> Tensor:
        """CTC loss per text piece (Graves et al. 2006) of ``hidden [B, seq, hidden]``."""
        kept = hidden[batch.audio_mask].split(batch.audio_lengths.tolist())  # examples, each [audio, hidden]
        log_probs = self.ctc_head(pad_sequence(kept)).float().log_softmax(-1)  # [audio, examples, text_size + 1]
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
