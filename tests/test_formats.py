"""Answers as documents: read back by the libraries of each format, or by strict readers after its specification."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import meeteval
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyannote.database.util import load_rttm

from serve.answer import Answer
from serve.formats import Format, Writer, write
from speechllm.tasks import TASKS, Facts, Segment

HOUR = 3600.0
Read = list[tuple[int, int, str | None, str]]  # start and end in milliseconds, speaker, text


def answer(*segments: Segment, text: str = "words", **fields: Any) -> Answer:
    """About ten seconds of talks/a.wav, unless told otherwise."""
    whole = Answer(
        file="talks/a.wav", instruction="Transcribe this audio", task="transcribe", text=text, segments=segments,
        words=(), label=None, slots={}, confidence=0.5, seconds_in=10.0, seconds_consumed=10.0,
        finish_reason="stop", model="tiny", tokens_in=9, tokens_out=2, timings={},
    )  # fmt: skip
    return replace(whole, **fields)


TALK = answer(
    Segment("spk1", 0.32, 1.2, "Good morning."),
    Segment("spk2", 1.0, 2.4567, "Guten Morgen, wie schön – 早上好"),
    Segment("spk1", 3661.04, 3662.0, "Bye"),
)


def clock(text: str, point: str) -> int:
    found = re.fullmatch(rf"(\d\d+):([0-5]\d):([0-5]\d){re.escape(point)}(\d{{3}})", text)
    assert found, text
    hours, minutes, seconds, milliseconds = map(int, found.groups())
    return ((hours * 60 + minutes) * 60 + seconds) * 1000 + milliseconds


def read_srt(document: str) -> Read:
    """Blocks of a number, times and lines of text that are not empty, each ended by an empty line."""
    cues: Read = []
    assert document == "" or document.endswith("\n\n")
    for number, block in enumerate(document.split("\n\n")[:-1], 1):
        counted, times, *lines = block.split("\n")
        assert counted == str(number)
        start, arrow, end = times.split(" ")
        assert arrow == "-->" and lines and all(map(str.strip, lines)) and "-->" not in "".join(lines)
        speaker, _, text = "\n".join(lines).partition(": ")
        named = re.fullmatch(r"spk\d+", speaker)
        cues.append((clock(start, ","), clock(end, ","), named and named[0], text if named else "\n".join(lines)))
        assert cues[-1][0] < cues[-1][1]
    return cues


def read_vtt(document: str) -> Read:
    """A file as https://www.w3.org/TR/webvtt1/#file-structure lets authors write it, with comments left out."""
    cues: Read = []
    header, *blocks = document.removesuffix("\n").split("\n\n")
    assert header == "WEBVTT" and document.endswith("\n")
    for block in blocks:
        times, *lines = block.split("\n")
        if times.startswith("NOTE "):
            assert "-->" not in block
            continue
        start, arrow, end = times.split(" ")
        assert arrow == "-->" and all(lines)
        voice, text = re.fullmatch(r"(?:<v ([^<>\n]+)>)?([^<>]*)", "\n".join(lines)).groups()  # type: ignore[union-attr]
        assert not re.search("&(?!(amp|lt|gt);)", block)
        for escaped, character in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
            voice, text = voice and voice.replace(escaped, character), text.replace(escaped, character)
        cues.append((clock(start, "."), clock(end, "."), voice, text))
        assert cues[-1][0] < cues[-1][1]
    return cues


def read_tsv(document: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(document, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE))


def read_rttm(document: str, folder: Path) -> dict[str, list[tuple[float, float, str]]]:
    """By file, what two libraries agree on."""
    path = folder / "a.rttm"
    path.write_text(document, encoding="utf-8")
    ours = {
        name: sorted((stretch.start, round(stretch.end, 3), speaker) for stretch, _, speaker in turns.itertracks(True))
        for name, turns in load_rttm(path).items()
    }
    theirs: dict[str, list[tuple[float, float, str]]] = {}
    for line in meeteval.io.RTTM.load(path).lines:
        end = float(line.begin_time + line.duration)
        theirs.setdefault(line.filename, []).append((float(line.begin_time), end, line.speaker_id))
    assert ours == {name: sorted(turns) for name, turns in theirs.items()}
    return ours


