"""Second stage of codec training: the acoustic codebooks and the decoder, on top of a finished codebook 0."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from speechllm.codec import SpeechCodec
from speechllm.data.corpus import Item
from speechllm.data.sampling import prefetch
from train.config import Settings
from train.loop import Loop, cosine

RESOLUTIONS = (256, 512, 1024, 2048)  # samples in a window of the spectral loss


class AcousticSettings(Settings):
    steps: int = Field(gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    warmup: int = Field(100, ge=1)
    batch_clips: int = Field(12, ge=1)
    crop_seconds: float = Field(1.28, gt=0)
    evaluate_every: int = Field(250, gt=0)


def spectral_loss(made: Tensor, real: Tensor) -> Tensor:
    """Multi-resolution STFT loss (Yamamoto et al. 2020) of waveforms ``[B, samples]``."""
    total = made.new_zeros(())
    for size in RESOLUTIONS:
        window = torch.hann_window(size)
        a, b = (
            torch.stft(x, size, size // 4, window=window, return_complex=True).abs().clamp_min(1e-3)
            for x in (made, real)
        )
        total = total + (a.log() - b.log()).abs().mean() + (a - b).norm() / b.norm()
    return total / len(RESOLUTIONS)


def crops(items: list[Item], samples: int, count: int, rate: int, rng: Random) -> Tensor:
    """``count`` random stretches of speech, ``[count, samples]``; short clips are padded with silence."""
    rows = []
    for item in rng.choices(items, k=count):
        wav = item.wav(rate)[0]
        start = rng.randrange(max(1, len(wav) - samples + 1))
        row = wav[start : start + samples]
        rows.append(F.pad(row, (0, samples - len(row))) * rng.uniform(0.5, 1.2))
    return torch.stack(rows)


def forward(codec: SpeechCodec, wav: Tensor) -> tuple[Tensor, Tensor]:
    """Waveforms ``[B, samples]`` to their reconstruction ``[B, samples]`` and the commitment loss."""
    with torch.no_grad():
        mel = codec.mel(wav)
        semantic = codec.semantic.quantizer(codec.semantic.hidden(mel), freeze_codebook=True)[0]
    acoustic, _, commitment = codec.acoustic.quantizer(codec.acoustic.encode(mel))
    return codec.acoustic.synthesize(semantic, acoustic), commitment.sum()


def train_acoustic(
    codec: SpeechCodec,
    train: list[Item],
    dev: list[Item],
    settings: AcousticSettings,
    out: Path,
    seed: int,
    resume: bool,
) -> None:
    """Train ``codec.acoustic`` in place; ``codec.semantic`` is left as it is."""
    codec.eval()
    module, rate = codec.acoustic, codec.sample_rate
    optimizer = torch.optim.AdamW(module.parameters(), settings.learning_rate, betas=(0.8, 0.99))
    samples = round(settings.crop_seconds * codec.frame_rate) * codec.hop_length
    held_out = crops(dev, samples, 24, rate, Random(f"{seed} dev"))

    def make(step: int) -> Tensor:
        return crops(train, samples, settings.batch_clips, rate, Random(f"{seed} crop {step}"))

    with Loop("acoustic", out, module, optimizer, settings.steps, resume) as loop:
        for step, wav in zip(loop.steps(), prefetch(make, loop.range()), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * cosine(step, settings.warmup, settings.steps)
            module.train()
            made, commitment = forward(codec, wav)
            loss = spectral_loss(made, wav)
            optimizer.zero_grad(set_to_none=True)
            (loss + commitment).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 5.0)
            optimizer.step()
            loop.scalars(spectral=loss.item(), commitment=commitment.item())
            if (step + 1) % settings.evaluate_every == 0 or step + 1 == settings.steps:
                module.eval()
                with torch.inference_mode():
                    loop.evaluation(dev_spectral=spectral_loss(forward(codec, held_out)[0], held_out).item())
    loop.plot({"spectral loss": ["spectral", "dev_spectral"], "commitment": ["commitment"]})
