"""Tasks answered with times: who speaks when, and what they say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from speechllm.tasks.answer import Facts, ParsedAnswer, Part, Parts, Segment, Speaker, Time, shown
from speechllm.tasks.base import Task, collapsed, words_of

NO_SPEECH = "no speech"
SPEAKERS_MARK = "a speaker's mark"  # the fault


@dataclass(frozen=True)
class Timed(Task):
    """Segments in order of their start, each ``[speaker] time [words] time``.

    Overlapping speech is serialised by start time (serialized output training, Kanda et al. 2020).

    speakers: whether segments begin with their speaker's mark. words: whether they hold words.
    """

    marks: bool = True
    speakers: bool = False
    words: bool = True

    def write(self, facts: Facts, argument: str = "") -> Parts | None:
        """None where segments lack the words or speakers asked for."""
        if not facts.segments:
            return () if facts.text == "" else None
        if self.words and not all(segment.text.strip() for segment in facts.segments):
            return None
        if self.speakers and any(segment.speaker is None for segment in facts.segments):
            return None
        numbers: dict[str | None, int] = {}
        parts: list[Part] = []
        for segment in sorted(facts.segments, key=lambda s: (s.start, s.end)):
            number = numbers.setdefault(segment.speaker, len(numbers) + 1)
            parts += [Speaker(number)] if self.speakers else []
            parts += [Time(segment.start)] + ([collapsed(segment.text)] if self.words else []) + [Time(segment.end)]
        return tuple(parts)

    def read(self, parts: Parts) -> ParsedAnswer:
        """Segments that are whole and in order; the rest is told as faults. ``text`` is the answer as written."""
        segments: list[Segment] = []
        faults: list[str] = []
        speaker: int | None = None
        begun: float | None = None
        words = ""
        for part in parts:
            if isinstance(part, Speaker):
                faults += self._unended(speaker, begun)
                faults += [] if self.speakers else [SPEAKERS_MARK]
                speaker, begun, words = part.number if self.speakers else None, None, ""
            elif isinstance(part, str):
                words = collapsed(f"{words} {part}")
                if begun is None and words:
                    faults.append("words outside a segment")
                    words = ""
            elif begun is None:
                begun, words = part.seconds, ""
            else:
                fault = self._fault(segments, speaker, begun, part.seconds, words)
                if fault:
                    faults.append(fault)
                else:
                    name = f"spk{speaker}" if self.speakers else None
                    segments.append(Segment(name, begun, part.seconds, words))
                speaker, begun, words = None, None, ""
        faults += self._unended(speaker, begun)
        return ParsedAnswer(shown(parts), tuple(segments), faults=tuple(faults))

    def _unended(self, speaker: int | None, begun: float | None) -> list[str]:
        if begun is not None:
            return [f"a segment that begins at {begun:.2f} s has no end"]
        return [] if speaker is None else [f"nothing of spk{speaker} after the mark"]

    def _fault(self, before: list[Segment], speaker: int | None, start: float, end: float, words: str) -> str | None:
        where = f"the segment from {start:.2f} to {end:.2f} s"
        if end <= start:
            return f"{where} ends before it starts"
        if before and start < before[-1].start:
            return f"{where} starts before the one in front of it"
        if self.speakers and speaker is None:
            return f"{where} has no speaker"
        if self.words != bool(words):
            return f"{where} has {'words' if words else 'no words'}"
        return None


@dataclass(frozen=True)
class VoiceActivity(Task):
    """When anybody speaks: ``time time`` for each stretch, or "no speech"."""

    marks: bool = True

    def write(self, facts: Facts, argument: str = "") -> Parts | None:
        if not facts.segments:
            return (NO_SPEECH,) if facts.text == "" else None
        return tuple(Time(t) for stretch in union(facts.segments) for t in stretch)

    def read(self, parts: Parts) -> ParsedAnswer:
        times = [part.seconds for part in parts if isinstance(part, Time)]
        words = words_of(parts)
        faults: list[str] = []
        segments: list[Segment] = []
        for start, end in zip(times[::2], times[1::2], strict=False):
            if end <= start or (segments and start < segments[-1].end):
                faults.append(f"the stretch from {start:.2f} to {end:.2f} s is out of order")
            else:
                segments.append(Segment(None, start, end))
        if len(times) % 2:
            faults.append(f"a stretch that begins at {times[-1]:.2f} s has no end")
        if any(isinstance(part, Speaker) for part in parts):
            faults.append(SPEAKERS_MARK)
        if words != (NO_SPEECH if not times else ""):
            faults.append(f"{words!r} where times, or {NO_SPEECH!r}, were to come" if words else "nothing")
        return ParsedAnswer(shown(parts), tuple(segments), faults=tuple(faults))


def union(segments: Iterable[Segment]) -> list[tuple[float, float]]:
    """Stretches in which at least one segment lies, in order, in seconds."""
    stretches: list[tuple[float, float]] = []
    for segment in sorted(segments, key=lambda s: s.start):
        if stretches and segment.start <= stretches[-1][1]:
            stretches[-1] = (stretches[-1][0], max(stretches[-1][1], segment.end))
        else:
            stretches.append((segment.start, segment.end))
    return stretches
