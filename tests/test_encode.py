"""Rows of an encoded corpus: what is known of a recording stays true of its varied versions."""

import math
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import TEXT_MODEL

from speechllm.audio import write_audio
from speechllm.codec import load_codec
from speechllm.data.corpus import Item
from speechllm.data.encoded import copy_id, is_varied, read_encoded, row_codes, row_facts, stretched
from speechllm.data.manifest import Utterance, write_manifest
from speechllm.data.mixture import Draw, Mixture
from speechllm.errors import InputError
from speechllm.tasks import Facts, Segment
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train import encode
from train.encode import encode_corpus, encode_row

RATE = 16000


def test_stretched_moves_all_times_and_nothing_else() -> None:
    segments = (Segment("ann", 0.5, 1.0, "hi"), Segment("ben", 1.5, 2.0))
    facts = Facts(4.0, "hi", "en", "female", {"de": "Ja"}, segments, "greet", {"who": "ben"}, {"accent": "Dutch"})
    slow = stretched(facts, 1.5)
    assert slow.duration == 6.0
    assert slow.segments == (Segment("ann", 0.75, 1.5, "hi"), Segment("ben", 2.25, 3.0))
    assert stretched(slow, 1 / 1.5) == facts
    assert stretched(Facts(2.0), 0.5) == Facts(1.0)


