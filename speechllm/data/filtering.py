"""Rules that tell utterances unfit for training: what each measures, and the bounds outside which it drops.

=================  ==================================================  ========  ================================
rule               measured                                            kept      why
=================  ==================================================  ========  ================================
unreadable         the audio can be decoded                            yes       missing, cut short, not audio
silence            share of 20 ms frames above -50 dBFS                >= 0.03   hardly any speech-level signal
clipping           share of samples at full scale                      <= 0.01   an overloaded recording
rate               spoken characters per second of the whole clip      0.5 - 30  text and audio do not belong together
language           probability of the declared language                >= 0.01   the text is in another language
duplicate          how far the nearest utterance with the same text    >= 0.01   the same recording twice
                   and speaker sounds, from 0 (the same)
=================  ==================================================  ========  ================================

Read and conversational speech lies between 8 and 22 characters per second; the bounds leave room for single words in
long clips and for fast talkers. A rule does not judge what it cannot know: no text (rate, language), a text that says
nobody speaks (silence, rate), fewer than five words or a language that `py3langid` does not know (language).

What is not detected: silence under steady noise above -50 dBFS, clipping that was turned down afterwards, a transcript
that is wrong but about as long as the right one, a language confused with a close relative of it, words of another
language within a sentence, duplicates whose text or speaker is written differently, and copies shifted by more than
0.1 s or cut differently (a shift of part of a fingerprint's hop may hide one too).
"""

from __future__ import annotations

import hashlib
import io
import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import numpy as np
import soundfile
import torch
from py3langid.langid import LanguageIdentifier

from speechllm.audio import read_audio
from speechllm.data.corpus import Item
from speechllm.data.manifest import Utterance, audio_bytes
from speechllm.errors import InputError

UNREADABLE, DUPLICATE = "unreadable", "duplicate"
SPEECH_LEVEL = 10 ** (-50 / 20)  # rms of a frame
LEVEL_SECONDS = 0.02
FULL_SCALE = 0.99  # of what a sample can be; lossy formats do not keep the last per cent
DIGIT, WIDE = 4, 3  # characters that a spoken digit and a Chinese, Japanese or Korean sign count as
LEAST_WORDS = 5
# The fingerprint: levels of 16 bands between 200 and 3400 Hz every 32 ms, down to 40 dB below the loudest.
EDGES = np.geomspace(200.0, 3400.0, 17)
HOP_SECONDS, FLOOR_DB = 0.032, 40.0
MAX_SHIFT = 3  # hops by which formats may delay or lengthen the same recording


@dataclass(frozen=True, eq=False)
class Clip:
    """An utterance and its audio as recorded, float32 [samples] at the file's own rate in Hz."""

    utterance: Utterance
    wav: np.ndarray
    sample_rate: int

    @property
    def seconds(self) -> float:
        return len(self.wav) / self.sample_rate


