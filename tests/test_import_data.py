"""One's own data as a manifest: tables, folders, data sets of the datasets library, and every way they can be wrong."""

import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
from conftest import RATE, ROOT, clip, command, filled, imported, table, tone
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Value
from typer import Typer
from typer.testing import CliRunner

from speechllm.codec import SpeechCodec, SpeechCodecConfig, save_codec
from speechllm.data.audio_files import audio_seconds
from speechllm.data.corpus import Item
from speechllm.data.encoded import read_encoded, row_facts
from speechllm.data.manifest import Utterance, read_manifest
from speechllm.tasks import Segment
from train import encode, import_data


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing goes to the user's cache, nothing to the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@cache  # Ogg files carry a random number
def clip_bytes(container: str, seconds: float = 0.5, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tone(seconds), RATE, format=container, subtype=subtype)
    return file.getvalue()


def refused(source: object, out: Path, *options: object) -> str:
    """The import fails with exit code 2 and no traceback; what it printed, in one line."""
    before = set(out.rglob("*"))
    app = Typer()
    app.command()(import_data.main)
    arguments = [str(argument) for argument in (source, "--out", out, *options)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert set(out.rglob("*")) == before, "something was left behind"
    return " ".join(result.output.split())


def test_csv_with_common_names(tmp_path: Path) -> None:
    clip(tmp_path / "wavs" / "a.wav", 0.5)
    clip(tmp_path / "wavs" / "b.flac", 0.75)
    source = table(
        tmp_path / "own.csv",
        "Path,Sentence,client_id,gender,locale,emotion,intent,age,split",
        'wavs/a.wav,"Hello, you",s1,male_masculine,en-US,happy,greet,twenties,train',
        "wavs\\b.flac,,s2,F,,,,,validation",
    )
    first, second = imported(source, tmp_path / "out" / "set", "--language", "de")
    assert first == Utterance(
        id="set/0",
        audio="../../wavs/a.wav",
        duration=0.5,
        text="Hello, you",
        language="en",
        speaker="s1",
        gender="male",
        intent="greet",
        labels={"emotion": "happy", "age": "twenties"},
        split="train",
        source="set",
    )
    assert (second.audio, second.text, second.language, second.gender) == ("../../wavs/b.flac", None, "de", "female")
    assert (second.duration, second.split, second.labels, second.intent) == (0.75, "dev", {}, None)


@pytest.mark.parametrize(
    ("encoding", "newline"), [("utf-8-sig", "\r\n"), ("utf-8-sig", "\n"), ("utf-8", "\r\n"), ("utf-8", "\r")]
)
def test_byte_order_mark_and_line_ends(tmp_path: Path, encoding: str, newline: str) -> None:
    clip(tmp_path / "ž.wav")
    for name, lines in {
        "t.csv": ("path,text", "ž.wav,žluť", "", '"ž.wav","two, words"'),
        "t.tsv": ("path\ttext", "ž.wav\tžluť", "", "ž.wav\ttwo, words"),
        "t.jsonl": ('{"path": "ž.wav", "text": "žluť"}', "", '{"path": "ž.wav", "text": "two, words"}'),
    }.items():
        utterances = imported(
            table(tmp_path / name, *lines, encoding=encoding, newline=newline), tmp_path / f"{name}-out"
        )
        assert [u.text for u in utterances] == ["žluť", "two, words"]
        assert {u.audio for u in utterances} == {"../ž.wav"}  # one file named twice is two utterances


def test_tsv_quotes_do_not_swallow_lines(tmp_path: Path) -> None:
    clip(tmp_path / "clips" / "a.mp3")  # as Common Voice keeps them
    texts = ('"Stop, he said.', '"He said ""stop"""', '"Stop!" he said "now"', "plain")
    source = table(tmp_path / "validated.tsv", "path\tsentence", *(f"a.mp3\t{text}" for text in texts))
    utterances = imported(source, tmp_path / "out")
    assert [u.text for u in utterances] == [texts[0], 'He said "stop"', texts[2], texts[3]]
    assert {u.audio for u in utterances} == {"../clips/a.mp3"}


def test_json_lines_keep_what_a_manifest_knows(tmp_path: Path) -> None:
    clip(tmp_path / "a.ogg", 1.0)
    rows: list[dict] = [
        {"audio": "a.ogg", "text": "", "speaker": 7, "digit": 3, "noisy": True, "tags": ["x"], "score": 0.5},
        {"audio": str(tmp_path / "a.ogg"), "segments": [{"start": 0.1, "end": 0.4, "text": "hi"}], "gender": "other"}
        | {"slots": {"size": "big", "milk": None}, "translations": {"de": "hallo"}, "language": "x-Griko"},
    ]
    source = table(tmp_path / "t.jsonl", *(json.dumps(row) for row in rows))
    result = command(import_data.main, source, "--out", tmp_path / "out")
    assert "tags" in result.partition("not used")[2]
    assert "1 of 2 with an empty text: taken as audio without speech" in result
    assert "1 of 2 without a language: give one by --language" in result
    assert "without a text" not in result, "the words of one are in its segments"
    first, second = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert (first.text, first.speaker, first.labels) == ("", "7", {"digit": 3, "noisy": 1, "score": 0.5})
    assert second.segments == (Segment(None, 0.1, 0.4, "hi"),)
    assert (second.slots, second.translations, second.language) == ({"size": "big"}, {"de": "hallo"}, "x-griko")
    assert (second.gender, second.labels, second.audio) == (None, {"gender": "other"}, "../a.ogg")


def test_excerpts_are_cut(tmp_path: Path) -> None:
    wav = np.random.default_rng(0).uniform(-0.5, 0.5, 2 * 8000)
    soundfile.write(tmp_path / "long.wav", wav, 8000, subtype="PCM_16")
    stored = soundfile.read(tmp_path / "long.wav")[0]
    rows = (
        "long.wav,0.25,0.75,one",
        "long.wav,1.5,,two",
        "long.wav,,0.5,three",
        "long.wav,,,four",
        "long.wav,0,2,five",
    )
    excerpts = imported(table(tmp_path / "t.csv", "audio,start,end,text", *rows), tmp_path / "out")
    assert [(u.text, u.duration, u.labels) for u in excerpts] == [
        (text, seconds, {})
        for text, seconds in zip(("one", "two", "three", "four", "five"), (0.5, 0.5, 0.5, 2, 2), strict=True)
    ]
    assert [u.audio for u in excerpts] == [f"audio/000/000000{n}.flac" for n in range(3)] + ["../long.wav"] * 2
    for utterance, part in zip(excerpts, (slice(2000, 6000), slice(12000, 16000), slice(0, 4000)), strict=False):
        samples, rate = soundfile.read(tmp_path / "out" / utterance.audio)
        assert rate == 8000
        assert np.array_equal(samples, stored[part])
    content = {"bytes": (tmp_path / "long.wav").read_bytes(), "path": None}
    array = {"array": stored.tolist(), "sampling_rate": 8000, "path": None}
    for name, audio in (("bytes", content), ("array", array)):
        Dataset.from_list([{"audio": audio, "offset": 0.25, "duration": 0.5}]).save_to_disk(tmp_path / name)
        (utterance,) = imported(tmp_path / name, tmp_path / f"out-{name}")
        assert (utterance.duration, utterance.labels) == (0.5, {})
        assert np.array_equal(soundfile.read(tmp_path / f"out-{name}" / utterance.audio)[0], stored[2000:6000])


def test_audiofolder(tmp_path: Path) -> None:
    for split, name in (("train", "happy/1"), ("train", "sad/1"), ("test", "sad/2")):
        clip(tmp_path / "moods" / split / f"{name}.wav")
    options = ("--columns", "emotion=label")
    utterances = imported(tmp_path / "moods", tmp_path / "out", *options)
    assert [(u.audio, u.labels["emotion"], u.split) for u in utterances] == [
        ("../moods/train/happy/1.wav", "happy", "train"),
        ("../moods/train/sad/1.wav", "sad", "train"),
        ("../moods/test/sad/2.wav", "sad", "test"),
    ]
    (only,) = imported(tmp_path / "moods", tmp_path / "only", *options, "--hub-split", "test")
    assert only.split == "test"
    (moved,) = imported(tmp_path / "moods", tmp_path / "moved", "--hub-split", "test", "--split", "train")
    assert moved.split == "train"


def test_audiofolder_with_metadata(tmp_path: Path) -> None:
    clip(tmp_path / "set" / "data" / "1.wav")
    table(tmp_path / "set" / "metadata.csv", "file_name,transcription,speaker_id", "data/1.wav,hello,12")
    (utterance,) = imported(tmp_path / "set", tmp_path / "set")  # the manifest beside the data
    assert (utterance.audio, utterance.text, utterance.speaker) == ("data/1.wav", "hello", "12")


def own_rows(tmp_path: Path) -> list[dict]:
    """Bytes of four formats, two by the same name, and a file."""
    contents = [clip_bytes("WAV"), clip_bytes("FLAC"), clip_bytes("OGG", subtype="OPUS"), clip_bytes("MP3")]
    rows = [{"audio": {"bytes": c, "path": "same.wav"}, "sentence": str(n)} for n, c in enumerate(contents)]
    return [*rows, {"audio": {"bytes": None, "path": str(clip(tmp_path / "kept.wav"))}, "sentence": "4"}]


def check_own_rows(utterances: Sequence[Utterance], out: Path, tmp_path: Path, last: str = "../kept.wav") -> None:
    written = [f"audio/000/000000{n}{suffix}" for n, suffix in enumerate((".wav", ".flac", ".opus", ".mp3"))]
    assert [u.audio for u in utterances] == [*written, last]
    assert [u.text for u in utterances] == list("01234")
    for utterance, row in zip(utterances, own_rows(tmp_path)[:4], strict=False):
        assert (out / utterance.audio).read_bytes() == row["audio"]["bytes"]


def test_parquet_with_bytes(tmp_path: Path) -> None:
    data = Dataset.from_list(own_rows(tmp_path))
    data.to_parquet(str(tmp_path / "set" / "train-00000.parquet"))
    data.to_parquet(str(tmp_path / "one.parquet"))
    for source in ("set", "one.parquet"):
        out = tmp_path / f"out-{source}"
        check_own_rows(imported(tmp_path / source, out), out, tmp_path)


def test_saved_to_disk_with_classes(tmp_path: Path) -> None:
    audio = {"bytes": Value("binary"), "path": Value("string")}
    features = Features({"audio": audio, "sentence": Value("string"), "gender": ClassLabel(names=["male", "female"])})
    rows = [row | {"gender": gender} for row, gender in zip(own_rows(tmp_path), (0, 1, -1, None, 0), strict=True)]
    data = Dataset.from_list(rows, features=features).cast_column("audio", Audio(sampling_rate=8000))
    DatasetDict({"train": data, "validation.clean": data.select([0])}).save_to_disk(tmp_path / "disk")
    data.save_to_disk(tmp_path / "single")
    utterances = imported(tmp_path / "disk", tmp_path / "out")
    # the library puts files into what it saves
    check_own_rows(utterances[:5], tmp_path / "out", tmp_path, "audio/000/0000004.wav")
    assert [u.gender for u in utterances] == ["male", "female", None, None, "male", "male"]
    assert [u.split for u in utterances] == ["train"] * 5 + ["dev"]
    assert len(imported(tmp_path / "single", tmp_path / "out2")) == 5


def test_samples_become_flac(tmp_path: Path) -> None:
    rows = [{"audio": {"array": tone().tolist(), "sampling_rate": RATE, "path": None}, "text": "x"}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "disk")
    (utterance,) = imported(tmp_path / "disk", tmp_path / "out")
    assert (utterance.audio, utterance.duration) == ("audio/000/0000000.flac", 0.5)


def test_what_is_in_the_cache_of_downloads_is_copied(tmp_path: Path) -> None:
    file = clip(tmp_path / "cache" / "downloads" / "x.wav")
    source = table(tmp_path / "t.csv", "audio", str(file))
    (utterance,) = imported(source, tmp_path / "out")
    assert utterance.audio == "audio/000/0000000.wav"
    assert (tmp_path / "out" / utterance.audio).read_bytes() == file.read_bytes()


def test_paths_hold_through_links(tmp_path: Path) -> None:
    clip(tmp_path / "deep" / "er" / "a.wav")
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    (utterance,) = imported(table(tmp_path / "t.csv", "audio", "link/a.wav"), tmp_path / "link" / "out")
    assert utterance.audio == "../a.wav"


def test_lengths_from_headers_and_without(tmp_path: Path) -> None:
    for container, subtype in (("WAV", None), ("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)):
        assert audio_seconds(clip_bytes(container, 0.75, subtype)) == pytest.approx(0.75, abs=0.08)
    streamed = bytearray(clip_bytes("WAV", 0.75))
    streamed[4:8] = streamed[40:44] = b"\xff" * 4  # sizes as programs write them that do not know them yet
    assert audio_seconds(bytes(streamed)) == 0.75


def test_result_is_encoded(tmp_path: Path) -> None:
    config = SpeechCodecConfig(
        n_mels=16, card=16, n_acoustic=1, dim=16, depth=1, recognizer_depth=1, kernel=3, code_dim=8,
        acoustic_dim=16, acoustic_depth=1, decoder_dim=16, decoder_depth=1,
    )  # fmt: skip
    save_codec(filled(SpeechCodec(config)), tmp_path / "codec")
    clip(tmp_path / "a.wav")
    utterances = imported(table(tmp_path / "t.csv", "audio,text", "a.wav,hello"), tmp_path / "out")
    arguments = ("--codec", tmp_path / "codec", "--jobs", 1)
    command(encode.main, tmp_path / "out" / "manifest.jsonl", "--out", tmp_path / "codes", *arguments)
    (row,) = read_encoded([tmp_path / "codes"], "train")
    assert row["id"] == utterances[0].id
    assert row_facts(row).text == "hello"


# What is wrong with the rows


def broken(tmp_path: Path) -> Path:
    """Lines 3 to 9 are bad, 2 and 10 are good."""
    clip(tmp_path / "a.wav")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("this is text")
    (tmp_path / "cut.wav").write_bytes(clip_bytes("WAV")[:-4000])
    (tmp_path / "cut.flac").write_bytes(clip_bytes("FLAC")[:-2000])
    (tmp_path / "none.wav").write_bytes(clip_bytes("WAV", 0))
    names = ("a.wav", "missing.wav", "empty.wav", "text.wav", "cut.wav", "cut.flac", "none.wav", "", "a.wav")
    return table(tmp_path / "t.csv", "audio,text", *(f"{name},x" for name in names))


def test_bad_audio_fails_with_line_numbers(tmp_path: Path) -> None:
    message = refused(broken(tmp_path), tmp_path / "out")
    for line, word in ((3, "no such file"), (4, "empty"), (5, "not audio"), (6, "cut short"), (7, "cut.flac")):
        assert re.search(rf"bad: line {line}: .*{re.escape(word)}", message), line
    assert "line 8" not in message
    assert "7 of 9 rows cannot be used, the first 5 are listed above" in message
    assert "--skip-bad" in message


def test_bad_audio_skipped_is_all_reported(tmp_path: Path) -> None:
    output = command(import_data.main, broken(tmp_path), "--out", tmp_path / "out", "--skip-bad")
    assert re.findall(r"skipped: line (\d+)", output) == list("3456789")
    assert "skipped 7 of 9 rows" in output
    utterances = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert [u.id for u in utterances] == ["out/0", "out/8"]  # numbers of the rows


def test_bad_rows_of_a_data_set(tmp_path: Path) -> None:
    rows = own_rows(tmp_path)
    rows[1]["audio"]["bytes"] = b"not audio"
    rows[4]["audio"] = None
    Dataset.from_list(rows).to_parquet(str(tmp_path / "t.parquet"))
    message = refused(tmp_path / "t.parquet", tmp_path / "out")
    assert "bad: train[1]" in message
    assert "bad: train[4]: names no audio" in message
    assert "2 of 5 rows cannot be used, listed above" in message
    command(import_data.main, tmp_path / "t.parquet", "--out", tmp_path / "out", "--skip-bad")
    assert len(Item(read_manifest(tmp_path / "out" / "manifest.jsonl")[0], tmp_path / "out").wav(RATE)[0]) == RATE // 2


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("t.csv", ("audio,text", "a.wav"), "line 2: 1 cells, the header has 2"),
        ("t.tsv", ("audio\ttext", "", "a.wav\tb\tc"), "line 3: 3 cells, the header has 2"),
        ("t.csv", ("audio,text", 'a.wav,"two', 'lines"', "a.wav"), "line 4: 1 cells, the header has 2"),
        ("t.csv", ("audio,split", "a.wav,other"), "line 2: its split is 'other'"),
        ("t.jsonl", ('{"audio": 3}',), "line 1: int is no path of an audio file"),
        ("t.jsonl", ('{"audio": "a.wav", "slots": [1]}',), "line 1: slots"),
        ("t.jsonl", ('{"audio": "a.wav", "segments": [{"start": 3, "end": 2}]}',), "line 1: segm"),
        ("t.jsonl", ('{"audio": "a.wav", "segments": "a-b"}',), "line 1: segments are a list of objects"),
        (
            "t.jsonl",
            ('{"audio": "a.wav", "start": 0.1, "segments": [{"start": 0.2, "end": 0.4, "text": "yes"}]}',),
            "line 1: segments do not go with the start and end of an excerpt",
        ),
        ("t.jsonl", ('{"audio": "a.wav", "text": ["a"]}',), "line 1: its text is of type list, and must be text"),
        ("t.jsonl", ('{"audio": "a.wav", "speaker": {"name": "x"}}',), "line 1: its speaker is of type dict"),
        ("t.jsonl", ('{"audio": "a.wav", "translation": "hallo"}',), "line 1: translations are an object of language"),
        ("t.jsonl", ('{"audio": "a.wav", "translation": {"de": ["x"]}}',), "line 1: its translation to de is of type"),
        ("t.jsonl", ('{"audio": "a.wav", "translation": {"xx": "y"}}',), "line 1: language 'xx' is none that is known"),
        ("t.csv", ("audio,language", "a.wav,en", "a.wav,Enlgish"), "line 3: language 'Enlgish' is none that is known"),
        ("t.csv", ("audio,id", "a.wav,x", "a.wav,y", "a.wav,x"), "line 4: id 'x' is that of line 2 too"),
        (
            "t.csv",
            ("audio,id", "a.wav,x", "a.wav,"),
            "line 3: has no id; give it one, or number all rows by --columns id=",
        ),
        (
            "t.csv",
            ("audio,start,end", "a.wav,0.1,0.9"),
            "line 2: start 0.1 and end 0.9 (seconds) are not within the 0.5 s",
        ),
        ("t.csv", ("audio,start,end", "a.wav,0.3,0.2"), "line 2: start 0.3 and end 0.2 (seconds) are not within"),
        ("t.csv", ("audio,start,end", "a.wav,-0.3,0.2"), "line 2: start -0.3 and end 0.2 (seconds) are not within"),
        (
            "t.csv",
            ("audio,start,end", "a.wav,0:01,"),
            "line 2: its start is '0:01', and must be in seconds; if it is no",
        ),
        ("t.jsonl", ('{"audio": {"array": [0.1]}}',), "line 1: holds samples without a sampling_rate"),
        ("t.jsonl", ('{"audio": {"array": [], "sampling_rate": 16000}}',), "line 1: holds 0 samples"),
    ],
)
def test_bad_rows(tmp_path: Path, name: str, lines: tuple[str, ...], message: str) -> None:
    clip(tmp_path / "a.wav")
    output = refused(table(tmp_path / name, *lines), tmp_path / "out")
    assert f"bad: {message}" in output
    assert "1 of " in output
    if "1 of 1 rows" in output:
        assert "no row can be used" in refused(tmp_path / name, tmp_path / "out", "--skip-bad")


# What is wrong with the whole


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "its first line must name the columns"),
        ("t.csv", b"audio,text\n", "holds no rows"),
        ("t.jsonl", b"\n", "holds no rows"),
        (
            "t.csv",
            b"speech,words\na.wav,x\n",
            "no column of audio found; name it by --columns audio=NAME; there are: s",
        ),
        ("t.jsonl", b'{"words": "x"}\n{"mood": "y"}\n', "there are: words, mood"),
        ("t.csv", b"audio,text,text\na.wav,x,y\n", "two columns are named 'text'"),
        ("t.csv", b'audio,text\na.wav,x\na.wav,"x\na.wav,y\n', "line 3: not a valid row"),
        ("t.csv", "audio,text\na.wav,žluť\n".encode("cp1250"), "not a UTF-8 text file; save it as UTF-8"),
        ("t.tsv", "audio\ttext\na.wav\tx\n".encode("utf-16"), "not a UTF-8 text file"),
        ("t.jsonl", b'{"audio": "a.wav"}\n{"audio"\n', "line 2: not JSON"),
        ("t.jsonl", b"[]\n", "line 1: a JSON object is expected"),
        ("t.csv", b'"audio";"text"\na.wav;"x"\n', "are separated by commas, and its first line has semicolons instead"),
        ("t.csv", b"audio|text\na.wav|x\n", "first line has bars instead; save it with commas as .csv, or with tabs"),
        ("t.csv", b"audio\ttext\na.wav\tx\n", "are separated by commas, and its first line has tabs instead"),
        ("t.tsv", b"audio,text\na.wav,x\n", "of a .tsv file are separated by tabs, and its first line has commas"),
        (
            "t.csv",
            b"audio,translation_de,translation.German\na.wav,x,y\n",
            "'translation_de' and 'translation.German' are both translations to de: leave one out by --columns",
        ),
        ("t.xlsx", b"PK", "give a .csv, .tsv, .jsonl or .parquet file"),
        ("t.parquet", b"PK", "cannot be opened as a data set"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    clip(tmp_path / "a.wav")
    (tmp_path / name).write_bytes(content)
    output = refused(tmp_path / name, tmp_path / "out")
    assert message in output.replace(".jsonl, .parquet", ".jsonl or .parquet")
    assert name in output


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}/gone.csv", "gone.csv: no such file"),
        ("{}/gone", "no such file or folder"),
        ("{}/gone.parquet", "no such file or folder"),
        ("{}/empty", "cannot be opened as a data set"),
        ("nobody/no-such-set", "no such file or folder, and the hub does not give it"),
    ],
)
def test_sources_that_are_not_there(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    assert message in refused(source.format(tmp_path), tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--columns", "text"), "--columns text: write it as NAME=COLUMN"),
        (("--columns", "text=words"), "--columns text=words: no such column in"),
        (("--columns", "text=words"), "there are: audio, text, speaker"),
        (("--columns", "text=text,text=audio"), "--columns: text is given twice"),
        (("--columns", "audio="), "no column of audio found"),
        (("--columns", "mood="), "--columns mood=: no column mood in"),
        (("--language", "xx"), "error: --language 'xx' is none that is known: give its ISO 639 code"),
        (("--held-out", "1"), "--held-out 1: give a share between 0 and 1"),
        (("--held-out", "0.5"), "--held-out: there is one speaker only: add --columns speaker="),
        (("--held-out", "0.5", "--columns", "speaker="), "--held-out: there is one sentence only"),
        (("--held-out", "0.5", "--split", "test"), "these rows are in test"),
        (("--hub-split", "train"), "--config and --hub-split are for data sets"),
        (("--config", "en"), "--config and --hub-split are for data sets"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    clip(tmp_path / "a.wav")
    source = table(tmp_path / "t.csv", "audio,text,speaker", "a.wav,x,s", "a.wav,x,s")
    assert message in refused(source, tmp_path / "out", *options)


def test_splits_of_their_own_are_not_overruled(tmp_path: Path) -> None:
    clip(tmp_path / "a.wav")
    source = table(tmp_path / "t.csv", "audio,split", "a.wav,test")
    assert "--split: column 'split' has the splits" in refused(source, tmp_path / "out", "--split", "train")
    assert "--held-out: column 'split' has" in refused(source, tmp_path / "out", "--held-out", "0.1")
    (utterance,) = imported(source, tmp_path / "out", "--columns", "split=", "--split", "train")
    assert (utterance.labels, utterance.split) == ({}, "train")
    data = Dataset.from_list([{"audio": str(tmp_path / "a.wav")}])
    DatasetDict({"train": data, "test": data, "odd": data}).save_to_disk(tmp_path / "odd")
    assert "split 'odd' is none of train" in refused(tmp_path / "odd", tmp_path / "out2")
    assert "--hub-split no: " in refused(tmp_path / "odd", tmp_path / "out2", "--hub-split", "no")
    assert "no configurations" in refused(tmp_path / "odd", tmp_path / "out2", "--config", "en")
    DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "two")
    assert "has the splits train, test" in refused(tmp_path / "two", tmp_path / "out2", "--split", "train")
    (utterance,) = imported(tmp_path / "odd", tmp_path / "out2", "--hub-split", "odd", "--split", "dev")
    assert utterance.split == "dev"


def test_what_is_there_is_never_replaced(tmp_path: Path) -> None:
    clip(tmp_path / "a.wav")
    source = table(tmp_path / "t.csv", "audio", "a.wav")
    imported(source, tmp_path / "out")
    assert "manifest.jsonl: is there already; give another --out" in refused(source, tmp_path / "out")
    Dataset.from_list(own_rows(tmp_path)).to_parquet(str(tmp_path / "t.parquet"))
    clip(tmp_path / "mine" / "audio" / "x.wav")
    message = refused(tmp_path / "t.parquet", tmp_path / "mine")
    assert "audio: cannot be written (it is there already); give another --out" in message
    assert "cannot be written" in refused(source, tmp_path / "t.csv" / "out")


def test_interrupted_leaves_nothing(tmp_path: Path) -> None:
    clip(tmp_path / "a.wav")
    source = table(tmp_path / "t.csv", "audio", "gone.wav", *["a.wav"] * 60_000)
    arguments = [sys.executable, "-m", "train.import_data", str(source), "--out", str(tmp_path / "out"), "--skip-bad"]
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "skipped: line 2" in line:
            break
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert "stopped; nothing was written" in rest
    assert "Traceback" not in rest
    assert list((tmp_path / "out").iterdir()) == []
