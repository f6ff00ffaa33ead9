"""Corpora for the training benchmark, made from nothing: speed depends on how long things are, not on what they say.

Lengths are about those of the corpora that the shipped model was trained on. Captions: durations log-normal with a
median of 3.5 s and a spread of 0.5, three words a second, so 12 words a sentence. Talks: a median of 6 s and a spread
of 0.4, four turns of two speakers. One frame of nine repeats the code before it, in codebook 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from datasets import Dataset

from speechllm.codec import Codec
from speechllm.data.encoded import INFO, write_facts
from speechllm.tasks import Facts, Segment
from train.encode import FEATURES

LONGEST = 10.0  # seconds
WORDS_PER_SECOND = 3.0
REPEATED = 0.11  # share of frames with the code of the frame before
# recordings of which an emotion or an intent is known: sets of them are small
EMOTIONAL, COMMANDS = 0.05, 0.12
N_Q = 2
SPEAKERS = ("ann", "bob")
# fmt: off
VOCABULARY = (
    "a", "man", "and", "two", "young", "women", "in", "blue", "shirts", "are", "standing", "on", "the", "street",
    "while", "another", "child", "is", "playing", "with", "red", "dogs", "near", "some", "water", "behind", "many",
    "people", "sitting", "under", "trees",
)
# fmt: on


def words(count: float, rng: Random) -> str:
    """A sentence of about ``count`` words, one at least."""
    return " ".join(rng.choice(VOCABULARY) for _ in range(max(1, round(count))))


def caption(rng: Random) -> Facts:
    """A sentence in one voice, and all that tasks ask about it."""
    duration = min(LONGEST, max(0.4, rng.lognormvariate(np.log(3.5), 0.5)))
    count = duration * WORDS_PER_SECOND
    text = words(count, rng)
    return Facts(
        duration,
        text,
        rng.choice(("en", "de", "fr")),
        rng.choice(("female", "male")),
        {language: words(count, rng) for language in ("de", "fr", "cs", "en")},
        (Segment(SPEAKERS[0], 0.1, duration - 0.1, text),),
        "order" if rng.random() < COMMANDS else None,
        {"object": words(1, rng), "number": words(1, rng)},
        {"accent": "British"} | ({"emotion": "anger"} if rng.random() < EMOTIONAL else {}),
    )


def talk(rng: Random) -> Facts:
    """Two speakers taking turns."""
    duration = min(LONGEST, max(2.0, rng.lognormvariate(np.log(6.0), 0.4)))
    ends = [duration * n / 4 for n in range(5)]
    segments = tuple(
        Segment(SPEAKERS[n % 2], start, end, words((end - start) * WORDS_PER_SECOND, rng))
        for n, (start, end) in enumerate(pairwise(ends))
    )
    return Facts(duration, None, "en", segments=segments)


CORPORA: dict[str, Callable[[Random], Facts]] = {"captions": caption, "talks": talk}


def make_corpus(folder: Path, name: str, codec: Codec, rows: int, seed: int = 0) -> Path:
    """Write ``rows`` recordings of a kind in CORPORA as an encoded corpus, as train.encode would; its folder."""
    rng, numbers = Random(f"{seed} {name}"), np.random.default_rng([seed, len(name)])
    made: list[dict[str, Any]] = []
    for row in range(rows):
        facts = CORPORA[name](rng)
        codes = numbers.integers(codec.card, size=(N_Q, max(1, round(facts.duration * codec.frame_rate))))
        for frame in range(1, codes.shape[1]):
            if rng.random() < REPEATED:
                codes[0, frame] = codes[0, frame - 1]
        known = {"id": f"{name}/{row}", "split": "train", "source": name, "speaker": SPEAKERS[0]}
        made.append(known | {"facts": write_facts(facts), "n_q": N_Q, "codes": codes.flatten().astype(np.int16)})
    out = folder / name
    out.mkdir(parents=True)
    Dataset.from_list(made, features=FEATURES).to_parquet(str(out / "00000.parquet"))
    info = {"codec": codec.fingerprint(N_Q), "n_q": N_Q, "shards": 1}
    (out / INFO).write_text(json.dumps(info) + "\n", encoding="utf-8")
    return out
