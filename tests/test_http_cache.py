"""Answers given before are given again without the model; whatever an answer depends on makes it another one."""

import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from test_http import ASK, CLIP, CLIPS, GERMAN, Running, serving, told, turn

from serve.answer import Answer, Word
from serve.answerer import Answerer
from serve.http.cache import AnswerCache, weights_fingerprint
from speechllm.checkpoint import Checkpoint, load_checkpoint
from speechllm.errors import InputError
from speechllm.options import Options
from speechllm.tasks import Segment

ANSWER = Answer(
    file="a.wav",
    instruction=ASK,
    task="transcribe",
    text="ein Häuschen",
    segments=(Segment("spk1", 0.1, 1 / 3, "ein Häuschen"),),
    words=(Word("ein", 0.123456789), Word("Häuschen", 0.5, 0.1, 0.2)),
    label=None,
    slots={"object": "Haus"},
    confidence=1 / 3,
    seconds_in=2.0,
    seconds_consumed=2.0,
    finish_reason="stop",
    model="tiny",
    tokens_in=3,
    tokens_out=4,
    timings={"read": 1.0},
)


@pytest.fixture(scope="module")
def answerer(tiny_checkpoint: Path) -> Answerer:
    return Answerer(load_checkpoint(tiny_checkpoint))


@pytest.fixture
def cache(answerer: Answerer, tmp_path: Path) -> AnswerCache:
    return AnswerCache(tmp_path / "cache", 1 << 20, answerer)


def key(cache: AnswerCache, recording: str = "r", instruction: str = ASK, shots: Any = (), **options: Any) -> str:
    found = cache.key(recording, instruction, shots, Options(**options))
    assert found is not None
    return found


def test_an_answer_comes_back_exact(cache: AnswerCache) -> None:
    assert cache.get("k", "a.wav") is None
    cache.put("k", ANSWER)
    assert cache.get("k", "b.wav") == replace(ANSWER, file="b.wav", timings={})
    long = replace(ANSWER, text="word " * 100_000)  # kept in a file of its own
    cache.put("l", long)
    assert cache.get("l", "a.wav") == replace(long, timings={})


def test_only_answers_that_would_be_the_same_again_are_kept(cache: AnswerCache) -> None:
    for reason in ("repetition", "timeout", "cancelled", "abstained"):
        cache.put("k", replace(ANSWER, finish_reason=reason))
        assert cache.get("k", "a.wav") is None
    assert cache.key("r", ASK, (), Options(temperature=0.1)) is None
    assert key(cache, timeout=1.0) == key(cache, timeout=None) == key(cache)


def test_keys_differ_by_all_an_answer_depends_on(cache: AnswerCache) -> None:
    shot = ("r", ASK, "yes")
    keys = [
        key(cache),
        key(cache, recording="s"),
        key(cache, instruction=GERMAN),
        key(cache, shots=[shot]),
        key(cache, shots=[shot, shot]),
        key(cache, shots=[("s", ASK, "yes")]),
        key(cache, shots=[("r", ASK, "no")]),
        key(cache, beams=2),
        key(cache, max_tokens=3),
        key(cache, min_confidence=0.5),
        key(cache, labels=("a", "b")),
        key(cache, labels=("b", "a")),
    ]
    assert len(set(keys)) == len(keys)


