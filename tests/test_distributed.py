"""One process and two, ZeRO and expert parallelism: the same losses, weights and resumed runs."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_program, write_yaml

from speechllm.checkpoint import load_checkpoint

STEPS, STOP = 4, 2
# Runs the trainings of several configs one after another in the same processes, and notes the losses of each micro
# batch and the weights they end with. "stop" ends a training after step STOP, which has been saved.
OBSERVED = """
import json
import sys
from pathlib import Path

import torch
from torch import distributed

from train import pretrain
from train.engine import whole_state
from train.pretrain_config import Pretraining


class Stopped(Exception):
    pass


def train(path, stop):
    config = pretrain.read_config(path, Pretraining)
    trainer = pretrain.Trainer(config, True)
    notes, add, train_step = [], trainer.meter.add, trainer.train_step

    def noted_add(step, batch, losses):
        notes.append([step, losses["loss"], losses.get("gradient_norm")])
        add(step, batch, losses)

    def stopped_step(step, batches):
        if stop and step == STOP_AT:
            raise Stopped
        train_step(step, batches)

    trainer.meter.add, trainer.train_step = noted_add, stopped_step
    try:
        trainer.run()
    except Stopped:
        pass
    weights = whole_state(trainer.lm)
    if trainer.rank == 0:
        torch.save(weights, config.out / "weights.pt")
    (config.out / f"rank-{trainer.rank}.json").write_text(json.dumps(notes))


pretrain.single_process_environment()
for path in sys.argv[1:]:
    if not path.startswith("--"):
        train(Path(path.removeprefix("stop:")), path.startswith("stop:"))
distributed.destroy_process_group()
"""
WAYS: dict[str, dict[str, Any]] = {
    "zero 0": {"zero_stage": 0},
    "zero 1": {"zero_stage": 1},
    "zero 2": {"zero_stage": 2},
    "zero 3": {"zero_stage": 3},
    "offload": {"zero_stage": 2, "offload": True},
    "recomputed": {"activation_checkpointing": True},
    "experts": {"zero_stage": 1, "expert_parallel": 2},
    "experts, zero 3": {"zero_stage": 3, "expert_parallel": 2},
}
TAKEN_UP = {"zero 0": 0, "zero 2": 1, "zero 3": 3, "experts": 1}  # and the stage with which one process goes on


def observe(folder: Path, configs: dict[str, dict[str, Any]], processes: int, stop: bool = False) -> None:
    """Train as each of ``configs`` says, into the folders they name."""
    script = folder / "observed.py"
    script.write_text(OBSERVED.replace("STOP_AT", str(STOP)))
    files = [write_yaml(folder / f"{name}.yaml", settings) for name, settings in configs.items()]
    arguments = [f"stop:{file}" if stop else str(file) for file in files]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = ("deepspeed", "--num_accelerators", processes, "--master_port", port) if processes > 1 else ("python",)
    result = run_program(*start, script, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]


def losses(out: Path) -> list[tuple[int, float]]:
    """Step and loss of every micro batch of all ranks."""
    found = [note for path in out.glob("rank-*.json") for note in json.loads(path.read_text())]
    return sorted((step, loss) for step, loss, _ in found)


def norms(out: Path) -> list[float]:
    """Of the gradient of each step."""
    return [norm for _, _, norm in json.loads((out / "rank-0.json").read_text()) if norm is not None]


@pytest.fixture(scope="module")
def settings(pretrain_settings: dict[str, Any]) -> dict[str, Any]:
    changes = {"steps": STEPS, "log_every": 1, "save_every": STOP, "evaluate_every": STEPS, "curriculum": {}}
    return pretrain_settings | changes


@pytest.fixture(scope="module")
def alone(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process that does the work of two."""
    folder = tmp_path_factory.mktemp("alone")
    observe(folder, {"alone": settings | {"out": folder / "run", "grad_accum_steps": 2}}, 1)
    return folder / "run"


@pytest.fixture(scope="module")
def pairs(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes, in each of the ways."""
    folder = tmp_path_factory.mktemp("pairs")
    observe(folder, {name: settings | {"out": folder / f"run {name}"} | way for name, way in WAYS.items()}, 2)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_do_what_one_does(alone: Path, pairs: Path, way: str) -> None:
    out = pairs / f"run {way}"
    expected = losses(alone)
    assert [step for step, _ in expected] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len({loss for _, loss in expected}) == 8
    assert losses(out) == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in expected]
    assert len(norms(alone)) == STEPS
    assert norms(out) == pytest.approx(norms(alone), rel=1e-3)
    one, two = (torch.load(folder / "weights.pt") for folder in (alone, out))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=2e-4)
    served = load_checkpoint(out / "checkpoint").lm.state_dict()
    for name, weight in two.items():
        torch.testing.assert_close(served[name], weight.bfloat16().float(), rtol=0, atol=0)
    validated = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any("wer_transcribe_dev" in record for record in validated)


@pytest.fixture(scope="module")
def taken_up(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes that were stopped, and one that goes on with another ZeRO stage, without experts on other ranks."""
    folder = tmp_path_factory.mktemp("taken up")
    ways = {name: settings | {"out": folder / f"run {name}"} | way for name, way in WAYS.items() if name in TAKEN_UP}
    observe(folder, ways, 2, stop=True)
    for name in ways:
        assert [path.name for path in (folder / f"run {name}" / "state").glob("*step-*")] == [f"step-{STOP}"]
    change = {"expert_parallel": 1, "grad_accum_steps": 2}
    observe(folder, {name: way | change | {"zero_stage": TAKEN_UP[name]} for name, way in ways.items()}, 1)
    again = {"experts": ways["experts"] | change | {"zero_stage": TAKEN_UP["experts"]}}
    notes = (folder / "run experts" / "rank-0.json").read_bytes()
    observe(folder, again, 1)  # there is nothing left to do, but what one process saved can be read
    (folder / "run experts" / "rank-0.json").write_bytes(notes)
    return folder


@pytest.mark.parametrize("way", TAKEN_UP)
def test_one_process_goes_on_where_two_were_stopped(alone: Path, taken_up: Path, way: str) -> None:
    out = taken_up / f"run {way}"
    expected = [note for note in json.loads((alone / "rank-0.json").read_text()) if note[0] >= STOP]
    found = json.loads((out / "rank-0.json").read_text())
    assert [note[:2] for note in found] == [[step, pytest.approx(loss, rel=1e-4)] for step, loss, _ in expected]
    one, two = (torch.load(folder / "weights.pt") for folder in (alone, out))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=2e-4)
