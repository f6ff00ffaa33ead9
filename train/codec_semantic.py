"""First stage of codec training: the phoneme recogniser with the quantiser of codebook 0 inside."""

from __future__ import annotations

from pathlib import Path
from random import Random

import jiwer
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from speechllm.codec import SpeechCodec
from speechllm.data.corpus import Item
from speechllm.data.sampling import LengthSampler, prefetch, short_first
from train.codec_data import CtcBatch, CtcData
from train.config import Settings
from train.loop import Loop, cosine, training_device


class SemanticSettings(Settings):
    steps: int = Field(gt=0)
    quantize_at: float = Field(
        0.5, ge=0, le=1, description="share of the steps after which the quantiser is switched on"
    )
    learning_rate: float = Field(1.5e-3, gt=0)
    warmup: int = Field(300, ge=1)
    batch_seconds: float = Field(96, gt=0)
    max_clips: int = Field(64, ge=1)
    short_first: int = Field(800, ge=0, description="steps over which clips of growing length come in")
    weight_decay: float = Field(0.02, ge=0)
    perturbed: float = Field(0.3, ge=0, le=1, description="share of the clips put into a room, a crowd or an MP3")
    evaluate_every: int = Field(500, gt=0)


def ctc(log_probs: Tensor, batch: CtcBatch) -> Tensor:
    """CTC loss per phoneme (Graves et al. 2006) of ``log_probs [B, T, symbols]``."""
    loss = F.ctc_loss(
        log_probs.transpose(0, 1),
        batch.targets,
        batch.frames,
        batch.target_lengths,
        reduction="sum",
        zero_infinity=True,
    )
    return loss / batch.target_lengths.sum().clamp_min(1)


def forward(codec: SpeechCodec, batch: CtcBatch, quantize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities ``[B, T, symbols]``, commitment loss, codes ``[B, T]`` (all -1 without the quantiser)."""
    semantic, mask = codec.semantic, batch.mask.unsqueeze(-1)
    hidden = semantic.hidden(batch.mel, mask)
    if not quantize:
        log_probs = semantic.recognize(semantic.unquantized(hidden), mask)
        return log_probs, hidden.new_zeros(()), torch.full(hidden.shape[:2], -1, device=hidden.device)
    # only real frames go through the quantiser, so that padding moves no code
    flat, indices, commitment = semantic.quantizer(hidden[batch.mask].unsqueeze(0))
    quantized = torch.zeros_like(hidden).masked_scatter(mask, flat)
    codes = torch.full(hidden.shape[:2], -1, device=hidden.device).masked_scatter(batch.mask, indices)
    return semantic.recognize(quantized, mask), commitment.sum(), codes


def greedy(log_probs: Tensor, frames: Tensor) -> list[list[int]]:
    """Best path of each clip with repeats merged and blanks removed."""
    paths = log_probs.argmax(-1)
    return [
        [p for p in path[:n].unique_consecutive().tolist() if p] for path, n in zip(paths, frames.tolist(), strict=True)
    ]


@torch.inference_mode()
def evaluate(codec: SpeechCodec, data: CtcData, groups: dict[str, list[int]], quantize: bool) -> dict[str, float]:
    """Phoneme error rate of each group of clips, the use of the codes, and codes a second after merging repeats."""
    codec.eval()
    device = codec.semantic.output.weight.device
    scores, used, merged, seconds = {}, torch.zeros(codec.card), 0, 0.0
    for name, indices in groups.items():
        references, hypotheses = [], []
        for start in range(0, len(indices), 32):
            batch = data.batch(indices[start : start + 32], None).to(device)
            log_probs, _, codes = forward(codec, batch, quantize)
            hypotheses += [" ".join(map(str, h)) for h in greedy(log_probs, batch.frames)]
            references += [" ".join(map(str, data.targets[i].tolist())) for i in indices[start : start + 32]]
            if quantize:
                rows = [row[:n] for row, n in zip(codes, batch.frames.tolist(), strict=True)]
                used += torch.bincount(torch.cat(rows), minlength=codec.card).cpu()
                merged += sum(len(row.unique_consecutive()) for row in rows)
                seconds += float(batch.frames.sum()) / codec.frame_rate
        scores[f"per_{name}"] = 100 * jiwer.wer(references, hypotheses)
    if quantize:
        share = used / used.sum()
        scores["perplexity"] = float((-(share * share.clamp_min(1e-12).log()).sum()).exp())
        scores["merged_codes_per_second"] = merged / seconds
    codec.train()
    return scores


def by_source(items: list[Item], most: int = 150) -> dict[str, list[int]]:
    """Indices of at most ``most`` clips of each source."""
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        group = groups.setdefault(item.utterance.source, [])
        if len(group) < most:
            group.append(index)
    return groups


def train_semantic(
    codec: SpeechCodec, train: CtcData, dev: CtcData, settings: SemanticSettings, out: Path, seed: int, resume: bool
) -> None:
    """Train ``codec.semantic`` in place, on :func:`training_device`; afterwards it is on the CPU.

    The state is kept in ``out`` and, with ``resume``, taken up from there.
    """
    device = training_device()
    codec.semantic.to(device)
    codec.train()  # a codec that was loaded is in evaluation mode, in which its codebook does not learn
    optimizer = torch.optim.AdamW(
        codec.semantic.parameters(),
        settings.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    durations = [item.utterance.duration for item in train.items]
    sampler = LengthSampler(durations, settings.batch_seconds, settings.max_clips, seed)
    switch = int(settings.quantize_at * settings.steps)
    groups = by_source(dev.items)

    def make(step: int) -> CtcBatch:
        indices = sampler(step, short_first(step, settings.short_first))
        return train.batch(indices, Random(f"{seed} augment {step}"))

    with Loop("semantic", out, codec.semantic, optimizer, settings.steps, resume) as loop:
        quantize = bool(codec.semantic.quantizer._codebook.initted.all())  # it stays on where more steps are added
        for step, batch in zip(loop.steps(), prefetch(make, loop.range()), strict=True):
            quantize = quantize or step >= switch
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * cosine(step, settings.warmup, settings.steps)
            batch = batch.to(device)
            log_probs, commitment, _ = forward(codec, batch, quantize)
            loss = ctc(log_probs, batch)
            optimizer.zero_grad(set_to_none=True)
            (loss + commitment).backward()
            torch.nn.utils.clip_grad_norm_(codec.semantic.parameters(), 5.0)
            optimizer.step()
            loop.scalars(ctc=loss.item(), commitment=commitment.item(), lr=optimizer.param_groups[0]["lr"])
            if (step + 1) % settings.evaluate_every == 0 or step + 1 == settings.steps:
                loop.evaluation(**evaluate(codec, dev, groups, quantize))
    loop.plot({"CTC loss": ["ctc"], "phoneme error %": [f"per_{g}" for g in groups], "perplexity": ["perplexity"]})
    codec.semantic.cpu()