def test_a_text_alone_has_no_frames(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """And teaches tasks on text alone."""
    known = {"text": "Yes.", "language": "en", "translations": {"de": "Ja."}, "split": "train", "source": "set"}
    spoken = known | {"id": "set/0", "audio": "a.wav", "duration": 2.0, "speaker": "ann"}
    write_audio(tmp_path / "a.wav", 0.3 * torch.randn(1, 2 * RATE, generator=torch.Generator().manual_seed(0)), RATE)
    write_manifest(tmp_path / "m.jsonl", [Utterance(**spoken), Utterance(id="set/1", **known)])
    encode_corpus(tmp_path / "m.jsonl", tiny_checkpoint / "codec", tmp_path / "codes", n_q=2, copies=3, jobs=1)
    rows = read_encoded([tmp_path / "codes"], "train")
    assert rows["id"] == ["set/0", "set/0#1", "set/0#2", "set/1"]
    assert row_codes(rows[3], 2).shape == (2, 0) and row_facts(rows[3]).translations == {"de": "Ja."}

    text = TextTokenizer.load(TEXT_MODEL)
    tasks = ["transcribe", "translate_text_de", "translate_de", "language", "few_shot_language", "few_shot_text"]
    mixture = Mixture({"set": rows}, Vocabulary(text.size, 2, 512), text, tasks)
    taught = {task: {row for pool in pools.values() for row in pool.rows} for task, pools in mixture.pools.items()}
    heard = {0, 1, 2}
    assert taught == {"transcribe": heard, "translate_text_de": heard | {3}, "translate_de": heard, "language": heard}
    batch = mixture.batch([Draw("translate_text_de", 3), Draw("transcribe", 0)], 1, Random(0))
    assert sorted(batch.audio_lengths.tolist()) == [1, 2 * 50 + 1]


@pytest.mark.parametrize("jobs", [1, 2])
def test_goes_on_where_it_was(
    jobs: int, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "SHARD", 2)
    codec, out = tiny_checkpoint / "codec", tmp_path / "codes"
    utterances = []
    for number in range(5):
        generator = torch.Generator().manual_seed(number)
        write_audio(tmp_path / f"{number}.wav", 0.3 * torch.randn(1, RATE, generator=generator), RATE)
        known = {"id": f"set/{number}", "audio": f"{number}.wav", "duration": 1.0, "split": "train", "source": "set"}
        utterances.append(Utterance.model_validate(known))
    write_manifest(tmp_path / "m.jsonl", utterances)

    def encoded(copies: int = 1) -> int:
        return encode_corpus(tmp_path / "m.jsonl", codec, out, n_q=1, copies=copies, jobs=jobs)

    assert encoded() == 5
    whole = read_encoded([out], "train")["codes"]
    (out / "00001.parquet").unlink()
    with pytest.raises(InputError, match=r"2 of 3 shards are there"):
        read_encoded([out], "train")
    assert encoded() == 2
    assert encoded() == 0
    assert read_encoded([out], "train")["codes"] == whole
    with pytest.raises(InputError, match=r"holds other codes"):
        encoded(copies=2)
    write_manifest(tmp_path / "m.jsonl", utterances[:4])
    with pytest.raises(InputError, match=r"holds other codes"):
        encoded()


def test_what_cannot_be_encoded_is_one_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    codec, out = tiny_checkpoint / "codec", tmp_path / "codes"
    write_manifest(tmp_path / "m.jsonl", [])
    with pytest.raises(InputError, match=r"m\.jsonl: holds no utterance"):
        encode_corpus(tmp_path / "m.jsonl", codec, out, n_q=1, copies=1, jobs=1)
    write_manifest(tmp_path / "m.jsonl", [Utterance(id="a", text="Yes.", language="en", split="train", source="set")])
    out.mkdir()
    (out / "data.parquet").write_bytes(b"somebody's")
    with pytest.raises(InputError, match=r"holds other codes"):
        encode_corpus(tmp_path / "m.jsonl", codec, out, n_q=1, copies=1, jobs=1)


def test_a_duration_that_is_not_the_audios_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    codec = load_codec(tiny_checkpoint / "codec")
    write_audio(tmp_path / "a.wav", 0.3 * torch.randn(1, 2 * RATE, generator=torch.Generator().manual_seed(0)), RATE)
    known = {"id": "set/0", "audio": "a.wav", "split": "train", "source": "set"}
    near, far = (Item(Utterance.model_validate(known | {"duration": s}), tmp_path) for s in (2.3, 1.4))
    assert row_facts(encode_row(codec, near, 1, 0)).duration == 2.0, "the audio's own is kept"
    with pytest.raises(InputError, match=r"set/0: 2.00 s of audio, but its manifest says 1.4 s: correct that"):
        encode_row(codec, far, 1, 0)


def test_an_id_that_looks_like_a_copys_is_none() -> None:
    for name, copy, varied in (("a", 0, False), ("a", 2, True), ("a#2", 0, False), ("a#2", 1, True), ("a#0", 0, False)):
        assert is_varied({"id": copy_id(name, copy)}) == varied
    assert len({copy_id(name, copy) for name in ("a", "a#1", "a#2") for copy in range(3)}) == 9


def test_copies_are_stretched_as_their_sound_is(tiny_checkpoint: Path, tmp_path: Path) -> None:
    codec = load_codec(tiny_checkpoint / "codec")
    write_audio(tmp_path / "a.wav", 0.3 * torch.randn(1, 2 * RATE, generator=torch.Generator().manual_seed(0)), RATE)
    known = {"id": "set/0", "audio": "a.wav", "duration": 2.0, "split": "train", "source": "set", "speaker": "ann"}
    segment = {"speaker": "ann", "start": 0.5, "end": 1.5, "text": "hi"}
    item = Item(Utterance.model_validate(known | {"text": "hi", "segments": [segment]}), tmp_path)
    plain, *copies = (encode_row(codec, item, 1, copy) for copy in range(9))
    assert row_facts(plain) == item.utterance.facts()
    assert (plain["codes"] == codec.encode(item.wav(RATE), n_q=1).flatten().numpy()).all()
    assert [row["id"] for row in copies] == [f"set/0#{copy}" for copy in range(1, 9)]
    factors = set()
    for row in copies:
        facts = row_facts(row)
        factors.add(factor := facts.duration / 2.0)
        assert len(row["codes"]) == math.ceil(round(facts.duration * codec.frame_rate, 3))
        assert (facts.segments[0].start, facts.segments[0].end) == pytest.approx((0.5 * factor, 1.5 * factor))
        assert (facts.text, row["split"], row["speaker"]) == ("hi", "train", "ann")
    assert len(factors) > 2, "some copies are faster or slower"
    again = encode_row(codec, item, 1, 3)
    assert (again["codes"] == copies[2]["codes"]).all() and again["facts"] == copies[2]["facts"]
