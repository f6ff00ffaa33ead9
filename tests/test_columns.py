"""Which column of a user's table is what: by its name, as told, or not at all."""

import json
from pathlib import Path

import pytest
from conftest import clip, command, imported, table
from typer import Typer
from typer.testing import CliRunner

from speechllm.data.manifest import read_manifest
from train import import_data

NAMED = ("translation", "translations")


def test_columns_as_told(tmp_path: Path) -> None:
    clip(tmp_path / "a.wav")
    source = table(tmp_path / "t.csv", "id,text,said,who,mood,file", "x,no,yes,me,sad,a.wav")
    options = ("--columns", "text=said, speaker=who,emotion=mood,word=id,gender=")
    (utterance,) = imported(source, tmp_path / "out", *options, "--split", "test")
    assert (utterance.text, utterance.speaker, utterance.split) == ("yes", "me", "test")
    assert utterance.labels == {"emotion": "sad", "word": "x", "text": "no"}


def test_an_end_without_a_start_is_refused(tmp_path: Path) -> None:
    clip(tmp_path / "a.wav")
    source = table(tmp_path / "t.csv", "audio,len", "a.wav,0.5")
    app = Typer()
    app.command()(import_data.main)
    options = ["--columns", "duration=len", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [str(source), *options])
    assert done.exit_code == 2
    assert "--columns duration=: tells the end of an excerpt that has a start" in done.output


def test_columns_that_are_not_wanted(tmp_path: Path) -> None:
    clip(tmp_path / "a.wav")
    source = table(
        tmp_path / "t.csv",
        "file,text,Gender,sex,mood,age,duration,sample_rate",
        "a.wav,yes,male,female,sad,9,0.5,16000",
    )
    result = command(import_data.main, source, "--out", tmp_path / "out", "--columns", "gender=,mood=")
    (utterance,) = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert (utterance.text, utterance.gender, utterance.labels) == ("yes", None, {"age": "9"})
    lines = result.splitlines()
    assert "not used: Gender, sex, mood" in lines
    assert "not used, as the audio itself tells it: duration, sample_rate" in lines
    assert "label age <- age" in lines


def test_ids_of_their_own(tmp_path: Path) -> None:
    clip(tmp_path / "a.wav")
    source = table(tmp_path / "t.jsonl", *(json.dumps({"id": name, "audio": "a.wav"}) for name in ("u-1", 7, 8.0)))
    utterances = imported(source, tmp_path / "set")
    assert [u.id for u in utterances] == ["set/u-1", "set/7", "set/8"]
    assert all(u.labels == {} for u in utterances)
    numbered = imported(source, tmp_path / "numbers", "--columns", "id=")
    assert [(u.id, u.labels) for u in numbered] == [(f"numbers/{n}", {}) for n in range(3)]


def test_translations(tmp_path: Path) -> None:
    clip(tmp_path / "a.wav")
    wanted = {"de": "hallo", "fr": "salut", "cs": "ahoj"}
    header = "audio,text,translation_de,Translation.French,czech,translation_quality"
    source = table(tmp_path / "t.csv", header, "a.wav,hi,hallo,salut,ahoj,good", "a.wav,bye,,,,")
    first, second = imported(source, tmp_path / "csv", "--columns", "translation_cs=czech")
    assert (first.translations, first.labels) == (wanted, {"translation_quality": "good"})
    assert (second.translations, second.labels) == ({}, {})
    rows = [{"audio": "a.wav", name: {"de": "hallo", "French": "salut", "cs": "ahoj", "en": None}} for name in NAMED]
    for name, row in zip(NAMED, rows, strict=True):
        (utterance,) = imported(table(tmp_path / f"{name}.jsonl", json.dumps(row)), tmp_path / name)
        assert (utterance.translations, utterance.labels) == (wanted, {})
    both = table(tmp_path / "both.jsonl", json.dumps(rows[0] | {"translation_it": "ciao"}))
    (utterance,) = imported(both, tmp_path / "both")
    assert utterance.translations == wanted | {"it": "ciao"}


@pytest.mark.parametrize(
    ("name", "code"),
    [
        *((name, "en") for name in ("eng", "English", "EN", "en-US")),
        *((name, "zh") for name in ("cmn", "Mandarin", "Chinese", "zh-TW")),
        *((name, "de") for name in ("german", "deu", "ger", "de_DE")),
        ("mdw", "mdw"),
        ("x-griko", "x-griko"),
    ],
)
def test_languages_have_one_name(tmp_path: Path, name: str, code: str) -> None:
    clip(tmp_path / "a.wav")
    source = table(tmp_path / "t.csv", "audio,text,language", f"a.wav,x,{name}", "a.wav,x,")
    assert [u.language for u in imported(source, tmp_path / "out", "--language", name)] == [code, code]


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    clip(tmp_path / "a.wav")
    rows = ("a.wav,x,test,1,sad", "a.wav,,,2,unhinged", "a.wav,y,,3,Anger")
    source = table(tmp_path / "t.csv", "audio,text,split,note,emotion", *rows)
    lines = command(import_data.main, source, "--out", tmp_path / "out").splitlines()
    assert [u.split for u in read_manifest(tmp_path / "out" / "manifest.jsonl")] == ["test", "train", "train"]
    assert "2 without a split: taken as train" in lines
    assert "3 of 3 without a language: give one by --language, for instance en" in lines
    (moody,) = (line for line in lines if "emotion that is none of" in line)
    assert moody.startswith("1 of 3 with an emotion that is none of angry, bored, ")
    assert "1 of 3 without a text: no task of words is trained on them (--columns text=NAME)" in lines
    assert f"{tmp_path / 'out' / 'manifest.jsonl'}: 1 test, 2 train; 1.5 s, no speakers named" in lines
