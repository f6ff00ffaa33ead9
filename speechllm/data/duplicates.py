"""Which recordings are the same one: the same bytes, or the same sound at another level, in another format, shifted."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, product

import numpy as np
import torch

# The fingerprint: levels of 16 bands between 200 and 3400 Hz every 32 ms, down to 40 dB below the loudest.
EDGES = np.geomspace(200.0, 3400.0, 17)
HOP_SECONDS, FLOOR_DB = 0.032, 40.0
MAX_SHIFT = 3  # hops by which formats may delay or lengthen the same recording
BLOCK = 512  # recordings compared with as many others at a time


@dataclass(frozen=True, eq=False)
class Sound:
    """A recording to compare: its words as `normalized` writes them (None: not known), `digest` of its bytes.

    `levels` is its fingerprint, uint8 [frames, bands].
    """

    words: str | None
    digest: bytes
    levels: np.ndarray


def fingerprint(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """Band levels uint8 [frames, bands] of wav [samples], 255 for the loudest; hardly changed by gain or format."""
    hop = max(1, round(HOP_SECONDS * sample_rate))
    samples = torch.from_numpy(wav)
    if len(samples) < 2 * hop:
        samples = torch.nn.functional.pad(samples, (0, 2 * hop - len(samples)))
    windows = samples.unfold(0, 2 * hop, hop) * torch.hann_window(2 * hop)  # [frames, 2 hop]
    power = torch.fft.rfft(windows).abs().square().numpy()  # [frames, bins]
    bins = np.searchsorted(np.fft.rfftfreq(2 * hop, 1 / sample_rate), EDGES)
    bands = np.stack([power[:, a:b].sum(axis=1) for a, b in pairwise(bins)], axis=1)
    level = 10 * np.log10(np.maximum(bands / max(float(bands.max()), 1e-20), 10 ** (-FLOOR_DB / 10)))
    return np.round(255 * (1 + level / FLOOR_DB)).astype(np.uint8)


def normalized(text: str) -> str:
    """Letters and digits only, without case: texts that are read aloud alike."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() or unicodedata.combining(c) else " " for c in plain).split())


def distances(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """1 - correlation of fingerprints [n, frames, bands] and [m, frames, bands] at the best shift: float32 [n, m].

    0 for the same recording, 1 for what has nothing in common.
    """
    best = np.zeros((len(ones), len(others)), np.float32)
    for shift in range(-MAX_SHIFT, MAX_SHIFT + 1):
        a, b = ones[:, max(0, shift) :], others[:, max(0, -shift) :]
        length = min(a.shape[1], b.shape[1])
        if length >= max(1, max(ones.shape[1], others.shape[1]) - 2 * MAX_SHIFT):
            best = np.maximum(best, _unit(a[:, :length]) @ _unit(b[:, :length]).T)
    return np.maximum(0.0, 1.0 - best)


def _unit(levels: np.ndarray) -> np.ndarray:
    """Fingerprints [n, frames, bands] as vectors [n, frames * bands] of mean 0 and length 1; 0 where all is equal."""
    flat = levels.reshape(len(levels), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def _compared(groups: Iterable[Sequence[int]], sounds: Sequence[Sound]) -> Iterator[tuple[np.ndarray, ...]]:
    """Indices [n] and [m], and how far they are from each other [n, m]: all pairs of a group whose lengths fit."""
    for group in groups:
        by_length: dict[int, list[int]] = defaultdict(list)
        for index in group:
            by_length[len(sounds[index].levels)].append(index)
        for length, other in product(by_length, range(MAX_SHIFT + 1)):
            ones, others = by_length[length], by_length.get(length + other, [])
            for start, begin in product(range(0, len(ones), BLOCK), range(0, len(others), BLOCK)):
                if other or begin >= start:  # of two blocks of one length once
                    a, b = ones[start : start + BLOCK], others[begin : begin + BLOCK]
                    stacked = (np.stack([sounds[i].levels for i in part]) for part in (a, b))
                    yield np.array(a), np.array(b), distances(*stacked)


def nearest(sounds: Sequence[Sound], contradicting: bool) -> dict[int, tuple[float, int]]:
    """Index -> (distance, index of the nearest other one), for those that have one to be compared with.

    contradicting: of those with other words, wherever they are; else of those before it whose words, as far as they are
    known, are the same. The same bytes are at distance 0; sounds are compared only where there are words.
    """
    numbers = {words: number for number, words in enumerate(sorted({s.words for s in sounds if s.words is not None}))}
    words = np.array([-1 if sound.words is None else numbers[sound.words] for sound in sounds])
    by_bytes: dict[bytes, list[int]] = defaultdict(list)
    by_words: dict[str, list[int]] = defaultdict(list)
    for index, sound in enumerate(sounds):
        by_bytes[sound.digest].append(index)
        if sound.words:
            by_words["" if contradicting else sound.words].append(index)
    same = (np.array(group) for group in by_bytes.values() if len(group) > 1)
    blocks = [(group, group, np.zeros((len(group), len(group)), np.float32)) for group in same]
    found: dict[int, tuple[float, int]] = {}
    for one, two, apart in chain(blocks, _compared(by_words.values(), sounds)):
        for a, b, far in ((one, two, apart), (two, one, apart.T)):
            known = (words[a] >= 0)[:, None] & (words[b] >= 0)
            differ = known & (words[a][:, None] != words[b])
            allowed = differ if contradicting else ~differ & (b < a[:, None])
            far = np.where(allowed, far, np.inf)
            for index, column, value in zip(a, far.argmin(axis=1), far.min(axis=1), strict=True):
                if value < found.get(int(index), (np.inf, 0))[0]:
                    found[int(index)] = float(value), int(b[column])
    return found
