"""Ids in, ids out: prefill, then greedy decoding of a batch with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class Completion:
    """What the model said: ``ids`` without the end id; ``logprobs`` (natural) of every id chosen, the end id too."""

    ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


@torch.inference_mode()
def generate(
    lm: PreTrainedModel,
    prompts: Sequence[Tensor],
    *,
    end_id: int,
    pad_id: int,
    max_new_tokens: int,
    allowed: Tensor | None = None,
    everywhere: Callable[[bool], bool] | None = None,
) -> list[Completion]:
    """Continue each prompt ``int64 [seq]`` greedily until ``end_id`` or ``max_new_tokens``.

    Prompts of one call are padded on the left and decoded together. ``allowed``, bool ``[vocabulary]``, names the ids
    that may be chosen; all when None. ``everywhere`` is given when the layers of ``lm`` lie on several processes, which
    must call it as often as one another: it tells whether what is true here is true on all of them.

    Raises:
        ValueError: a prompt is empty, or prompt and answer together may exceed the positions the model has.
    """
    if not prompts:
        return []
    device, longest = lm.device, max(len(p) for p in prompts)
    if min(len(p) for p in prompts) == 0:
        raise ValueError("a prompt holds no ids")
    limit = lm.config.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} ids and {max_new_tokens} more do not fit the model's {limit} positions"
        )
    forbidden = None if allowed is None else ~allowed.to(device)
    ids = torch.full((len(prompts), longest), pad_id, device=device)  # [B, seq], padded on the left
    mask = torch.zeros(len(prompts), longest + max_new_tokens, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt.to(device)
        mask[row, longest - len(prompt) :] = 1
    positions = (mask[:, :longest].cumsum(1) - 1).clamp_min(0)
    padded = bool((mask[:, 0] == 0).any())

    cache = DynamicCache(config=lm.config)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    chosen, scores = [], []
    for step in range(max_new_tokens):
        output = lm(
            input_ids=ids,
            attention_mask=mask[:, : longest + step] if padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        log_probs = output.logits[:, -1].float().log_softmax(-1)  # [B, vocabulary]
        if forbidden is not None:
            log_probs = log_probs.masked_fill(forbidden, -torch.inf)
        score, best = log_probs.max(-1)
        chosen.append(best)
        scores.append(score)
        finished |= best == end_id
        done = bool(finished.all())
        if everywhere(done) if everywhere else done:
            break
        ids, positions = best.unsqueeze(1), positions[:, -1:] + 1
    return [
        _completion(row, row_scores, end_id)
        for row, row_scores in zip(torch.stack(chosen, 1).tolist(), torch.stack(scores, 1).tolist(), strict=True)
    ]


def _completion(ids: list[int], scores: list[float], end_id: int) -> Completion:
    if end_id in ids:
        end = ids.index(end_id)
        return Completion(ids[:end], scores[: end + 1], "stop")
    return Completion(ids, scores, "length")
