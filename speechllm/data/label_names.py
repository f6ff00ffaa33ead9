"""Names for labels that mean nothing: made up, or words taken from elsewhere. Some are never used in training."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

# fmt: off
ONSETS = (
    "b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z",
    "sh", "ch", "st", "tr", "fl", "pr", "sk",
)
VOWELS = ("a", "e", "i", "o", "u", "ai", "oo")
CODAS = ("", "b", "d", "g", "k", "l", "m", "n", "p", "r", "s", "t", "nd", "st")
INVENTED = 0.5  # share of the episodes whose labels are invented; those of the others are words
LETTERS = 0.4  # share of the invented ones that are a letter or a number, which is learnt first

HELD_OUT_NAMES = (
    "dax", "wug", "blicket", "toma", "zup", "fep", "jix", "quoll", "yarp", "plonk", "grix", "vej",
    "garnet", "violet", "walnut", "harbor", "copper", "saturn", "pepper", "velvet", "cobalt", "jasmine", "anchor",
    "willow",
)
# fmt: on


def names(count: int, words: Sequence[str], rng: Random) -> list[str]:
    """Different names for the labels of one episode, none of them held out. words: to take names from, if enough."""
    chosen: list[str] = []
    invented = rng.random() < INVENTED or len({*words} - {*HELD_OUT_NAMES}) < count
    letters = rng.random() < LETTERS
    while len(chosen) < count:
        if not invented:
            name = rng.choice(words)
        elif letters:
            name = rng.choice("ABCDEFGHIKLMNOPRSTUVWXZ123456789")
        else:
            name = "".join(
                rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(rng.choice((1, 1, 2)))
            )
        if name not in chosen and name not in HELD_OUT_NAMES:
            chosen.append(name)
    return chosen


def listed(labels: Sequence[str]) -> str:
    """``a``, ``a or b``, ``a, b or c``."""
    return " or ".join(filter(None, (", ".join(labels[:-1]), labels[-1])))
