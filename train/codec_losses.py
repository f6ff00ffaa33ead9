"""Losses of codec training: spectra, mel, a discriminator that listens, and the balance between them.

Discriminator and balancer follow EnCodec (Défossez et al. 2022, section 3.4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechllm._torchaudio import import_torchaudio
from speechllm.codec.layers import LogMel

RESOLUTIONS = (256, 512, 1024, 2048)  # samples in a window of the spectral loss


def spectral_loss(made: Tensor, real: Tensor) -> Tensor:
    """Multi-resolution STFT loss (Yamamoto et al. 2020) of waveforms ``[B, samples]``."""
    total = made.new_zeros(())
    for size in RESOLUTIONS:
        window = torch.hann_window(size, device=made.device)
        a, b = (
            torch.stft(x, size, size // 4, window=window, return_complex=True).abs().clamp_min(1e-3)
            for x in (made, real)
        )
        total = total + (a.log() - b.log()).abs().mean() + (a - b).norm() / b.norm()
    return total / len(RESOLUTIONS)


def mel_loss(made: Tensor, real: Tensor, mel: LogMel) -> Tensor:
    """Mean distance of the scaled log-mel spectrograms of waveforms ``[B, samples]``, samples a multiple of its hop."""
    return F.l1_loss(mel(made), mel(real))


def hinge_discriminator(made: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """What a discriminator is to lower: logits (one tensor a scale) above 1 for the real, below -1 for the made."""
    losses = [F.relu(1 - r).mean() + F.relu(1 + m).mean() for m, r in zip(made, real, strict=True)]
    return torch.stack(losses).mean()


def hinge_generator(made: Sequence[Tensor]) -> Tensor:
    """What the codec is to lower: it has the made taken for real where their logits are above 1."""
    return torch.stack([F.relu(1 - logits).mean() for logits in made]).mean()


def feature_distance(made: Sequence[Sequence[Tensor]], real: Sequence[Sequence[Tensor]]) -> Tensor:
    """Mean over scales and layers of the distance of the features, relative to the mean size of the real ones."""
    pairs = [pair for scales in zip(made, real, strict=True) for pair in zip(*scales, strict=True)]
    return torch.stack([F.l1_loss(m, r) / r.abs().mean().clamp_min(1e-8) for m, r in pairs]).mean()


@dataclass(frozen=True)
class Judgement:
    """Losses, each a scalar: the first two are the codec's, the last is the discriminator's own."""

    adversarial: Tensor
    features: Tensor
    discriminator: Tensor


class Discriminator(nn.Module):
    """EnCodec's discriminator on complex spectrograms, one network for each length of window in ``windows``.

    Its cost grows with the square of ``filters`` and with the number of windows; EnCodec has 32 and five.
    """

    def __init__(self, filters: int = 8, windows: Sequence[int] = (1024, 512)):
        super().__init__()
        import_torchaudio()  # encodec imports torchaudio
        from encodec.msstftd import MultiScaleSTFTDiscriminator

        self.networks = MultiScaleSTFTDiscriminator(
            filters, n_ffts=list(windows), hop_lengths=[n // 4 for n in windows], win_lengths=list(windows)
        )
        self.networks.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast on CPUs

    def forward(self, made: Tensor, real: Tensor) -> Judgement:
        """All losses of waveforms ``[B, samples]`` from one pass; samples must fill the longest window.

        The discriminator's own loss depends on ``made`` too: give its gradient to this module alone, by
        ``judgement.discriminator.backward(inputs=list(discriminator.parameters()))``. The codec's losses must not
        reach this module's parameters either: :class:`Balancer` sees to that.
        """
        made_logits, made_features = self.networks(made.unsqueeze(1))
        real_logits, real_features = self.networks(real.unsqueeze(1))
        return Judgement(
            adversarial=hinge_generator(made_logits),
            features=feature_distance(made_features, [[layer.detach() for layer in scale] for scale in real_features]),
            discriminator=hinge_discriminator(made_logits, real_logits),
        )


class Balancer(nn.Module):
    """Gives each loss the share of the gradient that its weight says, however large or small its values are.

    With g the gradient of a loss on the codec's output, what is propagated is the sum over the losses of
    ``weight / sum of weights * g / average norm of g``; the average is over the steps so far, older ones counting
    less by ``decay`` a step. The averages are buffers: saved with the module that holds this one, a run that is
    resumed goes on the same.
    """

    def __init__(self, weights: Mapping[str, float], decay: float = 0.999):
        super().__init__()
        self.weights, self.decay = dict(weights), decay
        self.norms: Tensor  # per loss: decayed sum of the norms seen
        self.counts: Tensor  # per loss: as many, decayed alike, so that early averages are not drawn to zero
        self.register_buffer("norms", torch.zeros(len(self.weights), dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(len(self.weights), dtype=torch.float64))

    def backward(self, losses: Mapping[str, Tensor], output: Tensor, beside: Tensor | None = None) -> None:
        """Add the balanced gradient of ``losses`` to all parameters ``output`` was made from, in one pass.

        Args:
            losses: scalars that depend on ``output``; names from the weights, not all of them need be there.
            output: what the codec made, with its graph. Parameters between it and the losses get no gradient.
            beside: a scalar that is propagated as it is, e.g. the commitment loss.
        """
        total = sum(self.weights[name] for name in losses)
        balanced = torch.zeros_like(output)
        index = {name: i for i, name in enumerate(self.weights)}
        for name, loss in losses.items():
            (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)  # losses may share a graph
            i = index[name]
            self.norms[i] = self.decay * self.norms[i] + gradient.norm()
            self.counts[i] = self.decay * self.counts[i] + 1
            average = float(self.norms[i] / self.counts[i])
            if average > 0:  # zero: there has been nothing to balance yet
                balanced += self.weights[name] / total / average * gradient
        if beside is None:
            output.backward(balanced)
        else:
            torch.autograd.backward([output, beside], [balanced, torch.ones_like(beside)])
