"""Which clips a codec is judged on: held-out ones, a bounded number of each set, halves without common sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from speechllm.data.corpus import Item, read_corpus
from speechllm.data.manifest import Split
from speechllm.errors import InputError

LEARNT_FROM: tuple[Split, ...] = ("train", "dev")


def pick(
    manifests: Sequence[Path], split: Split, most: int, seed: int, wanted: Callable[[Item], object], what: str
) -> list[Item]:
    """At most ``most`` clips of each manifest, drawn at random from those ``wanted``.

    Raises:
        InputError: a manifest has none; ``what`` says what was looked for.
    """
    chosen: list[Item] = []
    for path in manifests:
        items = [item for item in read_corpus([path], split) if wanted(item)]
        if not items:
            raise InputError(f"{path}: no {split} clip with {what}")
        chosen += Random(seed).sample(items, most) if len(items) > most else items
    return chosen


def unseen_speakers(manifests: Sequence[Path], most: int, seed: int) -> list[Item]:
    """Test clips of speakers who have no clip in another split of the same manifest, at most ``most`` of each."""
    chosen: list[Item] = []
    for path in manifests:
        seen = {
            item.utterance.speaker for split in LEARNT_FROM for item in read_corpus([path], split, may_be_empty=True)
        }
        chosen += [item for item in read_corpus([path], "test") if item.utterance.speaker not in seen]
    return _of_each_speaker(chosen, most, seed)


def _of_each_speaker(items: Sequence[Item], most: int, seed: int) -> list[Item]:
    clips: dict[str, list[Item]] = {}
    for item in items:
        if item.utterance.speaker:
            clips.setdefault(item.utterance.speaker, []).append(item)
    return [item for own in clips.values() for item in (Random(seed).sample(own, most) if len(own) > most else own)]


def halves(items: Sequence[Item], least: int) -> tuple[list[Item], list[Item]]:
    """The clips in two parts, every sentence of a source in one of them, whoever says it.

    Where a source has no texts, or only one, the clips alternate. Speakers with fewer than ``least`` clips in either
    part are left out.

    Raises:
        InputError: fewer than two speakers remain.
    """
    parts: tuple[list[Item], list[Item]] = ([], [])
    for source in sorted({item.utterance.source for item in items}):
        own = [item for item in items if item.utterance.source == source]
        sentences = sorted({item.utterance.text or "" for item in own})
        if len(sentences) > 1:
            for item in own:
                parts[sentences.index(item.utterance.text or "") % 2].append(item)
        else:
            for speaker in sorted({item.utterance.speaker or "" for item in own}):
                said = [item for item in own if item.utterance.speaker == speaker]
                parts[0].extend(said[::2])
                parts[1].extend(said[1::2])
    counts = [[item.utterance.speaker for item in part] for part in parts]
    kept = {s for s in set(counts[0]) if min(count.count(s) for count in counts) >= least}
    if len(kept) < 2:
        raise InputError(f"{len(kept)} speakers have {least} clips in each half: give more manifests, or lower 'least'")
    first, second = ([item for item in part if item.utterance.speaker in kept] for part in parts)
    return first, second