def test_the_documents_as_they_are() -> None:
    documents = {
        Format.srt: """\
1
00:00:00,320 --> 00:00:01,200
spk1: Good morning.

2
00:00:01,000 --> 00:00:02,457
spk2: Guten Morgen, wie schön – 早上好

3
01:01:01,040 --> 01:01:02,000
spk1: Bye

""",
        Format.vtt: """\
WEBVTT

00:00:00.320 --> 00:00:01.200
<v spk1>Good morning.

00:00:01.000 --> 00:00:02.457
<v spk2>Guten Morgen, wie schön – 早上好

01:01:01.040 --> 01:01:02.000
<v spk1>Bye
""",
        Format.rttm: """\
SPEAKER a 1 0.320 0.880 <NA> <NA> spk1 <NA> <NA>
SPEAKER a 1 1.000 1.457 <NA> <NA> spk2 <NA> <NA>
SPEAKER a 1 3661.040 0.960 <NA> <NA> spk1 <NA> <NA>
""",
        Format.tsv: """\
start\tend\tspeaker\ttext
320\t1200\tspk1\tGood morning.
1000\t2457\tspk2\tGuten Morgen, wie schön – 早上好
3661040\t3662000\tspk1\tBye
""",
        Format.text: "words\n",
    }
    assert {format: write(TALK, format) for format in documents} == documents
    assert json.loads(write(TALK, Format.json)) == TALK.to_dict()
    assert {format.suffix for format in Format} == {".txt", ".json", ".srt", ".vtt", ".rttm", ".tsv"}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    expected: Read = [
        (320, 1200, "spk1", "Good morning."),
        (1000, 2457, "spk2", "Guten Morgen, wie schön – 早上好"),
        (3661040, 3662000, "spk1", "Bye"),
    ]
    assert read_srt(write(TALK, Format.srt)) == read_vtt(write(TALK, Format.vtt)) == expected
    rows = read_tsv(write(TALK, Format.tsv))
    assert [(int(row["start"]), int(row["end"]), row["speaker"], row["text"]) for row in rows] == expected
    turns = read_rttm(write(TALK, Format.rttm), tmp_path)["a"]
    assert turns == [(start / 1000, end / 1000, speaker) for start, end, speaker, _ in expected]


SEGMENTS = st.builds(
    Segment,
    st.none() | st.integers(1, 20).map("spk{}".format),
    st.floats(0, 200 * HOUR),
    st.floats(0, 200 * HOUR),
    st.text() | st.sampled_from(["", "\n", "a\n\nb", "1\n00:00:01,000 --> 00:00:02,000", "&lt;<v x>", '"a', "\t"]),
)


@settings(deadline=None)
@given(st.lists(SEGMENTS, max_size=4))
def test_any_segments_make_valid_documents(segments: list[Segment]) -> None:
    asked = answer(*segments)
    spoken = sorted(segments, key=lambda segment: segment.start) or [Segment(None, 0.0, 10.0, "words")]
    times = [(round(1000 * s.start), max(round(1000 * s.end), round(1000 * s.start) + 1)) for s in spoken]
    texts = [" ".join(s.text.split()) for s in spoken]
    shown = [text or "[speech]" for text in texts]
    vtt = read_vtt(write(asked, Format.vtt))
    assert [(start, end) for start, end, _, _ in vtt] == times
    assert [(speaker, " ".join(text.split())) for _, _, speaker, text in vtt] == [
        (s.speaker, text) for s, text in zip(spoken, shown, strict=True)
    ]
    srt = read_srt(write(asked, Format.srt))
    assert [(start, end) for start, end, _, _ in srt] == times
    assert [" ".join(text.split()) for *_, text in srt] == [text.replace("-->", "->") for text in shown]
    rows = read_tsv(write(asked, Format.tsv))
    assert [(int(row["start"]), int(row["end"])) for row in rows] == times
    assert [(row["speaker"], row["text"]) for row in rows] == [
        (s.speaker or "", text) for s, text in zip(spoken, texts, strict=True)
    ]
    fields = [line.split(" ") for line in write(asked, Format.rttm).splitlines()]
    assert {len(line) for line in fields} == {10}
    assert [line[7] for line in fields] == [s.speaker or "speech" for s in spoken]
    assert [round(1000 * (float(line[3]) + float(line[4]))) for line in fields] == [end for _, end in times]


def test_text_that_would_break_a_document() -> None:
    lines = answer(Segment("spk1", 0, 1, "\n first  line\r\n\n second <b> & --> line\x85"))
    assert write(lines, Format.srt).split("\n")[2:] == ["spk1: first line", "second <b> & -> line", "", ""]
    assert write(lines, Format.vtt).split("\n")[3:] == [
        "<v spk1>first line",
        "second &lt;b&gt; &amp; --&gt; line",
        "",
    ]
    assert write(lines, Format.tsv).split("\n")[1:] == ["0\t1000\tspk1\tfirst line second <b> & --> line", ""]
    assert write(answer(text="two\n lines "), Format.text) == "two lines\n"
    named = answer(Segment("A & <B>\n", 0, 1, "hello"))
    assert read_vtt(write(named, Format.vtt)) == [(0, 1000, "A & <B>", "hello")]
    assert write(named, Format.rttm).split(" ")[7] == "A_&_<B>"


def test_more_than_ninety_nine_hours_and_no_length(tmp_path: Path) -> None:
    late = answer(Segment("spk1", 123 * HOUR + 1.5, 123 * HOUR + 1.5, "late"))
    assert "\n123:00:01,500 --> 123:00:01,501\n" in write(late, Format.srt)
    assert "\n123:00:01.500 --> 123:00:01.501\n" in write(late, Format.vtt)
    assert read_rttm(write(late, Format.rttm), tmp_path) == {"a": [(442801.5, 442801.501, "spk1")]}
    assert write(answer(Segment(None, 0, 59.9996, "x")), Format.srt).split("\n")[1] == "00:00:00,000 --> 00:01:00,000"


