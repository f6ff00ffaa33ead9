"""Batches for codec training: cached log-mel features and phoneme targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from speechllm.codec.layers import MEL_HOP, SILENT, Downsample, LogMel
from speechllm.data.augment import augment, random_rate
from speechllm.data.corpus import Item
from speechllm.data.perturb import babble, room, round_trip
from speechllm.data.phonemes import VOICES, phonemes
from speechllm.errors import InputError


@dataclass(frozen=True)
class CtcBatch:
    mel: Tensor  # float32 [B, 4 T, n_mels]
    frames: Tensor  # int64 [B], frames of each clip
    targets: Tensor  # int64 [B, phonemes], padded with 0
    target_lengths: Tensor  # int64 [B]

    @property
    def mask(self) -> Tensor:  # bool [B, T]
        places = torch.arange(self.mel.shape[1] // Downsample.FACTOR, device=self.frames.device)
        return places[None] < self.frames[:, None]

    def to(self, device: torch.device) -> CtcBatch:
        """The same batch on ``device``."""
        return CtcBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


def transcribable(items: list[Item]) -> list[Item]:
    """The items that phonemes can be had for: a verbatim text in a language espeak-ng speaks."""
    return [i for i in items if i.utterance.verbatim and i.utterance.text and i.utterance.language in VOICES]


def repeated(items: list[Item], times: Mapping[str, int], setting: str) -> list[Item]:
    """The items, those of some sources several times. Raises InputError, naming the setting, for a source of none."""
    if unknown := set(times) - {item.utterance.source for item in items}:
        raise InputError(f"{setting}: no clips for this stage come from {', '.join(sorted(unknown))}")
    return [item for item in items for _ in range(times.get(item.utterance.source, 1))]


def phoneme_inventory(items: list[Item], least: int = 20) -> tuple[str, ...]:
    """Phonemes heard at least ``least`` times in the corpus, in alphabetical order.

    Raises:
        InputError: there is none.
    """
    counts: Counter[str] = Counter()
    for item in items:
        counts.update(phonemes(item.utterance.text or "", item.utterance.language or ""))
    inventory = tuple(sorted(p for p, n in counts.items() if n >= least))
    if not inventory:
        raise InputError(f"no phoneme is heard {least} times in the manifests: give more transcribed speech")
    return inventory


class CtcData:
    """Features and phoneme ids of a corpus; features are computed when first asked for and kept as float16.

    A share of the clips is ``perturbed`` once, in ways that cannot be had on features: rooms, babble, MP3 and Opus.
    """

    def __init__(
        self, items: list[Item], inventory: tuple[str, ...], mel: LogMel, sample_rate: int, perturbed: float = 0.0
    ):
        self.items, self.mel, self.sample_rate, self.perturbed = items, mel, sample_rate, perturbed
        index = {p: i + 1 for i, p in enumerate(inventory)}
        self.targets = [
            torch.tensor(
                [index[p] for p in phonemes(i.utterance.text or "", i.utterance.language or "") if p in index],
                dtype=torch.int64,
            )
            for i in items
        ]
        self._features: dict[int, Tensor] = {}

    def feature(self, index: int) -> Tensor:
        """Log-mel ``[columns, n_mels]`` of item ``index``."""
        if index not in self._features:
            wav = self.wav(index)
            wav = F.pad(wav, (0, -wav.shape[-1] % (MEL_HOP * Downsample.FACTOR)))
            with torch.inference_mode():
                self._features[index] = self.mel(wav)[0].half()
        return self._features[index].float()

    def wav(self, index: int) -> Tensor:
        """The clip ``[1, samples]``, perturbed or not."""
        wav, rng = self.items[index].wav(self.sample_rate), Random(f"{self.items[index].utterance.id} {index}")
        if rng.random() >= self.perturbed:
            return wav
        if rng.random() < 1 / 3:
            return babble(wav, lambda: rng.choice(self.items).wav(self.sample_rate), rng)
        return rng.choice((room, round_trip))(wav, self.sample_rate, rng)

    def batch(self, indices: list[int], rng: Random | None) -> CtcBatch:
        """Clips ``indices`` padded to one length; augmented when ``rng`` is given."""
        mels = [self.feature(i) for i in indices]
        if rng is not None:
            rate = random_rate(rng)
            mels = [augment(mel, rng, rate) for mel in mels]
        mels = [F.pad(mel, (0, 0, 0, -len(mel) % Downsample.FACTOR), value=float(mel.min())) for mel in mels]
        frames = torch.tensor([len(mel) // Downsample.FACTOR for mel in mels])
        targets = [self.targets[i] for i in indices]
        lengths = torch.tensor([len(t) for t in targets])
        padded = pad_sequence(
            mels, batch_first=True, padding_value=SILENT
        )  # loud columns would change the clip's level
        return CtcBatch(padded, frames, pad_sequence(targets, batch_first=True), lengths)
