"""Conversations of one to three speakers, mixed from single utterances.

:func:`draw` plans who speaks when and what, from what the manifests say of the clips; :func:`mix` makes the audio of a
plan from its clips. Times are of the speech itself: from the first to the last 10 ms of a clip whose level is near
that of its loudest part (see :func:`trim`). What surrounds it in the clip is kept for a tenth of a second and faded:
weak sounds at the edges stay audible, outside the times. Pauses within a clip belong to its turn.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from speechllm.data.ambience import PEAK, background
from speechllm.data.corpus import Item
from speechllm.data.manifest import SLACK
from speechllm.data.perturb import RT60, add_at, room
from speechllm.data.synthesis import SAMPLE_RATE, VOICES
from speechllm.errors import InputError
from speechllm.tasks import Segment

SPEAKERS = {1: 0.2, 2: 0.4, 3: 0.4}  # number of them -> share of the conversations
MIN_TURNS, MAX_TURNS = 2, 8
STAYS = 0.2  # chance that who has spoken goes on, in a new turn
PAUSES, EDGES = (0.1, 1.2), (0.1, 0.5)  # seconds between turns, and before the first and after the last
OVERLAPS = 0.5  # chance that a new speaker does not wait
MAX_OVERLAP = 0.4  # of the shorter of two turns; below a half, so that never three turns meet
LEVELS_DB, CLEAN_LEVEL_DB = (-30.0, -18.0), -23.0  # dBFS, rms of the speech; the second when nothing varies
SPREAD_DB = 3.0  # of each speaker, up and down: two differ by up to twice that
ROOM_SHARE, NOISE_SHARE, SNRS_DB = 0.3, 0.3, (10.0, 30.0)

BLOCK, MARGIN, MIN_SPEECH, QUIET = 0.01, 0.1, 0.05, 0.2  # seconds
SILENCE = 1e-4  # rms of the loudest block of a clip without speech

_PERSONS = {voice.name: voice.person for voice in VOICES}

Voice = tuple[Item, ...]  # the clips of one speaker in one source, shortest first
People = Mapping[str, Sequence[Voice]]  # person -> voices


class Cast(NamedTuple):
    """Who may take part, and how often by comparison: by the root of how many different things each has to say.

    Of people drawn alike, the many of a set of single words would talk most; of sentences drawn alike, hardly anybody
    would whose recordings are few.
    """

    people: People
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Clip:
    """``wav [1, samples]`` whose speech is ``[start, end)`` (samples); around it the level falls to zero."""

    wav: Tensor
    start: int
    end: int


@dataclass(frozen=True)
class Turn:
    """A clip and the seconds of silence before it; None: it begins before the turn before it has ended."""

    item: Item
    pause: float | None

    @property
    def speaker(self) -> str:
        assert self.item.utterance.speaker is not None
        return self.item.utterance.speaker


@dataclass(frozen=True)
class Plan:
    """A conversation. ``overlap`` is the share of the shorter of two neighbours, for those that overlap.

    ``edges`` are the seconds before and after the speech, ``levels`` dBFS by speaker, ``rt60`` the seconds a room
    takes to decay, ``seed`` that of room and noise.
    """

    turns: tuple[Turn, ...]
    overlap: float
    edges: tuple[float, float]
    levels: Mapping[str, float]
    rt60: float | None = None
    snr_db: float | None = None
    seed: int = 0


def trim(wav: Tensor) -> Clip | None:
    """The speech in ``wav [1, samples]`` at 16 kHz and a margin around it, or None when there is none.

    Loud are the 10 ms blocks within 30 dB of the loudest one, after a pre-emphasis that makes rumble count little and
    consonants much. Where the clip's own noise comes near that, they must rise 8 dB above the noise, but need not come
    nearer than 15 dB to the loudest. Speech reaches from the first loud block to the last; a sound of less than 50 ms
    with a fifth of a second of quiet around it is a click, not speech.
    """
    size = round(BLOCK * SAMPLE_RATE)
    bright = wav[0] - 0.97 * F.pad(wav[0], (1, -1))
    blocks = bright[: len(bright) // size * size].reshape(-1, size)  # [blocks, size]
    if not len(blocks) or wav.square().mean().sqrt() < SILENCE:
        return None
    levels = 10 * torch.log10(blocks.square().mean(1).clamp_min(1e-12))  # [blocks], dB
    loudest = float(levels.max())
    threshold = max(loudest - 30, min(float(levels.quantile(0.1)) + 8, loudest - 15))
    loud = torch.nonzero(levels > threshold)[:, 0]
    sounds = loud.tensor_split(torch.nonzero(loud.diff() * BLOCK > QUIET)[:, 0] + 1)
    speech = [sound for sound in sounds if len(sound) * BLOCK >= MIN_SPEECH]
    if not speech:
        return None
    start, end = int(speech[0][0]) * size, (int(speech[-1][-1]) + 1) * size
    margin = round(MARGIN * SAMPLE_RATE)
    before, after = min(start, margin), min(wav.shape[-1] - end, margin)
    fade = torch.cat([torch.linspace(0, 1, before), torch.ones(end - start), torch.linspace(1, 0, after)])
    return Clip(wav[:, start - before : end + after] * fade, before, before + end - start)


def sentence(item: Item) -> str:
    """What is said, whatever its case and punctuation; the clip's id where the words are not known."""
    return " ".join(re.findall(r"\w+", (item.utterance.text or "").casefold())) or item.utterance.id


