"""Batches from worker processes are those made in place, and the meter counts as one does by hand."""

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TEXT_MODEL
from datasets import Dataset

from speechllm.data.encoded import write_facts
from speechllm.data.mixture import CodeNoise, Mixture, TrainingBatch
from speechllm.data.schedule import WINDOW, Schedule
from speechllm.prompt import Batch
from speechllm.tasks import Facts
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train import loader
from train.encode import FEATURES
from train.loader import Meter
from train.pretrain import Trainer

TEXT = TextTokenizer.load(TEXT_MODEL)
VOCABULARY = Vocabulary(TEXT.size, n_q=2, card=16, acoustic_stride=2)
FIRST, STEPS = WINDOW - 2, WINDOW + 6
ROW_LENGTH = 120


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    rng = Random(0)
    rows = []
    for n in range(60):
        frames = rng.randrange(5, 50)
        facts = Facts(frames / 25, f"Number {n}", "en", translations={"de": f"Nummer {n}"} if n % 3 else {})
        rows.append(
            {
                "id": str(n), "split": "train", "source": "made", "speaker": None, "n_q": 2,
                "facts": write_facts(facts), "codes": [rng.randrange(16) for _ in range(2 * frames)],
            }
        )  # fmt: skip
    data = Dataset.from_list(rows, features=FEATURES)
    return Mixture({"made": data}, VOCABULARY, TEXT, ["transcribe", "translate_de"], noise=CodeNoise(0.1, 0.2))


def schedule_of(mixture: Mixture) -> Schedule:
    return Schedule(mixture.pools, {"transcribe": 1.0, "translate_de": 1.0}, 300.0, seed=5, world=2, short=10)


def batches(
    mixture: Mixture, schedule: Schedule, workers: int, rank: int = 0, step: int = FIRST
) -> Iterator[TrainingBatch]:
    """What a trainer at ``step`` trains on next."""
    config = SimpleNamespace(steps=STEPS, seed=5, row_length=ROW_LENGTH, loader_workers=workers)
    trainer: Any = SimpleNamespace(config=config, mixture=mixture, schedule=schedule, rank=rank, step=step)
    return Trainer.batches(trainer)


def content(batch: TrainingBatch) -> dict[str, Any]:
    """All of a batch but the time it took."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name not in ("lm", "seconds")}
    values |= {field.name: getattr(batch.lm, field.name) for field in fields(batch.lm)}
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def test_batches_do_not_depend_on_who_makes_them(mixture: Mixture) -> None:
    for rank in range(2):
        plans = schedule_of(mixture).steps(range(FIRST, STEPS), rank)
        in_place = [
            content(mixture.batch(draws, ROW_LENGTH, Random(f"5 rank {rank} step {step}")))
            for step, draws in enumerate(plans, FIRST)
        ]
        for workers in (0, 2):
            assert [content(b) for b in batches(mixture, schedule_of(mixture), workers, rank)] == in_place
    assert len(in_place) == STEPS - FIRST
    assert any(len(batch["input_ids"]) > 1 for batch in in_place)
    assert any(len(batch["tasks"]) > len(batch["input_ids"]) for batch in in_place), "rows of several"


def test_a_state_saved_while_workers_are_ahead(mixture: Mixture) -> None:
    """One, then two batches are trained on; two times two are made or being made, in the next window, too."""
    whole = [content(batch) for batch in batches(mixture, schedule_of(mixture), 0)]
    schedule = schedule_of(mixture)
    running = batches(mixture, schedule, 2)
    for step in (WINDOW - 1, WINDOW):
        assert content(next(running)) == whole[step - 1 - FIRST]
        resumed = schedule_of(mixture)
        resumed.restore(json.loads(json.dumps(schedule.state(step))))
        assert [content(batch) for batch in batches(mixture, resumed, 0, step=step)] == whole[step - FIRST :]


def batch_of(mask: list[list[int]], tasks: str, seconds: float) -> TrainingBatch:
    nothing, kept = torch.zeros(0), torch.tensor(mask)
    return TrainingBatch(Batch(kept, kept, kept, kept), kept, nothing, nothing, nothing, tuple(tasks), seconds)


def test_the_meter_counts_as_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = 100.0
    monkeypatch.setattr(loader, "time", SimpleNamespace(monotonic=lambda: now))
    shares = [{"a": 0.75, "b": 0.25}, {"a": 0.5, "b": 0.25, "c": 0.25}]
    schedule: Any = SimpleNamespace(shares=shares.__getitem__)
    meter = Meter(schedule, world=3)
    meter.plot(tmp_path)
    assert not [*tmp_path.iterdir()], "nothing to show"

    def arriving() -> Iterator[TrainingBatch]:
        nonlocal now
        for batch in (batch_of([[1, 1, 1, 0], [1, 1, 0, 0]], "aaba", 0.5), batch_of([[1, 1]], "b", 0.2)):
            now += 0.5  # in which there is nothing to train on
            yield batch

    for step, batch in enumerate(meter.timed(arriving())):
        meter.add(step, batch, {"loss": 3.0 - step, "answer": 1.0})
        now += 1.5
    assert meter.read() == pytest.approx(
        {
            "loss": 2.5, "answer": 1.0, "padding": 3 / 10, "waiting": 1 / 4,
            "tokens_per_second": 3 * 7 / 4, "loader_tokens_per_second": 7 / 0.7,
        }
    )  # fmt: skip
    meter.plot(tmp_path)
    assert (tmp_path / "shares.png").stat().st_size > 1000
    found = json.loads((tmp_path / "shares.json").read_text())
    expected = {"a": (3 + 0.5, 3), "b": (1 + 0.25, 2), "c": (0.25, 0)}  # of five examples
    assert {task: tuple(share.values()) for task, share in found.items()} == {
        task: pytest.approx((asked / 5, drawn / 5)) for task, (asked, drawn) in expected.items()
    }
    assert found["a"].keys() == {"asked", "realised"}

    meter.add(1, replace(batch, seconds=0.1), {"loss": 7.0})
    now += 1
    assert meter.read() == pytest.approx(
        {"loss": 7.0, "padding": 0, "waiting": 0, "tokens_per_second": 6, "loader_tokens_per_second": 20}
    ), "since the last reading"
