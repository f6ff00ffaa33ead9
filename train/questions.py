"""What is asked about the clips of test sets: the instruction, the right answer, and the sound, noisy if wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from speechllm.data.corpus import Item, read_corpus
from speechllm.data.manifest import Split
from speechllm.data.perturb import add_at
from speechllm.tasks import Facts, Parts, Task

Advance = Callable[[int], None]  # told how many questions have been answered since it was last called
NOISE_RATE = 16000  # Hz, of recordings of noise
PEAK = 0.99
AUDIBLE = 1e-10  # mean square


@dataclass(frozen=True)
class Noise:
    """What is added to clips, ``snr_db`` below the whole of each: a piece of a recording, white noise without any."""

    snr_db: float
    recordings: tuple[Item, ...] = ()

    @property
    def told(self) -> str:
        """In words."""
        kind = "recorded" if self.recordings else "white"
        return f"{kind} noise at {self.snr_db:g} dB of the whole clip"

    def added(self, wav: Tensor, rate: int, seed: str) -> Tensor:
        """``wav [1, samples]`` with noise drawn from the seed, scaled down rather than clipped."""
        rng = Random(f"noise {seed}")
        if self.recordings:
            other = rng.choice(self.recordings).wav(rate)
            places = (torch.arange(wav.shape[1]) + rng.randrange(other.shape[1])) % other.shape[1]
            other = other[:, places]
        else:
            generator = torch.Generator().manual_seed(rng.getrandbits(62))
            other = torch.randn(wav.shape, generator=generator)
        noisy = add_at(wav, other, self.snr_db)
        return noisy * min(1.0, PEAK / float(noisy.abs().max().clamp(min=1e-9)))


@dataclass(frozen=True)
class Question:
    """What one clip is asked, and the right answer.

    noise: that is heard over it. task: name of the task, told beside words that it is not known by; None where they are
    to do alone.
    """

    item: Item
    instruction: str
    answer: Parts
    noise: Noise | None = None
    task: str | None = None

    def wav(self, rate: int) -> Tensor:
        """What is heard, float32 ``[1, samples]``, the same at each call. Raises InputError."""
        wav = self.item.wav(rate)
        return wav if self.noise is None else self.noise.added(wav, rate, self.item.utterance.id)


def pose(items: Sequence[Item], task: Task, wording: str | None = None, noise: Noise | None = None) -> list[Question]:
    """One wording of the task, the first unless given, asked about each clip of a test set whose data hold the answer.

    A held-out wording is known by nobody, and answered in plain text; where the answer is to hold marks, which plain
    text cannot, the task is named beside it.
    Where the answer may be no, what is asked about is so of another of these clips; it is the same for all wordings.
    """
    pairs = [(item, item.utterance.facts()) for item in items]
    able = [(item, facts) for item, facts in pairs if task.pose(facts, Random(0))]
    named = task.name if task.marks and wording in task.held_out else None

    def question(item: Item, facts: Facts) -> Question:
        rng = Random(item.utterance.id)
        asked = task.pose(facts, rng, (wording or task.wordings[0],), lambda: rng.choice(able)[1])
        assert asked is not None
        return Question(item, *asked, noise, named)

    return [question(item, facts) for item, facts in able]


def spread(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """At most ``limit`` of each set, from all over it: what comes first may be of one voice, or easier."""
    kept: dict[Path, list[Question]] = {}
    for question in questions:
        kept.setdefault(question.item.root, []).append(question)
    counts = {folder: min(limit or len(own), len(own)) for folder, own in kept.items()}
    return [own[i * len(own) // counts[folder]] for folder, own in kept.items() for i in range(counts[folder])]


def noise_of(folder: Path, split: Split = "test") -> tuple[Item, ...]:
    """The audible recordings of a set of noises; none where there is no such set."""
    if not folder.exists():
        return ()
    found = read_corpus([folder], split, may_be_empty=True)
    return tuple(item for item in found if float(item.wav(NOISE_RATE).square().mean()) > AUDIBLE)