def person(speaker: str) -> str:
    """Who stands behind a speaker: the same person may have lent several synthetic voices theirs."""
    return _PERSONS.get(speaker, speaker)


def people(items: Iterable[Item]) -> People:
    """The voices of each person. Clips of an unknown speaker, without speech, or of several turns are left out.

    A person is an utterance's speaker, or whoever stands behind it in the table of synthetic voices. A speaker of two
    sources has two voices: the same name may mean two people there, who then never meet as one or as two.
    """
    clips: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in items:
        known = item.utterance
        if known.speaker and len(known.segments) < 2 and (known.text is None or known.text.strip()):
            clips[known.source, known.speaker].append(item)
    found: dict[str, list[Voice]] = defaultdict(list)
    for (_, speaker), voice in clips.items():
        found[person(speaker)].append(tuple(sorted(voice, key=lambda item: item.utterance.duration)))
    return dict(found)


def _short(voice: Voice, seconds: float) -> Voice:
    return voice[: bisect_right(voice, seconds, key=lambda item: item.utterance.duration)]


def casts(everybody: People, max_seconds: float) -> dict[int, Cast]:
    """Number of speakers -> who has clips short enough for a conversation of so many.

    Raises:
        InputError: there are not two of them.
    """
    found: dict[int, Cast] = {}
    for size in SPEAKERS:
        seconds = (max_seconds - 2 * EDGES[1]) / max(size, MIN_TURNS) - PAUSES[1] - SLACK
        sentences = MIN_TURNS if size == 1 else 1
        able: dict[str, list[Voice]] = {}
        weights: dict[str, float] = {}
        for person, voices in everybody.items():
            said = [{sentence(item) for item in _short(voice, seconds)} for voice in voices]
            if chosen := [n for n, texts in enumerate(said) if len(texts) >= sentences]:
                able[person] = [voices[n] for n in chosen]
                weights[person] = math.sqrt(len(set().union(*(said[n] for n in chosen))))
        if len(able) >= size:
            found[size] = Cast(able, weights)
    if 2 not in found:
        raise InputError(
            f"a conversation of up to {max_seconds:g} s needs two speakers with clips short enough for it; of "
            f"{len(everybody)} known speaker{'s' * (len(everybody) != 1)} there are fewer: give more manifests, or "
            "raise --max-seconds"
        )
    return found


def draw(casts: Mapping[int, Cast], max_seconds: float, varied: bool, rng: Random) -> Plan:
    """Draw a conversation that lasts ``max_seconds`` at most; only a ``varied`` one may have a room and noise.

    The first turns drawn are those of everybody who takes part, each with an equal share of the time left; others
    follow while they fit. Nobody says what has been said, unless there is nothing else to say in that time.
    """
    size = rng.choices(list(casts), [SPEAKERS[size] for size in casts])[0]
    able, weights = casts[size]
    # so often as the weights say, each once (Efraimidis and Spirakis 2006)
    chosen = sorted(sorted(able), key=lambda person: -(rng.random() ** (1 / weights[person])))[:size]
    voices = [rng.choice(able[person]) for person in chosen]
    needed = voices if size >= MIN_TURNS else voices * MIN_TURNS
    edges = (rng.uniform(*EDGES), rng.uniform(*EDGES))
    left = max_seconds - sum(edges)
    drawn: list[Turn] = []
    said: set[str] = set()
    for number in range(rng.randint(max(size, MIN_TURNS), MAX_TURNS)):
        pause = rng.uniform(*PAUSES)
        waiting = number < len(needed)
        voice = needed[number] if waiting else rng.choice(voices)
        fitting = _short(voice, left / (len(needed) - number if waiting else 1) - pause - SLACK)
        clips = [item for item in fitting if sentence(item) not in said] or (fitting if waiting else ())
        if clips:
            drawn.append(Turn(rng.choice(clips), pause))
            said.add(sentence(drawn[-1].item))
            left -= drawn[-1].item.utterance.duration + SLACK + pause
    level = rng.uniform(*LEVELS_DB) if varied else CLEAN_LEVEL_DB
    turns = _in_order(drawn, rng)
    return Plan(
        turns=turns,
        overlap=rng.uniform(0, MAX_OVERLAP),
        edges=edges,
        levels={
            speaker: level + rng.uniform(-SPREAD_DB, SPREAD_DB) for speaker in dict.fromkeys(t.speaker for t in turns)
        },
        rt60=rng.uniform(*RT60) if varied and rng.random() < ROOM_SHARE else None,
        snr_db=rng.uniform(*SNRS_DB) if varied and rng.random() < NOISE_SHARE else None,
        seed=rng.getrandbits(62),
    )