def speech_level(clip: Clip) -> float | None:
    """Share of frames that are loud enough for speech; None when the text says that nobody speaks."""
    if clip.utterance.text is not None and not clip.utterance.text.strip():
        return None
    wav = clip.wav - clip.wav.mean()  # an offset is no signal
    size = min(len(wav), max(1, round(LEVEL_SECONDS * clip.sample_rate)))
    frames = wav[: len(wav) // size * size].reshape(-1, size)
    return float((np.sqrt(np.square(frames).mean(axis=1)) > SPEECH_LEVEL).mean())


def full_scale(clip: Clip) -> float:
    """Share of samples as loud as a sample can be, or louder."""
    return float((np.abs(clip.wav) >= FULL_SCALE).mean())


def spoken_characters(text: str) -> int:
    """About how many letters it takes to write what is said: digits are words, ideographs are syllables."""
    total = 0
    for character in unicodedata.normalize("NFC", text):
        if character.isdigit():
            total += DIGIT
        elif character.isalpha():
            total += WIDE if unicodedata.east_asian_width(character) == "W" else 1
    return total


def characters_per_second(clip: Clip) -> float | None:
    """Spoken characters per second of audio; None without a text, or when it says that nobody speaks."""
    text = clip.utterance.text
    return None if text is None or not text.strip() else spoken_characters(text) / clip.seconds


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file("data/model.npz.xz", norm_probs=True)


def language_probability(clip: Clip) -> float | None:
    """How probable the declared language is for the text; None when that cannot be told."""
    text, language = clip.utterance.text or "", clip.utterance.language
    words = sum(any(map(str.isalpha, word)) for word in text.split())
    wide = sum(unicodedata.east_asian_width(character) == "W" for character in text)  # written without spaces
    if language is None or max(words, wide // 2) < LEAST_WORDS:
        return None
    return dict(_identifier().rank(text)).get(language)


@dataclass(frozen=True)
class Rule:
    """A measure and the bounds within which an utterance is kept; a measure of None is no verdict."""

    name: str
    measured: str
    measure: Callable[[Clip], float | None] | None  # None: not a measure of one clip
    low: float = -math.inf
    high: float = math.inf

    def breaks(self, value: float | None) -> bool:
        return value is not None and not self.low <= value <= self.high


# In the order in which an utterance is counted: one that breaks several rules is dropped by the first.
RULES: tuple[Rule, ...] = (
    Rule("silence", "share of frames at speech level", speech_level, low=0.03),
    Rule("clipping", "share of samples at full scale", full_scale, high=0.01),
    Rule("rate", "spoken characters per second", characters_per_second, low=0.5, high=30.0),
    Rule("language", "probability of the declared language", language_probability, low=0.01),
    Rule(DUPLICATE, "distance to the nearest of the same text and speaker", None, low=0.01),
)


@dataclass(frozen=True, eq=False)
class Measured:
    """What is known of an utterance once its audio was read; `error` says why it could not be."""

    values: Mapping[str, float | None] = field(default_factory=dict)
    error: str = ""
    digest: bytes = b""
    levels: np.ndarray = field(default_factory=lambda: np.zeros((0, len(EDGES) - 1), np.uint8))  # [frames, bands]


def fingerprint(clip: Clip) -> np.ndarray:
    """Band levels uint8 [frames, bands], 255 for the loudest; they do not depend on gain, nor much on the format."""
    hop = max(1, round(HOP_SECONDS * clip.sample_rate))
    wav = torch.from_numpy(clip.wav)
    if len(wav) < 2 * hop:
        wav = torch.nn.functional.pad(wav, (0, 2 * hop - len(wav)))
    windows = wav.unfold(0, 2 * hop, hop) * torch.hann_window(2 * hop)  # [frames, 2 hop]
    power = torch.fft.rfft(windows).abs().square().numpy()  # [frames, bins]
    bins = np.searchsorted(np.fft.rfftfreq(2 * hop, 1 / clip.sample_rate), EDGES)
    bands = np.stack([power[:, a:b].sum(axis=1) for a, b in pairwise(bins)], axis=1)
    level = 10 * np.log10(np.maximum(bands / max(float(bands.max()), 1e-20), 10 ** (-FLOOR_DB / 10)))
    return np.round(255 * (1 + level / FLOOR_DB)).astype(np.uint8)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """1 - correlation of two fingerprints at the best shift: 0 for the same recording, 1 when lengths do not fit."""
    if abs(len(one) - len(other)) > MAX_SHIFT:
        return 1.0
    best = 0.0
    for shift in range(-MAX_SHIFT, MAX_SHIFT + 1):
        a, b = one[max(0, shift) :], other[max(0, -shift) :]
        length = min(len(a), len(b))
        if length < max(1, max(len(one), len(other)) - 2 * MAX_SHIFT):
            continue
        a, b = (x[:length].astype(np.float32) - x[:length].mean() for x in (a, b))
        norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
        best = max(best, float((a * b).sum()) / norm) if norm else best
    return max(0.0, 1.0 - best)


def measure(item: Item, rules: Sequence[Rule] = RULES) -> Measured:
    """Read an utterance and take every measure of it; audio that cannot be read is a result, not an error."""
    try:
        content = audio_bytes(item.utterance, item.root)
        rate = _own_rate(content)
        file = io.BytesIO(content)
        file.name = item.utterance.audio  # for messages
        wav = read_audio(file, rate)[0].numpy()  # at its own rate: resampling moves peaks
    except InputError as error:
        return Measured(error=str(error))
    clip = Clip(item.utterance, wav, rate)
    values = {rule.name: rule.measure(clip) for rule in rules if rule.measure is not None}
    return Measured(values, digest=hashlib.sha256(content).digest(), levels=fingerprint(clip))


def _own_rate(content: bytes) -> int:
    try:
        return int(soundfile.info(io.BytesIO(content)).samplerate)
    except soundfile.LibsndfileError:
        return 16000  # read_audio says what is wrong with it


def normalized(text: str) -> str:
    """Letters and digits only, without case: texts that are read aloud alike."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() or unicodedata.combining(c) else " " for c in plain).split())


def duplicates(items: Sequence[Item], measured: Sequence[Measured], bound: float) -> dict[int, tuple[float, int]]:
    """Utterance -> (distance, nearest utterance before it), for those that have one with the same text and speaker.

    The order is test, dev, train, then that of the files: of a recording in two splits the one for testing is kept.
    One whose distance is below `bound` is a duplicate, and later ones are not compared with it. The same bytes are at
    distance 0 whatever is known of the text; other recordings are compared only where text is known and not empty.
    """
    splits = ("test", "dev", "train")
    order = sorted(range(len(items)), key=lambda i: splits.index(items[i].utterance.split))
    same_bytes: dict[tuple, int] = {}
    groups: dict[tuple, list[int]] = {}
    nearest: dict[int, tuple[float, int]] = {}
    for i in order:
        known = items[i].utterance
        key = (None if known.text is None else normalized(known.text), known.speaker)
        first = same_bytes.setdefault((*key, measured[i].digest), i)
        if first != i:
            nearest[i] = (0.0, first)
        elif key[0]:
            group = groups.setdefault(key, [])
            found = min(((distance(measured[j].levels, measured[i].levels), j) for j in group), default=None)
            if found is not None:
                nearest[i] = found
            if found is None or found[0] >= bound:
                group.append(i)
    return nearest


@dataclass(frozen=True)
class Dropped:
    """Why an utterance is dropped: the rule, what it measured, and in words where a number does not say it."""

    id: str
    rule: str
    value: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Verdicts:
    """Which items are kept, why each other one is not, and every value by rule (all items that were judged)."""

    kept: list[int]
    dropped: list[Dropped]
    values: dict[str, list[float]]
    broken: dict[str, int]  # how many break a rule, whichever dropped them


def judge(items: Sequence[Item], measured: Sequence[Measured], rules: Sequence[Rule] = RULES) -> Verdicts:
    """Apply the rules in their order; duplicates are looked for among what the others leave."""
    reasons: dict[int, Dropped] = {}
    broken = dict.fromkeys((UNREADABLE, *(rule.name for rule in rules)), 0)
    values: dict[str, list[float]] = {rule.name: [] for rule in rules}

    def verdict(i: int, name: str, value: float | None = None, note: str = "") -> None:
        broken[name] += 1
        reasons.setdefault(i, Dropped(items[i].utterance.id, name, value, note))

    for i, result in enumerate(measured):
        if result.error:
            verdict(i, UNREADABLE, note=result.error)
    for rule in rules:
        if rule.measure is not None:
            judged: Iterable[tuple[int, float | None, str]] = (
                (i, result.values.get(rule.name), "") for i, result in enumerate(measured)
            )
        else:
            left = [i for i in range(len(items)) if i not in reasons]
            found = duplicates([items[i] for i in left], [measured[i] for i in left], rule.low)
            judged = [(left[i], far, f"of {items[left[j]].utterance.id}") for i, (far, j) in sorted(found.items())]
        for i, value, note in judged:
            if value is not None:
                values[rule.name].append(value)
            if rule.breaks(value):
                verdict(i, rule.name, value, note)
    kept = [i for i in range(len(items)) if i not in reasons]
    return Verdicts(kept, [reasons[i] for i in sorted(reasons)], values, broken)
