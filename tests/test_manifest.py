"""Manifests and the readers of recorded sets and captions."""

import gzip
import json
import tarfile
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import table

from speechllm.data.corpus import Item, read_corpus, read_utterances
from speechllm.data.manifest import Utterance, append, load_wav, read_manifest, write_manifest
from speechllm.data.recorded import Sentence, read_recorded, read_sentences
from speechllm.errors import InputError
from speechllm.tasks import Segment

RATE = 16000


def utterance(**changes: object) -> Utterance:
    values = {"id": "set/0", "audio": "a.flac", "duration": 1.0, "split": "train", "source": "set"}
    return Utterance.model_validate(values | changes)


def write_tone(path: Path, hertz: float) -> torch.Tensor:
    wav = 0.3 * torch.sin(2 * torch.pi * hertz * torch.arange(RATE // 2) / RATE)[None]  # [1, samples]
    soundfile.write(path, wav[0].numpy(), RATE)
    return wav


def test_manifest_round_trip(tmp_path: Path) -> None:
    first = utterance(text="žluťoučký", translations={"de": "gelb"}, labels={"digit": 3, "snr_db": 12.5, "kind": "x"})
    second = utterance(id="set/1", gender="female", language="en")
    write_manifest(tmp_path / "m.jsonl", [first])
    append(tmp_path / "m.jsonl", second)
    assert read_manifest(tmp_path / "m.jsonl") == [first, second]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "object is expected"),
        ('{"id": "b", "audio": "b", "duration": 1, "split": "train", "source": "s", "mood": 1}', "mood"),
        ('{"id": "b", "audio": "b", "duration": -1, "split": "train", "source": "s"}', "duration"),
        ('{"id": "b", "audio": "b", "duration": 0, "split": "train", "source": "s"}', "duration: is missing, or 0"),
        ('{"id": "b", "audio": "b", "text": "b", "split": "train", "source": "s"}', "duration: is missing, or 0"),
        ('{"id": "b", "duration": 1, "text": "b", "split": "train", "source": "s"}', "audio: is missing"),
        (
            '{"id": "b", "text": "b", "tar": "t", "tar_offset": 0, "tar_size": 9, "split": "train", "source": "s"}',
            "audio: is missing",
        ),
        (
            '{"id": "b", "text": "b", "segments": [{"speaker": null, "start": 0, "end": 0.05}], "split": "train", '
            '"source": "s"}',
            "audio: is missing",
        ),
        ('{"id": "b", "split": "train", "source": "s"}', "audio and duration are missing, and there is no text"),
        ('{"id": "b", "audio": "b", "tar": "t", "duration": 1, "split": "train", "source": "s"}', "go together"),
        ('{"id": "set/0", "audio": "b", "duration": 1, "split": "train", "source": "s"}', "already on line 1"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "m.jsonl"
    write_manifest(path, [utterance()])
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(InputError, match=message) as caught:
        read_manifest(path)
    assert f"{path}, line 3" in str(caught.value)


def test_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        read_manifest(tmp_path / "nowhere.jsonl")


def test_a_text_alone_has_no_audio(tmp_path: Path) -> None:
    written = Utterance(id="set/1", text="Yes.", translations={"de": "Ja."}, split="train", source="set")
    write_manifest(tmp_path / "m.jsonl", [utterance(), written])
    assert read_manifest(tmp_path / "m.jsonl") == [utterance(), written]
    line = json.loads((tmp_path / "m.jsonl").read_text().splitlines()[1])
    assert line.keys() == {"id", "text", "translations", "split", "source"}
    assert [item.utterance.id for item in read_corpus([tmp_path / "m.jsonl"], "train")] == [utterance().id]
    assert len(read_corpus([tmp_path / "m.jsonl"], "train", texts=True)) == 2
    with pytest.raises(InputError, match=r"set/1: is a text alone, and audio is needed here"):
        load_wav(written, tmp_path, RATE)


@pytest.mark.parametrize("times", [[(1, 0.5)], [(0.5, 0.5)], [(0, 2)], [(0.4, 0.5), (0.3, 0.6)], [(-1, 0.5)]])
def test_segments_that_cannot_be(times: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="segment"):
        utterance(duration=1.0, segments=[{"speaker": None, "start": a, "end": b} for a, b in times])


def test_segments_and_slots_survive_the_file(tmp_path: Path) -> None:
    segments = (Segment(None, 0, 0.4, "hi"), Segment("b", 0.2, 0.5))
    whole = utterance(segments=segments, intent="order", slots={"size": "big"})
    write_manifest(tmp_path / "m.jsonl", [whole])
    assert read_manifest(tmp_path / "m.jsonl") == [whole]


def test_load_wav_from_path_and_from_tar(tmp_path: Path) -> None:
    tones = {name: write_tone(tmp_path / name, hertz) for name, hertz in (("a.flac", 300), ("b.flac", 700))}
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in tones:
            tar.add(tmp_path / name, arcname=name)
    with tarfile.open(tmp_path / "t.tar") as tar:
        places = {member.name: {"tar_offset": member.offset_data, "tar_size": member.size} for member in tar}
    for name, tone in tones.items():
        plain = load_wav(utterance(audio=name), tmp_path, RATE)
        packed = load_wav(utterance(audio=name, tar="t.tar", **places[name]), tmp_path, RATE)
        assert plain.shape == (1, RATE // 2)
        assert torch.equal(plain, packed)
        torch.testing.assert_close(plain, tone, atol=1e-4, rtol=0)
    beyond = utterance(tar="t.tar", tar_offset=10**6, tar_size=100)
    with pytest.raises(InputError, match=r"t\.tar: ends before"):
        load_wav(beyond, tmp_path, RATE)
    with pytest.raises(InputError, match=r"t\.tar, member a\.flac"):
        load_wav(utterance(tar="t.tar", tar_offset=0, tar_size=100), tmp_path, RATE)


def test_read_recorded_maps_a_sets_own_keys(tmp_path: Path) -> None:
    folder = tmp_path / "some_set"
    folder.mkdir()
    lines = [
        {"audio": "0.opus", "tar": "dev.tar", "tar_offset": 512, "tar_size": 9, "duration": 0.3, "text": "zero"}
        | {"language": "en", "speaker": "s1", "gender": "male", "digit": 0, "split": "dev"},
        {"audio": "1.opus", "duration": 2, "text": None, "translation": {"en": "hi"}, "gender": "prefer not to say"}
        | {"intent": "order", "slots": {"size": "big"}, "complete": True, "source": "a site", "split": "train"}
        | {"segments": [{"speaker": "a", "start": 0, "end": 1.5}, {"start": 1, "end": 2}], "noise": ["dog"]},
    ]
    (folder / "manifest.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    digit, command = read_recorded(folder / "manifest.jsonl")
    assert (digit.id, digit.source, digit.split, digit.gender) == ("some_set/0.opus", "some_set", "dev", "male")
    assert (digit.tar, digit.tar_offset, digit.tar_size, digit.labels) == ("dev.tar", 512, 9, {"digit": 0})
    assert command.translations == {"en": "hi"}
    assert command.gender is None
    assert command.source == "some_set"
    assert (command.intent, command.slots) == ("order", {"size": "big"})
    assert command.segments == (Segment("a", 0, 1.5), Segment(None, 1, 2))
    assert json.loads(str(command.labels["noise"])) == ["dog"]
    assert command.labels["complete"] == 1
    assert command.labels["source"] == "a site"
    assert command.labels["gender"] == "prefer not to say"


def test_a_folder_and_its_manifest_are_the_same_in_either_schema(tmp_path: Path) -> None:
    ours, recorded = tmp_path / "ours", tmp_path / "recorded"
    for folder in (ours, recorded):
        folder.mkdir()
    whole = utterance(id="x", labels={"emotion": "anger"}, translations={"de": "gelb"}, text="yellow")
    second = utterance(id="y", text="green", labels={"digit": 3})  # of the same file
    write_manifest(ours / "manifest.jsonl", [whole, second])
    (recorded / "manifest.jsonl").write_text('{"audio": "a.flac", "duration": 1, "split": "dev", "emotion": "anger"}\n')
    assert read_utterances(ours) == read_utterances(ours / "manifest.jsonl") == [whole, second]
    (flat,) = read_utterances(recorded)
    assert (flat.id, flat.source, flat.labels) == ("recorded/a.flac", "recorded", {"emotion": "anger"})
    assert read_utterances(recorded / "manifest.jsonl") == [flat]
    assert read_corpus([ours, recorded / "manifest.jsonl"], "train") == [Item(whole, ours), Item(second, ours)]
    assert read_corpus([ours / "manifest.jsonl", recorded], "dev") == [Item(flat, recorded)]
    (ours / "manifest.jsonl").write_text("")
    assert read_utterances(ours) == []
    (ours / "manifest.jsonl").unlink()
    with pytest.raises(InputError, match=r"ours: no manifest\.jsonl in this folder"):
        read_utterances(ours)


def test_two_rows_of_a_recorded_set_cannot_name_one_file(tmp_path: Path) -> None:
    line = '{"audio": "a.flac", "duration": 1, "split": "dev"}\n'
    (tmp_path / "manifest.jsonl").write_text(line + "\n" + line)
    with pytest.raises(InputError, match=r"manifest\.jsonl, line 3: audio 'a\.flac' is already on line 1; rows of one"):
        read_utterances(tmp_path)


@pytest.mark.parametrize("packed", [True, False])
def test_sentences_of_plain_text_and_of_files_that_are_not_packed(tmp_path: Path, packed: bool) -> None:
    write = gzip.compress if packed else bytes
    end = ".gz" if packed else ""
    (tmp_path / f"a.txt{end}").write_bytes(write("Žluťoučký kůň.\n\n  Druhá věta. \n".encode()))
    spoken = read_sentences(tmp_path / f"a.txt{end}", "cs")
    assert spoken == [Sentence("1", "Žluťoučký kůň.", language="cs"), Sentence("3", "Druhá věta.", language="cs")]
    assert spoken[0].texts() == {"cs": "Žluťoučký kůň."}
    (tmp_path / f"a.jsonl{end}").write_bytes(write(b'{"id": "c0", "en": "A dog.", "de": "Ein Hund."}\n'))
    (caption,) = read_sentences(tmp_path / f"a.jsonl{end}", "de")
    assert caption.texts() == {"en": "A dog.", "de": "Ein Hund."}
    (tmp_path / f"a.txt{end}").write_bytes(write(b"\n"))
    with pytest.raises(InputError, match="holds no sentences"):
        read_sentences(tmp_path / f"a.txt{end}")
    (tmp_path / f"a.jsonl{end}").write_bytes(write("žluť".encode("cp1250")))
    with pytest.raises(InputError, match="not a UTF-8 text file; save it as UTF-8"):
        read_sentences(tmp_path / f"a.jsonl{end}")


def test_a_damaged_packed_file_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"id": "c0", "en": "A dog."}\n' * 99)
    for damaged in (whole[:-9], whole[:20] + b"xxx" + whole[23:]):
        (tmp_path / "a.jsonl.gz").write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.jsonl\.gz: a gzipped file that is damaged"):
            read_sentences(tmp_path / "a.jsonl.gz")


def test_read_sentences(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write('{"id": "c0", "en": "A dog.", "de": "Ein Hund.", "fr": "Un chien."}\n')
        file.write(
            '{"id": "s0", "text": "Coffee, and tea with milk.", "intent": "order", "slots": [{"type": "drink", '
            '"value": "Coffee"}, {"type": "extra", "value": "milk"}, {"type": "drink", "value": "tea"}]}\n'
        )
    caption, command = read_sentences(path)
    assert (caption.id, caption.text) == ("c0", "A dog.")
    assert caption.translations == {"de": "Ein Hund.", "fr": "Un chien."}
    assert (caption.intent, caption.slots) == (None, {})
    assert (command.id, command.text, command.translations) == ("s0", "Coffee, and tea with milk.", {})
    assert (command.intent, command.slots) == ("order", {"drink": "Coffee and tea", "extra": "milk"})
    plain = tmp_path / "plain.jsonl.gz"
    plain.write_text("{}")
    with pytest.raises(InputError, match=r"plain\.jsonl\.gz"):
        read_sentences(plain)


def test_a_text_that_is_not_what_is_said_is_no_fact() -> None:
    known = {"id": "a", "audio": "a.wav", "duration": 1.0, "split": "train", "source": "s", "text": "Robles"}
    plain = Utterance.model_validate(known)
    spelt = Utterance.model_validate(known | {"labels": {"text_note": "spelt letter by letter"}})
    assert (plain.facts().text, spelt.facts().text, spelt.text) == ("Robles", None, "Robles")


@pytest.mark.parametrize("key", ['"id": "b"', '"translations": {"de": "hallo"}', '"labels": {"age": "9"}'])
def test_rows_of_the_schema_without_ids_are_not_taken_for_a_recorded_sets(tmp_path: Path, key: str) -> None:
    first, second = '{"audio": "a.wav", "duration": 1, "split": "train"}', '{"audio": "b.wav", "duration": 1, '
    path = table(tmp_path / "manifest.jsonl", first, f'{second}"split": "train", {key}}}')
    with pytest.raises(InputError, match="line 2: rows like this one need ids"):
        read_utterances(path)


def test_blank_translations_are_none_and_ids_may_be_0(tmp_path: Path) -> None:
    (sentence,) = read_sentences(table(tmp_path / "s.jsonl", '{"id": 0, "en": "Hi.", "de": " ", "fr": "Salut."}'))
    assert (sentence.id, sentence.translations) == (0, {"fr": "Salut."})


def test_a_number_without_end_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest.jsonl, line 1: not JSON"):
        read_utterances(table(tmp_path / "manifest.jsonl", f'{{"id": {"9" * 5000}}}'))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "s1", "text": " "}', "line 2: a sentence needs 'id', and 'en' or 'text'"),
        ('{"id": "s1"}', "line 2: a sentence needs 'id', and 'en' or 'text'"),
        ('{"text": "Hi."}', "line 2: a sentence needs 'id'"),
        ('{"id": "s1", "text": "Hi.", "slots": [{"type": "drink"}]}', "line 2: slots are a list of objects"),
        ('{"id": "s1", "text": "Hi.", "slots": ["drink"]}', "line 2: slots are a list of objects"),
        ('{"id": "s1", "text": "Hi.", "de": 5}', "line 2: de is no text: 5"),
        ('{"id": "s1", "text": "Hi.", "intent": ["greet"]}', "line 2: intent is no text: .'greet'."),
    ],
)
def test_a_bad_sentence_is_named_by_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "s.jsonl.gz"
    path.write_bytes(gzip.compress(f'{{"id": "s0", "text": "Good."}}\n{line}\n'.encode()))
    with pytest.raises(InputError, match=rf"s\.jsonl\.gz, {message}"):
        read_sentences(path)
