"""Rules that tell utterances unfit for training: what each measures, and the bounds outside which it drops.

=================  ==================================================  ========  ================================
rule               measured                                            kept      why
=================  ==================================================  ========  ================================
unreadable         the audio can be decoded                            yes       missing, cut short, not audio
duration           seconds between the duration given and the file's   <= 0.5    another file, or one that was cut since
silence            share of 20 ms frames above -50 dBFS                >= 0.03   hardly any speech-level signal
clipping           share of samples at full scale                      <= 0.01   an overloaded recording
rate               spoken characters per second of the whole clip      0.5 - 30  text and audio do not belong together
language           probability of the declared language, 0 for a text  >= 0.01   the text is in another language
                   in another script
contradiction      how far the nearest utterance with another text     >= 0.01   one recording with two texts, of which
                   sounds, from 0 (the same)                                     one is wrong: both are dropped
duplicate          how far the nearest one before it with the same     >= 0.01   the same recording twice: the first is
                   text sounds                                                   kept
=================  ==================================================  ========  ================================

Read and conversational speech lies between 8 and 22 characters per second; the bounds leave room for single words in
long clips and for fast talkers. A rule does not judge what it cannot know: no text (rate, language), a text that says
nobody speaks (silence, rate), fewer than five words of the right script or a language that `py3langid` does not know
(language), a text alone (all of them: it is kept). The report says how many these are.

What is not detected: silence under steady noise above -50 dBFS, clipping that was turned down afterwards, a transcript
that is wrong but about as long as the right one, a language confused with a close relative of it, words of another
language within a sentence, and copies shifted by more than 0.1 s or cut differently (a shift of part of a fingerprint's
hop may hide one too). Recordings without words are compared by their bytes alone.
"""

from __future__ import annotations

import hashlib
import io
import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from py3langid.langid import LanguageIdentifier

from speechllm.audio import read_audio
from speechllm.data.audio_files import audio_rate
from speechllm.data.corpus import Item
from speechllm.data.duplicates import EDGES, Sound, fingerprint, nearest, normalized
from speechllm.data.languages import written_in
from speechllm.data.manifest import WRONG, Utterance, audio_bytes
from speechllm.errors import InputError

UNREADABLE, CONTRADICTION, DUPLICATE = "unreadable", "contradiction", "duplicate"
NO_TEXT, NOBODY, TEXT_ALONE = "no text", "nobody speaks", "a text alone"  # why a rule does not judge
SPEECH_LEVEL = 10 ** (-50 / 20)  # rms of a frame
LEVEL_SECONDS = 0.02
FULL_SCALE = 0.99  # of what a sample can be; lossy formats do not keep the last per cent
DIGIT, WIDE = 4, 3  # characters that a spoken digit and a Chinese, Japanese or Korean sign count as
LEAST_WORDS = 5  # from which the language of a text can be told
OWN_SCRIPT = 0.5  # share of the letters of a text that are of the script of its language


@dataclass(frozen=True, eq=False)
class Clip:
    """An utterance and its audio as recorded, float32 [samples] at the file's own rate in Hz."""

    utterance: Utterance
    wav: np.ndarray
    sample_rate: int

    @property
    def seconds(self) -> float:
        return len(self.wav) / self.sample_rate


Value = float | str  # what a rule measured, or why it does not judge


def wrong_seconds(clip: Clip) -> Value:
    """By how much the manifest is mistaken about the length."""
    return abs(clip.utterance.duration - clip.seconds)


