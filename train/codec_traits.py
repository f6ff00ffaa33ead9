"""What the first acoustic codebook is to tell on its own: how something is said (prosody), and by whom (traits).

Reconstruction leaves speaker and emotion to whichever of the codebooks happens to carry them. Small heads on the
quantised output of the first one, trained beside the codec, draw them there; disentangling codecs do so with the fine
codebooks' prosody and timbre (FACodec, Ju et al. 2024).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechllm._torchaudio import import_torchaudio
from speechllm.codec.layers import FLOOR, scale_log
from speechllm.data.corpus import Item
from speechllm.data.manifest import Utterance
from speechllm.errors import InputError
from speechllm.tasks.labels import emotion_named
from train.codec_waveform import Crops

LOWEST, HIGHEST = 60.0, 400.0  # Hz, of F0
MIDDLE = 150.0  # Hz, from which the head counts octaves
DECIMATION = 4  # of the rate: F0 needs no more
TOP = 0.45  # of the band that is left (900 Hz at 4 kHz): where voices are most periodic, and lags are fine enough
VOICED = 0.6  # correlation of neighbouring periods from which on a frame is voiced
NEARLY = 0.9  # of the best correlation: two periods correlate as well as one, so the shortest lag this good is taken
QUIET = 1e-6  # mean square (-60 dBFS), under which nothing correlates

# how a trait is read from an utterance; None when it is not known
TRAITS: dict[str, Callable[[Utterance], str | None]] = {
    "speaker": lambda utterance: utterance.speaker,
    "gender": lambda utterance: utterance.gender,
    "emotion": lambda utterance: emotion_named(utterance.labels.get("emotion")),
}
UNKNOWN = -100  # what cross entropy leaves out


def pitch(wav: Tensor, sample_rate: int, hop_length: int) -> tuple[Tensor, Tensor]:
    """F0 of each frame by the normalised cross-correlation of the waveform with itself (RAPT, Talkin 1995).

    Args:
        wav: ``[B, samples]``, samples a multiple of ``hop_length``, and that of ``DECIMATION``.

    Returns:
        F0 in Hz, float32 ``[B, T]``, within a lag of ``LOWEST`` to ``HIGHEST`` and of no meaning where there is no
        voice; and whether there is one, bool ``[B, T]``.
    """
    rate, hop = sample_rate / DECIMATION, hop_length // DECIMATION
    shortest, longest = int(rate / HIGHEST), math.ceil(rate / LOWEST)
    low = import_torchaudio().functional.resample(wav, DECIMATION, 1, rolloff=TOP)
    reach = longest + 1  # peaks need a neighbour on either side
    pieces = F.pad(low, (reach // 2, reach - reach // 2)).unfold(-1, hop + reach, hop)  # [B, T, hop + reach]
    pieces = pieces - pieces.mean(-1, keepdim=True)
    size = hop + reach
    spectra = torch.fft.rfft(pieces, size), torch.fft.rfft(pieces[..., :hop], size)
    products = torch.fft.irfft(spectra[0] * spectra[1].conj(), size)[..., : reach + 1]
    energies = pieces.square().unfold(-1, hop, 1).sum(-1) + hop * QUIET
    alike = products / (energies[..., :1] * energies).sqrt()  # [B, T, lags from 0]
    before, here, after = (alike[..., shortest + i : longest + 1 + i] for i in (-1, 0, 1))
    peaks = torch.where((here >= before) & (here > after), here, -1.0)
    best = peaks.amax(-1, keepdim=True)
    index = (peaks >= NEARLY * best).int().argmax(-1, keepdim=True)  # the first of them
    a, b, c = (part.gather(-1, index).squeeze(-1) for part in (before, here, after))
    curve = (a - 2 * b + c).clamp_max(-1e-6)
    lag = shortest + index.squeeze(-1) + (0.5 * (a - c) / curve).clamp(-0.5, 0.5)
    return rate / lag, best.squeeze(-1) >= VOICED


def energy(wav: Tensor, hop_length: int) -> Tensor:
    """Log of the mean square of each frame ``[B, T]`` of waveforms ``[B, samples]``, scaled as the log-mel is."""
    return scale_log(wav.unflatten(-1, (-1, hop_length)).square().mean(-1).clamp_min(FLOOR).log())


def classes_of(items: Sequence[Item], least: int = 20) -> dict[str, tuple[str, ...]]:
    """Values of each trait heard in ``least`` items or more; traits of which there are not two are left out.

    Raises:
        InputError: no trait is left.
    """
    found = {}
    for trait, read in TRAITS.items():
        counts = Counter(read(item.utterance) for item in items)
        values = tuple(sorted(value for value, count in counts.items() if value is not None and count >= least))
        if len(values) > 1:
            found[trait] = values
    if not found:
        raise InputError(
            f"trait_weight: no {', '.join(TRAITS)} has two values that {least} clips each are labelled with"
        )
    return found


class ProsodyHead(nn.Module):
    """Reads F0, voicing and energy off each quantised frame.

    Linear, as all heads here: what such weak ones do not find lying open in the code, the codec has to put there.
    """

    def __init__(self, dim: int, sample_rate: int, hop_length: int):
        super().__init__()
        self.sample_rate, self.hop_length = sample_rate, hop_length
        self.output = nn.Linear(dim, 3)  # octaves above MIDDLE, logit of voicing, energy

    def forward(self, quantized: Tensor, crops: Crops) -> Tensor:
        """Loss: errors of F0 (octaves, in voiced frames), voicing (cross entropy) and energy, added up.

        Args:
            quantized: of the first acoustic codebook, ``[B, T, dim]``, made of ``crops``.
        """
        octaves, voicing, loudness = self.output(quantized).unbind(-1)
        wrong, voiced = self._off(octaves, crops)
        return (
            wrong.sum() / voiced.sum().clamp_min(1)
            + F.binary_cross_entropy_with_logits(voicing, voiced.float())
            + F.l1_loss(loudness, energy(crops.wav, self.hop_length))
        )

    def measure(self, quantized: Tensor, crops: Crops) -> dict[str, float]:
        """Mean error of F0 in semitones over the voiced frames; nothing when there are none."""
        wrong, voiced = self._off(self.output(quantized)[..., 0], crops)
        return {"f0_semitones": 12 * (wrong.sum() / voiced.sum()).item()} if voiced.any() else {}

    def _off(self, octaves: Tensor, crops: Crops) -> tuple[Tensor, Tensor]:  # [B, T] -> octaves off, voiced; [B, T]
        with torch.no_grad():
            hertz, voiced = pitch(crops.wav, self.sample_rate, self.hop_length)
        return (octaves - (hertz / MIDDLE).log2()).abs() * voiced, voiced


class TraitHeads(nn.Module):
    """Reads traits off the mean of a crop's quantised frames.

    classes: values of each trait, as :func:`classes_of` gives them.
    """

    def __init__(self, dim: int, classes: Mapping[str, Sequence[str]], hop_length: int):
        super().__init__()
        self.hop_length = hop_length
        self.classes = {trait: {value: i for i, value in enumerate(values)} for trait, values in classes.items()}
        self.outputs = nn.ModuleDict({trait: nn.Linear(dim, len(values)) for trait, values in classes.items()})

    def targets(self, trait: str, items: Sequence[Item]) -> Tensor:
        """Index of each item's value, int64 ``[B]``; UNKNOWN where it is not known or too rare."""
        values = (TRAITS[trait](item.utterance) for item in items)
        indices = [self.classes[trait].get(value or "", UNKNOWN) for value in values]
        return torch.tensor(indices, device=next(self.parameters()).device)

    def forward(self, quantized: Tensor, crops: Crops) -> Tensor:
        """Loss: mean over the traits of the cross entropy of what is known, 1 being what blind guessing costs.

        Args:
            quantized: of the first acoustic codebook, ``[B, T, dim]``, made of ``crops``.
        """
        pooled, total = self._pool(quantized, crops), quantized.new_zeros(())
        for trait, output in self.outputs.items():
            targets = self.targets(trait, crops.items)
            if (targets != UNKNOWN).any():
                total = total + F.cross_entropy(output(pooled), targets) / math.log(len(self.classes[trait]))
        return total / len(self.outputs)

    def measure(self, quantized: Tensor, crops: Crops) -> dict[str, float]:
        """Share of the crops whose trait is told right, of each trait that any of them is labelled with.

        Not of speakers: those of held-out crops are others than the ones in training.
        """
        pooled, measures = self._pool(quantized, crops), {}
        for trait, output in self.outputs.items():
            targets = self.targets(trait, crops.items)
            known = targets != UNKNOWN
            if trait != "speaker" and known.any():
                measures[trait] = (output(pooled).argmax(-1) == targets)[known].float().mean().item()
        return measures

    def _pool(self, quantized: Tensor, crops: Crops) -> Tensor:  # [B, T, dim] -> [B, dim]
        starts = torch.arange(quantized.shape[1], device=quantized.device) * self.hop_length
        frames = starts < crops.lengths[:, None]  # not the padding
        return (quantized * frames.unsqueeze(-1)).sum(1) / frames.sum(1, keepdim=True)