def test_overlapping_segments_come_in_order_of_their_start(tmp_path: Path) -> None:
    later, earlier = Segment("spk2", 1.0, 2.0, "later"), Segment("spk1", 0.5, 3.0, "earlier")
    for format, read in ((Format.srt, read_srt), (Format.vtt, read_vtt)):
        document = write(answer(later, earlier), format)
        assert read(document) == [(500, 3000, "spk1", "earlier"), (1000, 2000, "spk2", "later")]
    turns = read_rttm(write(answer(later, earlier), Format.rttm), tmp_path)
    assert turns == {"a": [(0.5, 3.0, "spk1"), (1.0, 2.0, "spk2")]}


@pytest.mark.parametrize("speaker", ["spk1", None])
def test_segments_without_words(speaker: str | None, tmp_path: Path) -> None:
    """Who speaks when, and when anybody does."""
    turns = answer(Segment(speaker, 1.0, 2.0), text="<|1.00|><|2.00|>")
    assert read_srt(write(turns, Format.srt)) == [(1000, 2000, speaker, "[speech]")]
    assert read_vtt(write(turns, Format.vtt)) == [(1000, 2000, speaker, "[speech]")]
    assert read_rttm(write(turns, Format.rttm), tmp_path) == {"a": [(1.0, 2.0, speaker or "speech")]}
    assert read_tsv(write(turns, Format.tsv))[0]["text"] == ""


def test_a_label_holds_for_the_whole_recording(tmp_path: Path) -> None:
    angry = answer(text="angry", label="angry", seconds_in=2.5)
    assert read_srt(write(angry, Format.srt)) == read_vtt(write(angry, Format.vtt)) == [(0, 2500, None, "angry")]
    assert read_tsv(write(angry, Format.tsv)) == [{"start": "0", "end": "2500", "speaker": "", "text": "angry"}]
    assert read_rttm(write(angry, Format.rttm), tmp_path) == {"a": [(0.0, 2.5, "angry")]}


def test_nobody_speaks_or_the_answer_is_withheld(tmp_path: Path) -> None:
    (no_speech,) = TASKS["activity"].write(Facts(duration=3.0, text=""))  # type: ignore[misc]
    silent = answer(text="", finish_reason="no_speech")
    for nothing in (silent, answer(text="", finish_reason="abstained"), answer(text=str(no_speech))):
        assert write(nothing, Format.srt) == write(nothing, Format.rttm) == ""
        assert write(nothing, Format.vtt) == "WEBVTT\n"
        assert write(nothing, Format.tsv) == "start\tend\tspeaker\ttext\n"
        assert read_srt("") == read_vtt("WEBVTT\n") == read_tsv("start\tend\n") == []
        assert write(nothing, Format.text) == nothing.text + "\n"
        assert json.loads(write(nothing, Format.json))["segments"] == []
    assert read_rttm("", tmp_path) == {}


def test_several_answers_in_one_document(tmp_path: Path) -> None:
    files = ["x/my talk.wav", "y/my talk.wav", "quiet.wav"]
    answers = [answer(Segment("spk1", i, i + 1, f"text {i}"), file=file) for i, file in enumerate(files[:2])]
    answers.append(answer(text="", file=files[2]))
    documents = {}
    for format in Format:
        writer = Writer(format, files)
        documents[format] = "".join(map(writer.write, answers))
    assert documents[Format.text] == "words\nwords\n\n"
    assert [json.loads(line)["file"] for line in documents[Format.json].splitlines()] == files
    assert [cue[3] for cue in read_srt(documents[Format.srt])] == ["text 0", "text 1"]  # the reader checks the numbers
    assert [cue[3] for cue in read_vtt(documents[Format.vtt])] == ["text 0", "text 1"]
    assert re.findall("NOTE (.*)\n", documents[Format.vtt]) == files
    assert [(row["file"], row["text"]) for row in read_tsv(documents[Format.tsv])] == [
        (files[0], "text 0"),
        (files[1], "text 1"),
    ]
    turns = read_rttm(documents[Format.rttm], tmp_path)
    assert turns == {"x/my_talk": [(0.0, 1.0, "spk1")], "y/my_talk": [(1.0, 2.0, "spk1")]}


@pytest.mark.parametrize(("file", "name"), [("-", "stdin"), ("", "<NA>"), (" .wav", "<NA>"), ("a\u3000b.mp3", "a_b")])
def test_rttm_names_a_recording_in_one_field(file: str, name: str) -> None:
    line = write(answer(Segment("spk1", 0, 1, "x"), file=file), Format.rttm)
    assert line == f"SPEAKER {name} 1 0.000 1.000 <NA> <NA> spk1 <NA> <NA>\n"