def speech_level(clip: Clip) -> Value:
    """Share of frames that are loud enough for speech."""
    if clip.utterance.text is not None and not clip.utterance.text.strip():
        return NOBODY
    wav = clip.wav - clip.wav.mean()  # an offset is no signal
    size = min(len(wav), max(1, round(LEVEL_SECONDS * clip.sample_rate)))
    frames = wav[: len(wav) // size * size].reshape(-1, size)
    return float((np.sqrt(np.square(frames).mean(axis=1)) > SPEECH_LEVEL).mean())


def full_scale(clip: Clip) -> Value:
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


def characters_per_second(clip: Clip) -> Value:
    """Spoken characters per second of audio."""
    text = clip.utterance.text
    if text is None:
        return NO_TEXT
    return spoken_characters(text) / clip.seconds if text.strip() else NOBODY


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file("data/model.npz.xz", norm_probs=True)


def language_probability(clip: Clip) -> Value:
    """How probable the declared language is for the text; 0 where it is written in another script."""
    text, language = clip.utterance.text or "", clip.utterance.language
    if not text.strip():
        return NO_TEXT if clip.utterance.text is None else NOBODY
    if language is None:
        return "no language"
    own = written_in(text, language)
    if own is not None and own < OWN_SCRIPT:
        return 0.0
    words = sum(any(map(str.isalpha, word)) for word in text.split())
    wide = sum(unicodedata.east_asian_width(character) == "W" for character in text)  # written without spaces
    if max(words, wide // 2) < LEAST_WORDS:
        return f"fewer than {LEAST_WORDS} words"
    return dict(_identifier().rank(text)).get(language, "a language that py3langid does not know")


@dataclass(frozen=True)
class Rule:
    """A measure and the bounds within which an utterance is kept."""

    name: str
    measured: str
    measure: Callable[[Clip], Value] | None  # None: utterances are compared with each other
    low: float = -math.inf
    high: float = math.inf

    def breaks(self, value: Value) -> bool:
        return not isinstance(value, str) and not self.low <= value <= self.high


# In the order in which an utterance is counted: one that breaks several rules is dropped by the first.
RULES: tuple[Rule, ...] = (
    Rule("duration", "seconds between the duration given and the file's", wrong_seconds, high=WRONG),
    Rule("silence", "share of frames at speech level", speech_level, low=0.03),
    Rule("clipping", "share of samples at full scale", full_scale, high=0.01),
    Rule("rate", "spoken characters per second", characters_per_second, low=0.5, high=30.0),
    Rule("language", "probability of the declared language", language_probability, low=0.01),
    Rule(CONTRADICTION, "distance to the nearest with another text", None, low=0.01),
    Rule(DUPLICATE, "distance to the nearest before it with the same text", None, low=0.01),
)


@dataclass(frozen=True, eq=False)
class Measured:
    """What is known of an utterance once its audio was read; `error` says why it could not be."""

    values: Mapping[str, Value] = field(default_factory=dict)
    error: str = ""
    digest: bytes = b""
    levels: np.ndarray = field(default_factory=lambda: np.zeros((0, len(EDGES) - 1), np.uint8))  # [frames, bands]


def measure(item: Item, rules: Sequence[Rule] = RULES) -> Measured:
    """Read an utterance and take every measure of it; audio that cannot be read is a result, not an error."""
    if item.utterance.is_text:
        return Measured({rule.name: TEXT_ALONE for rule in rules if rule.measure is not None})
    try:
        content = audio_bytes(item.utterance, item.root)
        rate = audio_rate(content)
        file = io.BytesIO(content)
        file.name = item.utterance.audio  # for messages
        wav = read_audio(file, rate)[0].numpy()  # at its own rate: resampling moves peaks
    except InputError as error:
        return Measured(error=str(error))
    clip = Clip(item.utterance, wav, rate)
    values = {rule.name: rule.measure(clip) for rule in rules if rule.measure is not None}
    return Measured(values, digest=hashlib.sha256(content).digest(), levels=fingerprint(wav, rate))


def _likenesses(items: Sequence[Item], measured: Sequence[Measured], rule: Rule) -> dict[int, tuple[float, int]]:
    """Utterance -> (distance, the one it is like), see :func:`speechllm.data.duplicates.nearest`.

    The order is test, dev, train, then that of the files: of a recording in two splits the one for testing is kept.
    Copies of a copy are called copies of the first.
    """
    splits = ("test", "dev", "train")
    order = sorted(range(len(items)), key=lambda i: splits.index(items[i].utterance.split))
    texts = [items[i].utterance.text for i in order]
    words = [None if text is None else normalized(text) for text in texts]
    sounds = [Sound(said, measured[i].digest, measured[i].levels) for i, said in zip(order, words, strict=True)]
    found = nearest(sounds, rule.name == CONTRADICTION)
    named: dict[int, tuple[float, int]] = {}
    for index, (far, like) in found.items():
        while rule.name == DUPLICATE and like in found and rule.breaks(found[like][0]):
            like = found[like][1]
        named[order[index]] = far, order[like]
    return named


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
    unjudged: dict[str, dict[str, int]]  # rule -> why it does not judge -> how many; of rules that measure single ones
    broken: dict[str, int]  # how many break a rule, whichever dropped them


def judge(items: Sequence[Item], measured: Sequence[Measured], rules: Sequence[Rule] = RULES) -> Verdicts:
    """Apply the rules in their order; utterances are compared with what the rules before leave."""
    reasons: dict[int, Dropped] = {}
    broken = dict.fromkeys((UNREADABLE, *(rule.name for rule in rules)), 0)
    values: dict[str, list[float]] = {rule.name: [] for rule in rules}
    unjudged: dict[str, dict[str, int]] = {rule.name: {} for rule in rules}

    def verdict(i: int, name: str, value: float | None = None, note: str = "") -> None:
        broken[name] += 1
        reasons.setdefault(i, Dropped(items[i].utterance.id, name, value, note))

    for i, result in enumerate(measured):
        if result.error:
            verdict(i, UNREADABLE, note=result.error)
    for rule in rules:
        judged: Iterable[tuple[int, Value, str]]
        if rule.measure is not None:
            judged = ((i, result.values.get(rule.name, UNREADABLE), "") for i, result in enumerate(measured))
        else:
            left = [i for i, item in enumerate(items) if i not in reasons and not item.utterance.is_text]
            found = _likenesses([items[i] for i in left], [measured[i] for i in left], rule)
            judged = [(left[i], far, f"of {items[left[j]].utterance.id}") for i, (far, j) in sorted(found.items())]
        for i, value, note in judged:
            if isinstance(value, str):
                unjudged[rule.name][value] = unjudged[rule.name].get(value, 0) + 1
                continue
            values[rule.name].append(value)
            if rule.breaks(value):
                verdict(i, rule.name, value, note)
    kept = [i for i in range(len(items)) if i not in reasons]
    return Verdicts(kept, [reasons[i] for i in sorted(reasons)], values, unjudged, broken)
