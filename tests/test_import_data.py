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
from conftest import ROOT, command, filled
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Value
from typer import Typer
from typer.testing import CliRunner

from speechllm.codec import SpeechCodec, SpeechCodecConfig, save_codec
from speechllm.data.corpus import Item, read_corpus
from speechllm.data.encoded import read_encoded, row_facts
from speechllm.data.manifest import Utterance, load_wav, read_manifest
from speechllm.data.sources import audio_seconds
from speechllm.tasks import Segment
from train import encode, import_data

RATE = 16000


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing goes to the user's cache, nothing to the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def tone(seconds: float = 0.5, hertz: float = 300.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def clip(path: Path, seconds: float = 0.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds), RATE)
    return path


@cache  # Ogg files carry a random number
def clip_bytes(container: str, seconds: float = 0.5, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tone(seconds), RATE, format=container, subtype=subtype)
    return file.getvalue()


def table(path: Path, *lines: str, encoding: str = "utf-8", newline: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + newline for line in lines).encode(encoding))
    return path


def imported(source: object, out: Path, *options: object) -> list[Utterance]:
    """Import, and read the result as everything else does, each utterance with its audio."""
    command(import_data.main, source, "--out", out, *options)
    items = [i for split in ("train", "dev", "test") for i in read_corpus([out / "manifest.jsonl"], split, True)]  # type: ignore[arg-type]
    utterances = read_manifest(out / "manifest.jsonl")
    assert sorted(item.utterance.id for item in items) == sorted(u.id for u in utterances)
    for utterance in utterances:
        wav = load_wav(utterance, out, RATE)
        assert abs(wav.shape[1] / RATE - utterance.duration) < 0.1
        assert wav.abs().max() > 0.1
    assert not list(out.glob("*.new"))
    return utterances


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
        | {"slots": {"size": "big", "milk": None}, "translations": {"de": "hallo"}, "language": "griko"},
    ]
    source = table(tmp_path / "t.jsonl", *(json.dumps(row) for row in rows))
    result = command(import_data.main, source, "--out", tmp_path / "out")
    assert "tags" in result.partition("not used")[2]
    assert "1 with an empty text: taken as audio without speech" in result
    first, second = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert (first.text, first.speaker, first.labels) == ("", "7", {"digit": 3, "noisy": 1, "score": 0.5})
    assert second.segments == (Segment(None, 0.1, 0.4, "hi"),)
    assert (second.slots, second.translations, second.language) == ({"size": "big"}, {"de": "hallo"}, "griko")
    assert (second.gender, second.labels, second.audio) == (None, {"gender": "other"}, "../a.ogg")


def test_columns_as_told(tmp_path: Path) -> None:
    clip(tmp_path / "a.wav")
    source = table(tmp_path / "t.csv", "id,text,said,who,mood,file", "x,no,yes,me,sad,a.wav")
    options = ("--columns", "text=said, speaker=who,emotion=mood,word=id,gender=")
    (utterance,) = imported(source, tmp_path / "out", *options, "--split", "test")
    assert (utterance.text, utterance.speaker, utterance.split) == ("yes", "me", "test")
    assert utterance.labels == {"emotion": "sad", "word": "x", "text": "no"}


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


@pytest.mark.parametrize(("named", "share", "held"), [("speaker", 0.1, 2), ("speaker", 0.9, 18), ("text", 0.01, 1)])
def test_held_out(tmp_path: Path, named: str, share: float, held: int) -> None:
    clip(tmp_path / "a.wav")
    lines = [f"a.wav,{n % 20}" for n in range(60)]
    for name, order in (("one", lines), ("two", lines[::-1])):
        table(tmp_path / f"{name}.csv", f"audio,{named}", *order)
    dev = []
    for name in ("one", "two"):
        command(import_data.main, tmp_path / f"{name}.csv", "--out", tmp_path / name, "--held-out", share)
        utterances = read_manifest(tmp_path / name / "manifest.jsonl")
        groups = {split: {getattr(u, named) for u in utterances if u.split == split} for split in ("train", "dev")}
        assert len(groups["dev"]) == held
        assert not groups["dev"] & groups["train"]
        assert len(groups["train"]) == 20 - held
        dev.append(groups["dev"])
    assert dev[0] == dev[1]  # whatever the order


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
        ("t.csv", ("audio,split", "a.wav,"), "line 2: its split is None"),
        ("t.jsonl", ('{"audio": 3}',), "line 1: int is no path of an audio file"),
        ("t.jsonl", ('{"audio": "a.wav", "slots": [1]}',), "line 1: slots"),
        ("t.jsonl", ('{"audio": "a.wav", "segments": [{"start": 3, "end": 2}]}',), "line 1: record: Value error, segm"),
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
    assert utterance.labels == {"split": "test"}
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