def test_other_weights_are_another_model(tiny_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    before = weights_fingerprint(Answerer(checkpoint))
    assert weights_fingerprint(Answerer(load_checkpoint(tiny_checkpoint))) == before
    named = replace(checkpoint, settings=checkpoint.settings.model_copy(update={"name": "tiny + adapter"}))
    assert weights_fingerprint(Answerer(named)) != before
    with torch.no_grad():
        next(checkpoint.lm.parameters())[-1, -1] += 1
    assert weights_fingerprint(Answerer(checkpoint)) != before


def spoil(folder: Path, statement: str, *values: object) -> None:
    with sqlite3.connect(folder / "cache" / "cache.db") as database:
        assert database.execute(statement, values).rowcount == 1
    database.close()


@pytest.mark.parametrize(
    "value",
    ["", "{", "null", "[1]", json.dumps({"text": "a"}), json.dumps({"segments": [{}], "words": []}), 7, b"\x80"],
)
def test_a_damaged_entry_is_a_miss(cache: AnswerCache, tmp_path: Path, value: object) -> None:
    cache.put("k", ANSWER)
    spoil(tmp_path, "UPDATE Cache SET value = ?", value)
    assert cache.get("k", "a.wav") is None
    cache.put("k", ANSWER)
    assert cache.get("k", "a.wav") is not None


def test_nothing_found_in_the_folder_is_run(cache: AnswerCache, tmp_path: Path) -> None:
    cache.put("k", ANSWER)
    made = tmp_path / "made"
    pickled = f"cpathlib\nPath.touch\n(cpathlib\nPath\n(V{made}\ntRtR.".encode()
    spoil(tmp_path, "UPDATE Cache SET value = ?, mode = 4", pickled)
    assert cache.get("k", "a.wav") is None
    assert not made.exists()


def test_a_damaged_file_of_its_own_is_a_miss(cache: AnswerCache, tmp_path: Path) -> None:
    cache.put("k", replace(ANSWER, text="word " * 100_000))
    (file,) = (tmp_path / "cache").rglob("*.val")
    file.write_bytes(b"\xff")
    assert cache.get("k", "a.wav") is None
    file.unlink()
    assert cache.get("k", "a.wav") is None


def test_a_folder_that_cannot_be_used(answerer: Answerer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "cache.db").write_bytes(b"no database " * 1000)
    for name in ("file", "broken"):
        with pytest.raises(InputError, match=f"{name}: no folder to keep answers in"):
            AnswerCache(tmp_path / name, 1 << 20, answerer)


def test_the_oldest_answers_make_room(answerer: Answerer, tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "cache", 1 << 21, answerer)
    for number in range(60):
        cache.put(str(number), replace(ANSWER, text="word " * 10_000))
        assert cache.get("0", "a.wav")  # used all the time
    kept = [number for number in range(60) if cache.get(str(number), "a.wav")]
    assert 10 < len(kept) < 2**21 / 50_000
    assert (kept[0], kept[-1]) == (0, 59)


@pytest.fixture(scope="module")
def shipped() -> Checkpoint:
    return load_checkpoint()


def lookups(server: Running) -> list[float]:
    """Hits and misses."""
    return [server.metric(f'cache_lookups_total{{result="{result}"}}') for result in ("hit", "miss")]


def test_a_server_remembers(shipped: Checkpoint, tmp_path: Path) -> None:
    samples, rate = soundfile.read(CLIP, dtype="int16")
    soundfile.write(tmp_path / "same.flac", samples, rate)
    with serving(shipped, cache=tmp_path / "cache") as server:

        def ask(content: bytes, **data: Any) -> dict[str, Any]:
            return server.post(files={"file": ("a.wav", content)}, data=data).json()

        first = ask(CLIP.read_bytes())
        made = server.metric("tokens_out_total"), server.metric("audio_seconds_total")
        assert lookups(server) == [0, 1]
        assert ask(CLIP.read_bytes())["answers"] == [first["answers"][0] | {"timings": {}}]
        assert lookups(server) == [1, 1]
        assert (server.metric("tokens_out_total"), server.metric("audio_seconds_total")) == made  # not even heard again
        assert told(ask((tmp_path / "same.flac").read_bytes())["answers"][0]) == told(first["answers"][0])
        assert lookups(server) == [2, 1]  # the same samples in another file
        both = ask(CLIP.read_bytes(), also=GERMAN)  # one known, one not
        assert told(both["answers"][0]) == told(first["answers"][0])
        assert lookups(server) == [3, 2]
        assert ask(CLIPS[1].read_bytes())["text"] != first["text"]
        ask(CLIP.read_bytes(), temperature=1.5)
        assert lookups(server) == [3, 3]  # not looked up: it is drawn anew
        chat = {"messages": [turn(ASK, CLIPS[1]), {"role": "assistant", "content": "A."}, turn(ASK)]}
        shown = server.post("/v1/chat/completions", json=chat).json()["answer"]
        assert lookups(server) == [3, 4]
        assert told(server.post("/v1/chat/completions", json=chat).json()["answer"]) == told(shown)
        assert lookups(server) == [4, 4]
        stream = server.post(files={"file": CLIP.read_bytes()}, data={"stream": "true"}).text
        assert lookups(server) == [5, 4]
        assert [json.loads(line[6:])["type"] for line in stream.split("\n\n") if line] == [
            "transcript.text.delta",
            "transcript.text.done",
        ]
    with serving(shipped, cache=tmp_path / "cache") as server:  # started anew
        assert told(server.post(files={"file": ("a.wav", CLIP.read_bytes())}).json()["answers"][0]) == told(
            first["answers"][0]
        )
        assert lookups(server) == [1, 0]
