"""The training benchmark on a tiny model: what is compared, what is timed, and what is reported."""

import json
import os
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from conftest import ROOT, run_program, write_yaml

from speechllm.codec import load_codec
from speechllm.data.encoded import read_encoded, row_codes, row_facts
from speechllm.data.mixture import Mixture
from speechllm.data.schedule import WINDOW
from speechllm.errors import InputError
from speechllm.prompt import IGNORE_INDEX
from speechllm.tasks import TASKS
from train import bench, bench_gpu
from train.balance import Balance
from train.bench_corpus import CORPORA, make_corpus
from train.bench_report import ALL, PLAIN, SAME, gpu_table, parts_table, speed_table, summary
from train.bench_runs import PARTS, Clock, Lap, Plain, without_launcher
from train.objective import Objective
from train.pretrain_config import Pretraining
from train.setup import make_mixture, make_schedule, make_start

SETTINGS: dict[str, Any] = {
    "out": "unused", "corpora": {"unused": 1}, "dev_corpora": [], "steps": 500,
    "task_corpora": {"transcribe": {"unused": 1}},
    "tasks": {"transcribe": 0.8, "translate_de": 0.2}, "batch_tokens": 300, "row_length": 1, "ctc_layer": 1,
    "model": {"hidden_size": 32, "num_layers": 2, "expert_size": 32, "num_experts": 4, "max_positions": 1024},
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretraining:
    monkeypatch.setattr(bench, "ROWS", {"captions": (60, 1.0), "talks": (20, 3.0)})
    return bench.prepared(write_yaml(tmp_path / "bench.yaml", SETTINGS), tmp_path)


@pytest.fixture
def mixture(config: Pretraining) -> Mixture:
    return make_mixture(config, make_start(config, resumed=False))


def test_made_up_corpora_have_the_lengths_they_are_said_to_have(tmp_path: Path) -> None:
    codec = load_codec(ROOT / "tokenizers" / "codec")
    rows = read_encoded([make_corpus(tmp_path, "captions", codec, 400)], "train", codec)
    facts = [row_facts(row) for row in rows]
    durations = torch.tensor([known.duration for known in facts])
    assert durations.median().item() == pytest.approx(3.5, rel=0.1)
    assert durations.log().std().item() == pytest.approx(0.5, rel=0.15)
    words = torch.tensor([float(len((known.text or "").split())) for known in facts])
    assert words.mean().item() == pytest.approx(3 * durations.mean().item(), rel=0.02)
    codes = [row_codes(row, 2) for row in rows]
    assert [c.shape[1] for c in codes] == [round(known.duration * codec.frame_rate) for known in facts]
    assert all(int(c.min()) >= 0 and int(c.max()) < codec.card for c in codes)
    repeats = torch.cat([c[0, 1:] == c[0, :-1] for c in codes]).float().mean().item()
    assert repeats == pytest.approx(0.11, abs=0.01)
    again = read_encoded([make_corpus(tmp_path / "again", "captions", codec, 400)], "train", codec)
    assert again[7] == rows[7]


def test_every_task_has_answers(tmp_path: Path) -> None:
    codec = load_codec(ROOT / "tokenizers" / "codec")
    settings = SETTINGS | {
        "out": tmp_path, "tasks": dict.fromkeys(TASKS, 1), "merge_repeats": False, "n_q": 2, "acoustic_stride": 3,
        "corpora": {make_corpus(tmp_path, name, codec, 100): 1 for name in CORPORA}, "task_corpora": {},
    }  # fmt: skip
    config = Pretraining.model_validate(settings)
    mixture = make_mixture(config, make_start(config, resumed=False))
    assert mixture.pools.keys() == TASKS.keys()
    assert len(mixture.pools["emotion"].popitem()[1].rows) < 20 < len(mixture.pools["transcribe"].popitem()[1].rows)


def test_the_plain_way_has_our_examples_and_our_loss(config: Pretraining, mixture: Mixture) -> None:
    plain = Plain(config, mixture)
    draws = [draw for lanes in make_schedule(config, mixture, 1).steps(range(WINDOW), range(1)) for draw in lanes[0]]
    heard = Counter(len(mixture.vocabulary.audio_ids(mixture.episode(d, Random(0))[-1].codes)) > 0 for d in draws)
    assert len(plain.examples) == len(draws) == heard[True]
    assert plain.batch == round(len(draws) / WINDOW)
    ids = sum(len(example.ids) for example in plain.examples)
    assert ids / WINDOW == pytest.approx(config.batch_tokens, rel=0.1)
    lengths = [len(example.ids) for example in plain.examples]
    assert lengths != sorted(lengths)

    batch = mixture.batch(draws[:8], 1, Random(0))
    objective = Objective(plain.lm, mixture.vocabulary, Balance(list(config.tasks)), 1, 0.0, 0.0)
    ours = objective(batch)["loss"]
    theirs = plain.lm(input_ids=batch.lm.input_ids, attention_mask=batch.lm.attention_mask, labels=batch.lm.labels)
    assert ours.item() == pytest.approx(theirs.loss.item(), abs=1e-5)


def test_a_lap_of_the_plain_way_trains_and_counts_what_was_timed(config: Pretraining, mixture: Mixture) -> None:
    plain = Plain(config, mixture)
    before = [parameter.clone() for parameter in plain.lm.parameters()]
    lap = plain.lap(3)
    assert any(not torch.equal(old, new) for old, new in zip(before, plain.lm.parameters(), strict=True))
    assert 0 < lap.ids < lap.positions and lap.seconds > 0
    assert len(plain._sizes) >= 4
    assert lap.ids == sum(ids for ids, _ in plain._sizes[1:4])
    collated = plain._collate(plain.examples[:2])
    assert collated.keys() == {"input_ids", "labels", "attention_mask"}
    assert bool((collated["labels"][collated["attention_mask"] == 0] == IGNORE_INDEX).all())


def test_the_clock_leaves_methods_as_they_were() -> None:
    class Holder:
        def double(self, number: int) -> int:
            return 2 * number

    holder, clock = Holder(), Clock()
    with clock.around(holder, "double", "part"):
        assert holder.double(4) == 8
    assert clock.seconds["part"] > 0
    assert "double" not in vars(holder)
    seen = clock.seconds["part"]
    assert holder.double(1) == 2 and clock.seconds["part"] == seen


def test_the_launcher_is_hidden_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with without_launcher():
        assert "RANK" not in os.environ
    assert os.environ["RANK"] == "0" and "MASTER_PORT" not in os.environ


def test_speeds_and_ratios_by_hand() -> None:
    laps = {
        PLAIN: [Lap(100, 200, 1.0), Lap(100, 200, 2.0), Lap(100, 200, 4.0)],
        SAME: [Lap(90, 100, 0.5), Lap(90, 100, 0.9), Lap(90, 100, 1.0)],
        ALL: [Lap(80, 100, 1.0), Lap(80, 100, 1.0), Lap(80, 100, 1.0)],
    }
    speeds = summary(laps)
    assert speeds[PLAIN]["ids_per_second"] == 50 and speeds[PLAIN]["padding"] == 0.5
    assert speeds[SAME]["laps"] == pytest.approx([180, 100, 90])
    assert speeds[SAME]["ratio"] == pytest.approx(2)
    assert speeds[SAME]["ratios"] == pytest.approx([1.8, 2, 3.6])
    assert speeds[ALL]["padding"] == pytest.approx(0.2)
    run = {"config": "a", "weights": "fp32", "speeds": speeds, "parts": dict.fromkeys(PARTS, 0.1)}
    assert "| a | fp32 | 50 | 100 | **2.00** (1.80–3.60) | 80 | **1.60** (0.80–3.20) | 50% | 10% |" in speed_table(
        [run]
    )
    assert "| backward | 100 (17%) |" in parts_table([run]) and "| in all | 600 |" in parts_table([run])


def test_what_a_gpu_would_measure(config: Pretraining) -> None:
    changed = bench_gpu.variants(bench.changed(config, {"grad_accum_steps": 8, "row_length": 512}))
    assert {name: (c.attn_implementation, c.row_length) for name, c in changed.items()} == {
        "FlashAttention, one row": ("flash_attention_2", 512),
        "SDPA, packed": ("sdpa", 512),
        "SDPA, padded": ("sdpa", 1),
    }
    assert {(c.grad_accum_steps, c.bf16) for c in changed.values()} == {(1, True)}
    too_small = bench_gpu.reach(changed["SDPA, packed"], gpu_memory=1e-4, steps=1)
    assert "GiB of each of 1 GPUs" in too_small.problem
    reached = {"ids_per_second": 1234.5, "mfu": 0.123, "padding": 0.01, "problem": ""}
    table = gpu_table({"small": {"one": reached, "two": reached | {"mfu": None}, "three": vars(too_small)}})
    assert "| small | one | 1,234 | 12.3% | 1.0% |" in table
    assert "| small | two | 1,234 | ? | 1.0% |" in table
    assert "GiB of each of 1 GPUs" in table


def test_a_variant_is_measured_or_says_why_not(config: Pretraining, engine: None) -> None:
    """Here without a GPU, whose peak would give an MFU."""
    wide = bench.changed(config, {"row_length": 400, "batch_tokens": 1200})
    found = {name: bench_gpu.reach(one, 80, steps=1) for name, one in bench_gpu.variants(wide).items()}
    if not torch.cuda.is_available():
        assert "needs the package flash-attn" in found["FlashAttention, one row"].problem
    packed, padded = found["SDPA, packed"], found["SDPA, padded"]
    for reached in (packed, padded):
        assert not reached.problem
        assert reached.ids_per_second is not None and reached.ids_per_second > 0
        assert reached.padding is not None and 0 <= reached.padding < 0.5


def test_a_config_that_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "other.yaml", {k: v for k, v in SETTINGS.items() if k != "model"} | {"init_from": "x"})
    with pytest.raises(InputError, match=r"other\.yaml: init_from is not measured"):
        bench.prepared(path, tmp_path)


def test_other_values_must_go_together(config: Pretraining) -> None:
    with pytest.raises(InputError, match=r"as it is measured: batch_tokens: Input should be greater than"):
        bench.changed(config, {"batch_tokens": 0})


def test_the_command_writes_tables_json_and_a_picture(tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "bench.yaml", SETTINGS)
    out = tmp_path / "out"
    arguments = ("--config", config, "--steps", 1, "--repeats", 1, "--out", out)
    done = run_program("python", "-m", "train.bench", *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "bench.json").read_text())
    assert [(run["config"], run["weights"]) for run in result["runs"]] == [("bench", "fp32"), ("bench", "bf16")]
    for run in result["runs"]:
        assert run["speeds"].keys() == {PLAIN, SAME, ALL}
        assert all(len(of["laps"]) == 1 and min(of["laps"]) > 0 for of in run["speeds"].values())
        assert run["speeds"][SAME]["padding"] < run["speeds"][PLAIN]["padding"]
        assert run["parts"].keys() == set(PARTS)
        assert all(run["parts"][part] > 0 for part in PARTS)
    assert (out / "bench.md").read_text().strip() in done.stdout
    assert (out / "bench.png").stat().st_size > 5000
