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
from speechllm.data.mixture import CodeNoise, Draw, Mixture, TrainingBatch
from speechllm.data.schedule import WINDOW, Schedule
from speechllm.prompt import Batch
from speechllm.tasks import Facts
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train import loader
from train.encode import FEATURES
from train.expert_load import ExpertLoad
from train.footprint import Speed
from train.loader import BatchMaker, Meter
from train.trainer import Trainer

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
    return Schedule(
        mixture.pools, {"transcribe": 1.0, "translate_de": 1.0}, 300.0, seed=5, lanes=4, short=10, questions=2
    )


def batches(
    mixture: Mixture, schedule: Schedule, workers: int, rank: int = 0, step: int = FIRST
) -> Iterator[list[TrainingBatch]]:
    """What a trainer of two at ``step`` trains on next."""
    config = SimpleNamespace(steps=STEPS, seed=5, row_length=ROW_LENGTH, loader_workers=workers, grad_accum_steps=2)
    lm = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"))
    trainer: Any = SimpleNamespace(config=config, mixture=mixture, schedule=schedule, rank=rank, step=step, lm=lm)
    return Trainer.batches(trainer)


def content(batches: list[TrainingBatch]) -> list[dict[str, Any]]:
    """All of a step's batches but the time they took."""
    return [
        {
            field.name: value.tolist() if isinstance(value := getattr(part, field.name), torch.Tensor) else value
            for part in (batch, batch.lm)
            for field in fields(part)
            if field.name not in ("lm", "seconds")
        }
        for batch in batches
    ]


def test_batches_do_not_depend_on_who_makes_them(mixture: Mixture) -> None:
    for rank in range(2):
        lanes = range(2 * rank, 2 * rank + 2)
        in_place = [
            content(
                [
                    mixture.batch(draws, ROW_LENGTH, Random(f"5 lane {lane} step {step}"))
                    for lane, draws in zip(lanes, plan, strict=True)
                ]
            )
            for step, plan in enumerate(schedule_of(mixture).steps(range(FIRST, STEPS), lanes), FIRST)
        ]
        for workers in (0, 2):
            assert [content(b) for b in batches(mixture, schedule_of(mixture), workers, rank)] == in_place
    assert len(in_place) == STEPS - FIRST
    assert any(len(batch["input_ids"]) > 1 for step in in_place for batch in step)
    assert any(len(batch["draws"]) > len(batch["input_ids"]) for step in in_place for batch in step), "rows of several"


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


def batch_of(example_ids: list[list[int]], tasks: str, seconds: float, audio_seconds: float) -> TrainingBatch:
    nothing, examples = torch.zeros(0), torch.tensor(example_ids)
    kept = (examples >= 0).long()
    drawn = tuple(Draw(task, 0) for task in tasks if task.islower())  # in capitals: asked further
    lm = Batch(kept, kept, kept, kept)
    return TrainingBatch(lm, examples, kept, *[nothing] * 4, tuple(tasks.lower()), drawn, audio_seconds, seconds)


def test_the_meter_counts_as_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = 100.0
    monkeypatch.setattr(loader, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(loader, "gather", lambda value: [value] * 3)  # three ranks that count the same
    shares = [{"a": 0.75, "b": 0.25}, {"a": 0.5, "b": 0.25, "c": 0.25}]
    schedule: Any = SimpleNamespace(shares=shares.__getitem__)
    experts = ExpertLoad("abc")
    meter = Meter(schedule, experts, Speed(parameters=30.0, attention=2.0, peak=1000.0))
    meter.plot(tmp_path)
    assert not [*tmp_path.iterdir()], "nothing to show"

    def arriving() -> Iterator[list[TrainingBatch]]:
        nonlocal now
        for batch in (
            batch_of([[0, 1, 2, -1], [3, 3, -1, -1]], "aaba", 0.5, audio_seconds=7.0),
            batch_of([[0, 0]], "bA", 0.2, audio_seconds=2.5),
        ):
            now += 0.5  # in which there is nothing to train on
            yield [batch]

    for step, (batch,) in enumerate(meter.timed(arriving())):
        meter.add(step, batch, {"loss": 3.0 - step, "answer": 1.0, f"answer_{'ab'[step]}": 4.0 + step})
        now += 1.5
    assert meter.read() == pytest.approx(
        {
            "loss": 2.5, "answer": 1.0, "answer_a": 4.0, "answer_b": 5.0, "padding": 3 / 10, "waiting": 1 / 4,
            "tokens_per_second": 3 * 7 / 4, "loader_tokens_per_second": 7 / 0.7, "audio_hours_per_hour": 3 * 9.5 / 4,
            # sequences of 1, 1, 1, 2 and 2 ids, in four seconds
            "mfu": (30 * 7 + 2 * (1 + 1 + 1 + 4 + 4)) / 1000 / 4,
        }
    )  # fmt: skip
    meter.plot(tmp_path)
    assert (tmp_path / "shares.png").stat().st_size > 1000
    found = json.loads((tmp_path / "shares.json").read_text())
    expected = {"a": (3 + 0.5, 3, 4), "b": (1 + 0.25, 2, 2), "c": (0.25, 0, 0)}  # of five draws, six answers
    assert {task: tuple(share.values()) for task, share in found.items()} == {
        task: pytest.approx((asked / 5, drawn / 5, answers / 6)) for task, (asked, drawn, answers) in expected.items()
    }
    assert [*found["a"]] == ["asked", "realised", "answers"]

    meter.add(1, replace(batch, seconds=0.1), {"loss": 7.0})
    experts.add(1, torch.tensor([1, 3]).view(1, 1, 1, 2))
    now += 1
    since = {"loss": 7.0, "padding": 0, "waiting": 0, "tokens_per_second": 6, "loader_tokens_per_second": 20}
    since |= {"audio_hours_per_hour": 3 * 2.5, "mfu": (30 * 2 + 2 * 4) / 1000}
    loads = {"busiest_expert": 0.75, "idlest_expert": 0.25, "unused_experts": 0}
    assert meter.read() == pytest.approx(since | loads), "since the last reading"
    meter.flops = None
    meter.add(1, batch, {"loss": 7.0})
    experts.add(1, torch.tensor([1, 3]).view(1, 1, 1, 2))
    now += 1
    assert meter.read().keys() == (since | loads).keys() - {"mfu"}, "a device whose peak is not known"


def test_seconds_of_audio_are_those_of_what_is_heard() -> None:
    """Clip n has n + 1 quarters of a second; the translation of a text is not listened to."""
    rows = [
        {
            "id": str(n), "split": "train", "source": "made", "speaker": None, "n_q": 2,
            "facts": write_facts(Facts((n + 1) / 4, "Yes", "en", translations={"de": "Ja"})), "codes": [n, n] * 5,
        }
        for n in range(4)
    ]  # fmt: skip
    tasks = ["transcribe", "translate_text_de"]
    made = Mixture({"made": Dataset.from_list(rows, features=FEATURES)}, VOCABULARY, TEXT, tasks)
    draws = [Draw("transcribe", 3), Draw("translate_text_de", 2), Draw("transcribe", 0), Draw("transcribe", 3)]
    batch = BatchMaker(made, ROW_LENGTH, seed=5)[7, 1, draws]
    assert batch.audio_seconds == 1.0 + 0.25 + 1.0
    assert batch.to(torch.device("cpu")).audio_seconds == batch.audio_seconds
    plain = made.batch(draws, ROW_LENGTH, Random("5 lane 1 step 7"))
    assert torch.equal(batch.lm.input_ids, plain.lm.input_ids) and batch.draws == plain.draws
