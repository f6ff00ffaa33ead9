"""What is heard in ``train.evaluate_icl``: recordings of test splits as they are, joined in pairs, or in noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from speechllm.audio import to_samples
from speechllm.data.corpus import MANIFEST, Item, read_corpus
from speechllm.data.episodes import EXCERPT
from speechllm.data.manifest import Split
from speechllm.data.perturb import add_at
from speechllm.errors import InputError
from speechllm.tasks import FEW_SHOT, FewShot
from speechllm.tasks.base import collapsed
from speechllm.tasks.labels import NO, YES

HEARD = EXCERPT[1]  # seconds that are heard of a longer clip, where all of it is not needed
PART, GAP = 1.2, 0.2  # seconds: of each of two recordings that are joined, at most, and of the silence between them
SNR_DB = 5.0
PAIRS = 60  # of the same speaker, and of two
# sets with recordings of single words, fragments of sentences among them: what is in their train splits is no new word
SINGLE_WORDS = ("words", "digits", "digits_fsdd", "commands_sc_en", "captions_en", "captions_de", "captions_fr")


@dataclass(frozen=True, eq=False)
class Clip:
    """Something to hear. items: one recording, or two that are joined. whole: else its first ``HEARD`` seconds."""

    items: tuple[Item, ...]
    noisy: bool = False
    whole: bool = True

    @property
    def sources(self) -> frozenset[str]:
        """Names of its recordings."""
        return frozenset(map(_name, self.items))

    @property
    def key(self) -> str:
        """The same for clips that sound alike, but for how much of them is heard."""
        return " + ".join(map(_name, self.items)) + self.noisy * " in noise"

    @property
    def text(self) -> str:
        """Of its first recording."""
        return collapsed(self.items[0].utterance.text or "")

    @property
    def speaker(self) -> str | None:
        """Of its first recording."""
        return self.items[0].utterance.speaker

    @property
    def seconds(self) -> float:
        """That are heard."""
        lengths = [item.utterance.duration for item in self.items]
        if len(lengths) > 1:
            return sum(min(length, PART) for length in lengths) + GAP
        return lengths[0] if self.whole else min(lengths[0], HEARD)

    def wav(self, sample_rate: int) -> Tensor:
        """Audio ``[1, samples]`` of the whole clip; the same at each call."""
        wavs = [item.wav(sample_rate) for item in self.items]
        if len(wavs) > 1:
            gap = torch.zeros(1, to_samples(GAP, sample_rate))
            first, second = (wav[:, : to_samples(PART, sample_rate)] for wav in wavs)
            return torch.cat([first, gap, second], 1)
        if self.noisy:
            generator = torch.Generator().manual_seed(Random(self.key).getrandbits(62))
            return add_at(wavs[0], torch.randn(wavs[0].shape, generator=generator), SNR_DB)
        return wavs[0]


Classes = dict[str, list[Clip]]  # what clips have in common -> the clips


@dataclass(frozen=True)
class Sets:
    """Where sets are: ``corpus/NAME``, or else ``source/NAME``."""

    corpus: Path
    source: Path

    def manifest(self, name: str) -> Path:
        """Raises InputError where there is no such set."""
        for folder in (self.corpus, self.source):
            if (folder / name / MANIFEST).is_file():
                return folder / name / MANIFEST
        raise InputError(
            f"{name}: neither in {self.corpus} nor in {self.source}: make it (train.corpus), or name rows that do "
            "without it with --only"
        )

    def items(self, name: str, split: Split = "test") -> list[Item]:
        """The recordings of one split. Raises InputError where there are none."""
        return read_corpus([self.manifest(name)], split)


MakeClasses = Callable[[Sets, int], Classes]  # from sets and a seed


def grouped(task: FewShot, items: Iterable[Item]) -> Classes:
    """Clips by what they have in common, in the sense of a kind of episodes; two or more each."""
    classes: Classes = {}
    for item in items:
        for key in filter(None, task.keys(item.utterance.facts(), item.utterance.speaker)):
            classes.setdefault(key, []).append(Clip((item,), whole=task.whole))
    return {key: clips for key, clips in classes.items() if len(clips) > 1}


def sharing(attribute: str, *names: str) -> MakeClasses:
    """Recordings of these sets that share what episodes ``few_shot_ATTRIBUTE`` are about."""
    task = FEW_SHOT[f"few_shot_{attribute}"]
    return lambda sets, seed: grouped(task, chain.from_iterable(map(sets.items, names)))


def new_words(name: str) -> MakeClasses:
    """Recordings of single words, without the words of which the sets ``SINGLE_WORDS`` have recordings to train on."""
    task = FEW_SHOT["few_shot_word"]

    def classes(sets: Sets, seed: int) -> Classes:
        trained = chain.from_iterable(sets.items(single, "train") for single in SINGLE_WORDS)
        known = set(chain.from_iterable(task.keys(item.utterance.facts(), item.utterance.speaker) for item in trained))
        return {word: clips for word, clips in grouped(task, sets.items(name)).items() if word not in known}

    return classes


def pairs(name: str) -> MakeClasses:
    """Two recordings one after the other, "yes" where the same person is heard in both.

    Whoever is heard first is as likely to be anybody in both classes: who it is tells nothing.
    """

    def classes(sets: Sets, seed: int) -> Classes:
        speakers = grouped(FEW_SHOT["few_shot_speaker"], sets.items(name))
        if len(speakers) < 2:
            raise InputError(f"{name}: fewer than two speakers with two recordings in its test split")
        rng = Random(f"{seed} {name}")
        found: Classes = {YES: [], NO: []}
        for answer in (YES, NO) * PAIRS:
            speaker = rng.choice(sorted(speakers))
            first, second = rng.sample(speakers[speaker], 2)
            if answer == NO:
                second = rng.choice(speakers[rng.choice(sorted(speakers.keys() - {speaker}))])
            found[answer].append(Clip(first.items + second.items))
        return found

    return classes


def in_noise(name: str) -> MakeClasses:
    """Every recording as it is, and in white noise."""

    def classes(sets: Sets, seed: int) -> Classes:
        items = sets.items(name)
        return {
            kind: [Clip((item,), noisy=kind == "noisy", whole=False) for item in items] for kind in ("clean", "noisy")
        }

    return classes


def apart(clips: Sequence[Clip], clip: Clip) -> tuple[Clip, ...]:
    """Those of ``clips`` that have no recording in common with ``clip``, each once."""
    return tuple({other.key: other for other in clips if not other.sources & clip.sources}.values())


def _name(item: Item) -> str:
    return f"{item.root.name}/{item.utterance.id}"
