"""Who is held out of training: whole speakers or, where they are not known, sentences."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence

from speechllm.data.manifest import Utterance
from speechllm.errors import InputError
from speechllm.metrics import normalize_text

Group = tuple[str, str]  # "speaker" or "sentence", and its name


def hold_out(utterances: Sequence[Utterance], share: float) -> tuple[list[Utterance], str]:
    """The same utterances, about a share of them in dev, and what came of it in words.

    Speakers are held out whole, with all whom they meet in a recording; sentences, whatever their case and punctuation,
    where no speaker is known. Of all choices the one is taken that comes
    nearest to the share, the smaller of two; who it is depends on names and numbers alone, not on the order. Raises
    InputError when there is one speaker or sentence only.
    """
    groups_of = _groups(utterances)
    sizes = Counter(groups_of)
    held: set[Group] = set()
    said = []
    for kind in ("speaker", "sentence"):
        groups = {group: size for group, size in sizes.items() if group[0] == kind}
        if len(groups) > 1:
            held |= (chosen := _nearest(groups, share))
            said.append(f"{len(chosen)} of {len(groups)} {kind}s")
    if not held:
        one_speaker = any(map(_speakers, utterances))
        way_out = (
            "one speaker only: add --columns speaker= to hold out sentences" if one_speaker else "one sentence only"
        )
        raise InputError(f"--held-out: there is {way_out}")
    count = sum(sizes[group] for group in held)
    words = f"held out: {' and '.join(said)}, {count} of {len(utterances)} recordings ({count / len(utterances):.1%})"
    grouped = zip(utterances, groups_of, strict=True)
    return [u.model_copy(update={"split": "dev"}) if group in held else u for u, group in grouped], words


def _nearest(groups: dict[Group, int], share: float) -> set[Group]:
    """Groups, neither none nor all, whose sizes add up to nearly the share of all: every sum there is, is looked at."""
    total = sum(groups.values())
    target = share * total
    order = sorted(groups, key=_shuffled)
    best = max(1, math.ceil(target - 0.5))
    mask = (1 << max(2 * best, min(groups.values())) + 1) - 1  # what is further off than none at all is not looked for
    sums = [1]  # bit n: some of the groups so far add up to n
    for group in order:
        sums.append((sums[-1] | sums[-1] << groups[group]) & mask)
        if best < total and sums[-1] >> best & 1:
            break
    reached = (n for n in range(1, min(total, mask.bit_length())) if sums[-1] >> n & 1)
    left = min(reached, key=lambda n: (abs(n - target), n))
    chosen = set()
    for group, before in zip(order[: len(sums) - 1][::-1], sums[-2::-1], strict=True):
        if not before >> left & 1:  # not to be had without this group
            chosen.add(group)
            left -= groups[group]
    return chosen


def _speakers(utterance: Utterance) -> set[str]:
    return {name for name in (utterance.speaker, *(s.speaker for s in utterance.segments)) if name is not None}


def _groups(utterances: Sequence[Utterance]) -> list[Group]:
    """Of each utterance. People who are heard together are one group, called by the first of their names."""
    first: dict[str, str] = {}  # name -> another of the group, itself where it is the first

    def leader(name: str) -> str:
        while first.setdefault(name, name) != name:
            name = first[name]
        return name

    for utterance in utterances:
        leaders = {leader(name) for name in _speakers(utterance)}
        first |= dict.fromkeys(leaders, min(leaders, default=""))
    found: list[Group] = []
    for utterance in utterances:
        names = _speakers(utterance)
        sentence = normalize_text(utterance.text or "") or utterance.id
        found.append(("speaker", leader(min(names))) if names else ("sentence", sentence))
    return found


def _shuffled(group: Group) -> str:
    return hashlib.sha256(" ".join(group).encode()).hexdigest()
