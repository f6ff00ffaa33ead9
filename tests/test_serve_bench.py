"""The benchmark of answering on a tiny model: what is compared, what is timed, and what is reported."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import typer
from conftest import RATE, require_engine

from serve import bench, bench_peers
from serve.bench import Scale
from serve.bench_peers import PocketSphinx, Whisper, make_peers
from serve.bench_report import HUGGING_FACE, INT8, OURS, PLAIN, as_markdown, machine_line, write_report
from serve.bench_runs import Clips, Decoding, ask_program, in_turns
from speechllm.checkpoint import load_checkpoint
from speechllm.errors import InputError
from speechllm.grammar import Grammars
from speechllm.model import ModelConfig, make_model
from speechllm.tasks import TASKS

SMALL = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_whispers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in SMALL.items():
        monkeypatch.setitem(bench_peers.SIZES, name, size)


@pytest.fixture
def clips(tmp_path: Path) -> Clips:
    return Clips(tmp_path)


@pytest.fixture
def decoding(tiny_checkpoint: Path, clips: Clips) -> Decoding:
    """Of an LM that the kernel fits."""
    checkpoint = load_checkpoint(tiny_checkpoint)
    vocabulary = checkpoint.vocabulary
    sizes = ModelConfig(hidden_size=64, num_layers=2, expert_size=32, num_experts=4, max_positions=512)
    torch.manual_seed(0)
    lm = make_model(sizes, vocabulary.size, vocabulary.pad, vocabulary.end).eval()
    checkpoint = replace(checkpoint, lm=lm)
    grammar = Grammars(checkpoint.vocabulary, checkpoint.text).of(TASKS["transcribe"])
    return Decoding(checkpoint, grammar, [clips.next(1.0), clips.next(1.5)])


def test_ways_take_turns_and_the_first_turn_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []
    monkeypatch.setattr("serve.bench_runs.time.perf_counter", lambda: now[0])

    def way(name: str, laps: list[float], turn: int) -> None:
        calls.append((name, turn))
        now[0] += laps[turn]

    laps = {"one": [50.0, 1.0, 5.0, 2.0], "other": [0.0, 7.0, 7.0, 9.0]}
    ways = {name: lambda turn, name=name, own=own: way(name, own, turn) for name, own in laps.items()}
    assert in_turns(ways, 4) == {"one": 2.0, "other": 7.0}
    assert calls == [(name, turn) for turn in range(4) for name in laps]


def test_every_clip_is_a_new_one_of_the_length_asked_for(clips: Clips) -> None:
    files = [clips.next(seconds) for seconds in (1.0, 1.0, 30.0)] + clips.short(7)
    heard = [soundfile.read(file)[0] for file in files]
    assert [len(samples) / RATE for samples in heard] == [1, 1, 30, 1.5, 2.5, 3.5, 4.5, 5.5, 1.5, 2.5]
    assert len({samples.tobytes() for samples in heard}) == len(files)
    assert all(samples.std() > 0.01 for samples in heard)


def test_all_ways_give_the_same_answers(decoding: Decoding) -> None:
    require_engine("c++")
    measured = decoding.measure(2, 2)
    ways = measured["ways"]
    assert list(ways) == [OURS, INT8, PLAIN, HUGGING_FACE]
    assert decoding.engines[OURS].compiled and not decoding.engines[PLAIN].compiled
    for name in (OURS, PLAIN, HUGGING_FACE):
        assert ways[name]["same_answers"] == 2
        assert ways[name]["ids"] == ways[HUGGING_FACE]["ids"] > 2
        assert ways[name]["ids_per_second"] > 0


def test_another_answer_is_noticed(decoding: Decoding) -> None:
    with torch.no_grad():
        for parameter in decoding.hugging_face._lm.parameters():
            parameter.copy_(torch.randn_like(parameter))
    assert decoding.measure(1, 2)["ways"][OURS]["same_answers"] == 0


def test_whispers_make_as_many_ids_as_they_are_asked_for(clips: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    peers, missing = make_peers(1)
    assert len(peers) + len(missing) == 3
    files = [clips.next(0.5), clips.next(1.0)]
    for tokens in (1, 2, 3, 7):
        for peer in peers.values():
            if not isinstance(peer, PocketSphinx):
                peer.answer(files, tokens)  # which checks how many there are
    whisper = next(peer for peer in peers.values() if isinstance(peer, Whisper))
    steps: list[Any] = []
    whisper.model.model.decoder.register_forward_hook(lambda *given: steps.append(given[0]))
    whisper.answer(files, 7)
    assert len(steps) == 7


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_peers, "find_spec", lambda package: None)
    peers, missing = make_peers(1)
    assert len(peers) == 1
    assert sorted(missing.values()) == [
        f"{package} is not installed (pip install -e '.[bench]')" for package in ("faster_whisper", "pocketsphinx")
    ]


def test_the_program_is_timed_and_weighed(tiny_checkpoint: Path, clips: Clips) -> None:
    seconds, megabytes = ask_program([clips.next(1.0)], tiny_checkpoint, 1, 1)
    assert 0.5 < seconds < 300
    assert megabytes is None or 100 < megabytes < 4000
    with pytest.raises(InputError, match="exit code 2"):
        ask_program([], tiny_checkpoint, 1, 1)


def test_everything_is_measured_and_reported(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "ask_program", lambda files, *_: (4.2, 100.0 * len(files)))  # has a test of its own
    result = bench.measure(tiny_checkpoint, tmp_path, Scale((1.0,), (1, 2), (1, 3), (1, 2), (0, 2), 2), 1, 1)
    assert [row["batch"] for row in result["decoding"]] == [1, 2]
    assert [row["concurrent"] for row in result["throughput"]] == [1, 3]
    assert [row["questions"] for row in result["questions"]] == [1, 2]
    without, two = result["shots"]
    assert (without["shots"], two["shots"]) == (0, 2)
    assert two["ids"] > without["ids"]
    assert two["megabytes"] / two["ids"] == pytest.approx(without["megabytes"] / without["ids"])
    assert [(row["seconds"], row["clips"]) for row in result["peers"]] == [(1.0, 1), (None, 2)]
    assert (result["cold_start"], result["megabytes"]) == (4.2, {1: 100.0, 3: 300.0})
    for row in result["latency"]:
        assert 0 < row["first"] <= row["last"] == row["real_time_factor"] * row["seconds"]
    for row in result["peers"]:
        assert row["real_time_factors"].keys() == {OURS, *result["computes"]}
        assert min(row["real_time_factors"].values()) > 0
    markdown = write_report(tmp_path, result)
    assert json.loads((tmp_path / "bench.json").read_text())["decoding"] == result["decoding"]
    assert (tmp_path / "bench.md").read_text() == markdown
    assert all(name in markdown for name in (*result["computes"], *result["missing"].values()))
    assert "differ" not in markdown
    assert (tmp_path / "bench.png").stat().st_size > 5000
    result["decoding"][0]["ways"][OURS]["same_answers"] = 0
    assert "**Answers differ" in as_markdown(result)


def test_a_busy_machine_is_told_about() -> None:
    machine = {"processor": "some", "cores": 2, "threads": 1, "load": 0.1}
    assert machine_line(machine) == "some, cores 2, threads 1; load average at the start 0.10."
    assert "was busy" in machine_line(machine | {"load": 1.5})


def test_a_report_needs_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(typer.Exit) as ended:
        bench.main(out=tmp_path / "file" / "out", model=tmp_path)
    assert ended.value.exit_code == 2
    assert "cannot be made" in capsys.readouterr().err
