"""Answers as documents: plain text, JSON, subtitles (SRT, WebVTT), RTTM and TSV.

text: an answer a line, white space collapsed; an empty line where there is none.
json: an object a line, all fields.
srt: SubRip: numbered cues, `spk1: ` before the words. It has no escapes: `-->` is written `->`, as Whisper does.
vtt: WebVTT (W3C): speakers as voices, `<v spk1>`; &, < and > escaped.
rttm: NIST's SPEAKER lines, without words; the recording by its name without folder and suffix.
tsv: Whisper's convention: a header, whole milliseconds, no quotes; tabs and line ends in the text become spaces. Beside
    Whisper's columns there is the speaker.

Times count from the start of the recording. Segments come in order of their start; they may overlap. One of no length
is written 1 ms long: readers of subtitles and RTTM refuse it otherwise. Where an answer has text and no segments, say a
label, it holds for the whole recording. Nobody speaking, or an answer withheld, makes a document without segments.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from serve.inputs import unique_names

if TYPE_CHECKING:
    from serve.answer import Answer

SPEECH = "speech"  # what is spoken by nobody known: a name in RTTM, and in brackets where subtitles have no words


class Format(str, Enum):
    text = "text"
    json = "json"
    srt = "srt"
    vtt = "vtt"
    rttm = "rttm"
    tsv = "tsv"

    @property
    def suffix(self) -> str:
        """Of a file in this format, with its dot."""
        return ".txt" if self is Format.text else f".{self.value}"


class _Cue(NamedTuple):
    """A segment in milliseconds, `end` > `start`."""

    start: int
    end: int
    speaker: str | None
    text: str


class Writer:
    """Writes answers one after another into one document.

    What a document has once is written with the first answer, and SRT's numbers go on. With several files, WebVTT and
    TSV say in a comment and in a first column, `file`, what each part is about. SRT cannot, and players take either
    kind of subtitles for those of one recording: they are better written to a document for each.
    """

    def __init__(self, format: Format, files: Sequence[str] = ()) -> None:
        """files: all that answers will be about, so that RTTM has a name for each; may be left out for one file."""
        self._format = format
        self._names = unique_names(files)
        self._begun = False
        self._cues = 0  # written so far

    def write(self, answer: Answer) -> str:
        """The next part of the document, ending with a newline if not empty."""
        if self._format is Format.text:
            return " ".join(answer.text.split()) + "\n"
        if self._format is Format.json:
            return json.dumps(answer.to_dict(), ensure_ascii=False) + "\n"
        first, self._begun = not self._begun, True
        several = len(self._names) > 1
        cues = _cues(answer)
        if self._format is Format.srt:
            self._cues += len(cues)
            return "".join(_srt(number, cue) for number, cue in enumerate(cues, 1 + self._cues - len(cues)))
        if self._format is Format.vtt:
            note = f"\nNOTE {' '.join(answer.file.split()).replace('-->', '->')}\n" if several else ""
            return ("WEBVTT\n" if first else "") + note + "".join(map(_vtt, cues))
        if self._format is Format.rttm:
            name = self._names.get(answer.file) or unique_names([answer.file])[answer.file]
            return "".join(_rttm(name, cue, answer.label) for cue in cues)
        columns = ["file", "start", "end", "speaker", "text"]
        rows = [[answer.file, str(cue.start), str(cue.end), cue.speaker or "", cue.text] for cue in cues]
        return "".join(_tsv(row if several else row[1:]) for row in ([columns] if first else []) + rows)


def write(answer: Answer, format: Format) -> str:
    """A whole document about one answer, ending with a newline if not empty."""
    return Writer(format).write(answer)


def _cues(answer: Answer) -> list[_Cue]:
    """In order of their start."""
    from speechllm.tasks.timed import NO_SPEECH  # slow to import, and --help, which names the formats, is not to wait

    cues = []
    for segment in sorted(answer.segments, key=lambda segment: segment.start):
        start, end = round(1000 * segment.start), round(1000 * segment.end)
        cues.append(_Cue(start, max(end, start + 1), segment.speaker, segment.text))
    if not cues and answer.text not in ("", NO_SPEECH):
        cues.append(_Cue(0, max(1, round(1000 * answer.seconds_in)), None, answer.text))
    return cues


def _srt(number: int, cue: _Cue) -> str:
    speaker = f"{_collapsed(cue.speaker)}: " if cue.speaker else ""
    text = "\n".join(_lines(cue.text)).replace("-->", "->")
    return f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{speaker}{text}\n\n"


def _vtt(cue: _Cue) -> str:
    voice = f"<v {escape(_collapsed(cue.speaker), quote=False)}>" if cue.speaker else ""
    text = escape("\n".join(_lines(cue.text)), quote=False)
    return f"\n{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{voice}{text}\n"


def _rttm(file: str, cue: _Cue, label: str | None) -> str:
    """Without a speaker, what the answer calls the segment, as in RTTM of classes of sound; else `speech`."""
    name = _unspaced(cue.speaker or label or SPEECH)
    times = f"{cue.start / 1000:.3f} {(cue.end - cue.start) / 1000:.3f}"
    return f"SPEAKER {_unspaced(file)} 1 {times} <NA> <NA> {name} <NA> <NA>\n"


def _tsv(row: Sequence[str]) -> str:
    return "\t".join(map(_collapsed, row)) + "\n"


def _clock(milliseconds: int, point: str) -> str:
    """Hours have two digits or more."""
    seconds, milliseconds = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{point}{milliseconds:03}"


def _lines(text: str) -> list[str]:
    """Without the empty ones, which would end a cue."""
    return [_collapsed(line) for line in text.splitlines() if line.strip()] or [f"[{SPEECH}]"]


def _collapsed(text: str) -> str:
    return " ".join(text.split())


def _unspaced(name: str) -> str:
    """As one field of RTTM, whose fields end at white space."""
    return "_".join(name.split()) or "<NA>"