def _in_order(drawn: Sequence[Turn], rng: Random) -> tuple[Turn, ...]:
    """The turns of each speaker in their order, the speakers changing mostly; some that change do not wait."""
    left = Counter(turn.speaker for turn in drawn)
    queues = {speaker: [turn for turn in drawn if turn.speaker == speaker] for speaker in left}
    turns: list[Turn] = []
    while left:
        last = turns[-1].speaker if turns else ""
        others = [speaker for speaker in left if speaker != last]
        if last in left and (not others or rng.random() < STAYS):
            turns.append(queues[last].pop(0))
        else:
            turn = queues[rng.choices(others, [left[speaker] for speaker in others])[0]].pop(0)
            turns.append(Turn(turn.item, None) if turns and rng.random() < OVERLAPS else turn)
        left -= Counter([turns[-1].speaker])
    return tuple(turns)


def clips_of(plan: Plan) -> list[Clip]:
    """Read the clips of a plan, in order of its turns.

    Raises:
        InputError: one cannot be read, holds no speech, or is longer than its manifest says.
    """
    clips = []
    for turn in plan.turns:
        known, wav = turn.item.utterance, turn.item.wav(SAMPLE_RATE)
        if wav.shape[-1] > (known.duration + SLACK) * SAMPLE_RATE:
            seconds = wav.shape[-1] / SAMPLE_RATE
            raise InputError(f"{known.id}: lasts {seconds:.2f} s, not {known.duration:g} s; correct the manifest")
        clip = trim(wav)
        if clip is None:
            raise InputError(f"{known.id}: there is no speech in it; leave it out of the manifest")
        clips.append(clip)
    return clips


def spans(plan: Plan, clips: Sequence[Clip]) -> list[tuple[int, int]]:
    """Where the speech of each turn is in the conversation, in samples ``[start, end)``."""
    found: list[tuple[int, int]] = []
    start = end = round(plan.edges[0] * SAMPLE_RATE)
    for turn, clip in zip(plan.turns, clips, strict=True):
        size = clip.end - clip.start
        if found and turn.pause is None:
            start = end - int(plan.overlap * min(size, end - start))
        elif found:
            assert turn.pause is not None
            start = end + round(turn.pause * SAMPLE_RATE)
        end = start + size
        found.append((start, end))
    return found


def mix(plan: Plan, clips: Sequence[Clip], noise: Path | None = None) -> Tensor:
    """The conversation, float32 ``[1, samples]`` at 16 kHz, scaled down rather than clipped.

    In a room everybody has a place of his own. Its echoes ring on after the times of :func:`spans`. The noise is a
    piece of the recorded set ``noise`` or an artificial one, and is measured against the whole conversation.
    """
    placed = spans(plan, clips)
    samples = placed[-1][1] + round(plan.edges[1] * SAMPLE_RATE)
    tracks = {speaker: torch.zeros(1, samples) for speaker in plan.levels}
    for turn, clip, (start, _) in zip(plan.turns, clips, placed, strict=True):
        rms = clip.wav[:, clip.start : clip.end].square().mean().sqrt()
        first = start - clip.start
        tracks[turn.speaker][:, first : first + clip.wav.shape[-1]] += (
            clip.wav * 10 ** (plan.levels[turn.speaker] / 20) / rms
        )
    rng = Random(plan.seed)
    if plan.rt60 is not None:
        tracks = {speaker: room(track, SAMPLE_RATE, rng, plan.rt60) for speaker, track in tracks.items()}
    wav = torch.stack(list(tracks.values())).sum(0)
    if plan.snr_db is not None:
        behind = background(samples, noise, np.random.default_rng(rng.getrandbits(62)))
        wav = add_at(wav, torch.from_numpy(behind).float()[None], plan.snr_db)
    return wav * min(1.0, PEAK / float(wav.abs().max()))


def overlap_share(placed: Sequence[tuple[int, int]]) -> float:
    """Of the time in which anybody speaks, the share in which two do."""
    twice = sum(max(0, before[1] - after[0]) for before, after in pairwise(placed))
    return twice / (sum(end - start for start, end in placed) - twice)


def describe(plan: Plan, clips: Sequence[Clip]) -> dict[str, object]:
    """What an utterance's manifest line says of the conversation: language, segments and labels."""
    placed = spans(plan, clips)
    labels: dict[str, float] = {"num_speakers": len(plan.levels), "overlap_share": round(overlap_share(placed), 4)}
    if plan.rt60 is not None:
        labels["rt60"] = round(plan.rt60, 3)
    if plan.snr_db is not None:
        labels["snr_db"] = round(plan.snr_db, 1)
    languages = {turn.item.utterance.language for turn in plan.turns}
    texts = [turn.item.utterance.facts().text or "" for turn in plan.turns]
    segments = tuple(
        Segment(turn.speaker, round(start / SAMPLE_RATE, 4), round(end / SAMPLE_RATE, 4), text)
        for turn, text, (start, end) in zip(plan.turns, texts, placed, strict=True)
    )
    return {"language": languages.pop() if len(languages) == 1 else None, "segments": segments, "labels": labels}
