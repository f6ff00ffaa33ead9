"""Training a codec on waveforms: random crops; spectral, mel and adversarial losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from speechllm.codec.layers import LogMel
from speechllm.data.corpus import Item
from speechllm.data.sampling import prefetch
from speechllm.errors import InputError
from train.codec_losses import RESOLUTIONS, Balancer, Discriminator, mel_loss, spectral_loss
from train.config import Settings
from train.loop import Loop, cosine, training_device

WEIGHTS = {"spectral": 1.0, "mel": 1.0, "features": 1.0, "adversarial": 0.5}


@dataclass(frozen=True)
class Crops:
    """Stretches of clips, and which clips they are of."""

    wav: Tensor  # float32 [B, samples]; silence after the end of a clip
    lengths: Tensor  # int64 [B], samples of each that are of the clip
    items: tuple[Item, ...]  # of length B: the clip of each, with its labels

    def to(self, device: torch.device) -> Crops:
        """The same crops on ``device``."""
        return Crops(self.wav.to(device), self.lengths.to(device), self.items)


@dataclass(frozen=True)
class Auxiliary:
    """What is learnt beside the reconstruction, from the same crops.

    heads: by name; trained with the codec; kept in the state of the run, and not in the codec.
    weights: of the losses that are made beside the reconstruction, by name.
    measure: the heads on held-out crops, by the names to log.
    panels: of the plot, and the scalars in each.
    """

    heads: nn.ModuleDict
    weights: Mapping[str, float]
    measure: Callable[[], dict[str, float]]
    panels: Mapping[str, list[str]]


@dataclass(frozen=True)
class Reconstruction:
    """What is trained to give waveforms back.

    name: of its folder in the run's.
    module: what is trained, in place.
    reconstruct: made of ``module``; crops of whole hops to waveforms ``[B, samples]``, the commitment loss and the
        losses of ``auxiliary``, by name.
    mel: of the mel loss. base: of what ``module`` goes on top; a run is not taken up on another.
    """

    name: str
    module: nn.Module
    reconstruct: Callable[[Crops], tuple[Tensor, Tensor, dict[str, Tensor]]]
    mel: LogMel
    sample_rate: int
    hop_length: int
    auxiliary: Auxiliary | None = None
    base: str = ""


class WaveformSettings(Settings):
    steps: int = Field(gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    warmup: int = Field(100, ge=1)
    batch_clips: int = Field(16, ge=1)
    crop_seconds: float = Field(1.28, gt=0)
    adversarial_from: float = Field(
        0.7, ge=0, le=1, description="share of the steps after which a discriminator takes part"
    )
    evaluate_every: int = Field(250, gt=0)

    def samples(self, sample_rate: int, hop_length: int) -> int:
        """Samples of a crop, which are whole hops. Raises InputError for fewer than the losses need."""
        samples, fewest = round(self.crop_seconds * sample_rate / hop_length) * hop_length, max(RESOLUTIONS) // 2
        if samples <= fewest:
            raise InputError(
                f"crop_seconds = {self.crop_seconds:g}: {samples} samples; set more than {fewest / sample_rate:g}"
            )
        return samples


def crops(items: list[Item], samples: int, count: int, rate: int, rng: Random) -> Crops:
    """``count`` random stretches of ``samples`` of speech; short clips are padded with silence."""
    rows, lengths, chosen = [], [], rng.choices(items, k=count)
    for item in chosen:
        wav = item.wav(rate)[0]
        start = rng.randrange(max(1, len(wav) - samples + 1))
        row = wav[start : start + samples]
        rows.append(F.pad(row, (0, samples - len(row))) * rng.uniform(0.5, 1.2))
        lengths.append(len(row))
    return Crops(torch.stack(rows), torch.tensor(lengths), tuple(chosen))


def train_waveform(
    task: Reconstruction,
    train: list[Item],
    dev: list[Item],
    settings: WaveformSettings,
    out: Path,
    seed: int,
    resume: bool,
) -> None:
    """Train ``task.module`` on random crops, on :func:`training_device`; afterwards it is on the CPU.

    The state is kept in ``out/name`` and, with ``resume``, taken up there.
    """
    device = training_device()
    rate, module, mel = task.sample_rate, task.module, task.mel.to(device)
    samples, auxiliary = settings.samples(rate, task.hop_length), task.auxiliary
    trained = nn.ModuleDict({"codec": module, "discriminator": Discriminator(), "balancer": Balancer(WEIGHTS)})
    if auxiliary:
        trained["heads"] = auxiliary.heads
    trained.to(device)
    discriminator, balancer = trained["discriminator"], trained["balancer"]
    assert isinstance(balancer, Balancer)
    optimizer = torch.optim.AdamW(trained.parameters(), settings.learning_rate, betas=(0.8, 0.99))
    held_out = crops(dev, samples, 24, rate, Random(f"{seed} dev")).to(device)
    switch = int(settings.adversarial_from * settings.steps)

    def make(step: int) -> Crops:
        return crops(train, samples, settings.batch_clips, rate, Random(f"{seed} crop {step}"))

    with Loop(task.name, out, trained, optimizer, settings.steps, resume, task.base) as loop:
        for step, batch in zip(loop.steps(), prefetch(make, loop.range()), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * cosine(step, settings.warmup, settings.steps)
            module.train()
            optimizer.zero_grad(set_to_none=True)
            batch = batch.to(device)
            wav = batch.wav
            made, commitment, told = task.reconstruct(batch)
            losses = {"spectral": spectral_loss(made, wav), "mel": mel_loss(made, wav, mel)}
            if step >= switch:
                judged = discriminator(made, wav)
                losses |= {"features": judged.features, "adversarial": judged.adversarial}
                judged.discriminator.backward(inputs=list(discriminator.parameters()), retain_graph=True)
                loop.scalars(discriminator=judged.discriminator.item())
            # What heads tell has no gradient on the waveform to be balanced by. It joins the commitment loss, which the
            # balancer passes on as it is: a weight counts against the balanced gradient, whose norm is about 1.
            beside = commitment
            if auxiliary:
                beside = commitment + sum(auxiliary.weights[name] * loss for name, loss in told.items())
            balancer.backward(losses, made, beside)
            torch.nn.utils.clip_grad_norm_(module.parameters(), 5.0)
            optimizer.step()
            loop.scalars(**{name: loss.item() for name, loss in (losses | told).items()}, commitment=commitment.item())
            if (step + 1) % settings.evaluate_every == 0 or step + 1 == settings.steps:
                module.eval()
                with torch.inference_mode():
                    made, wav = task.reconstruct(held_out)[0], held_out.wav
                    loop.evaluation(
                        dev_spectral=spectral_loss(made, wav).item(),
                        dev_mel=mel_loss(made, wav, mel).item(),
                        **(auxiliary.measure() if auxiliary else {}),
                    )
    loop.plot(
        {
            "spectral loss": ["spectral", "dev_spectral"],
            "mel distance": ["mel", "dev_mel"],
            "adversarial": ["features", "adversarial", "discriminator"],
            **(auxiliary.panels if auxiliary else {}),
        }
    )
    trained.cpu()
    mel.cpu()
