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
# Adds up the gradients 1, 2^-9, 2^-9, … of a weight: in bf16 the sum would stay 1. Prints the norms of the means.
SUMS = """
import sys
from pathlib import Path

import deepspeed
import torch
from torch import distributed, nn

from train import pretrain
from train.engine import deepspeed_settings, on_machine, update
from train.pretrain_config import Pretraining

class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, slope):
        return (self.weight[:1] * slope).sum()


pretrain.prepare_environment()
for stage in range(1, 4):
    config = pretrain.read_config(Path(sys.argv[1]), Pretraining).model_copy(update={"zero_stage": stage})
    module = Slope()
    settings = deepspeed_settings(on_machine(config, gpu=False), gpu=False, universal=False)
    engine = deepspeed.initialize(model=module, model_parameters=[*module.parameters()], config=settings)[0]
    for micro_batch in range(config.grad_accum_steps):
        if micro_batch:
            engine.step()
        engine.backward(engine(torch.tensor(2.0**-9 if micro_batch else 1.0)))
    print("norm", stage, update(engine))
distributed.destroy_process_group()
"""
# Runs the trainings of several configs one after another in the same processes, and notes the losses of each micro
# batch and the weights they end with. "stop" ends a training after step STOP, which has been saved. Nothing is drawn.
OBSERVED = """
import json
import sys
from pathlib import Path

import torch
from torch import distributed

from train import pretrain, trainer as module
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
    trainer.meter.plot = module.plot_report = lambda *of: None
    try:
        trainer.run()
    except Stopped:
        pass
    weights = whole_state(trainer.lm)
    if trainer.rank == 0:
        torch.save(weights, config.out / "weights.pt")
    (config.out / f"rank-{trainer.rank}.json").write_text(json.dumps(notes))


pretrain.prepare_environment()
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
    "bf16": {"bf16": True, "zero_stage": 2},
    "bf16, experts": {"bf16": True, "expert_parallel": 2, "zero_stage": 1},
}
# and the stage with which one process goes on
TAKEN_UP = {"zero 0": 0, "zero 2": 1, "zero 3": 3, "experts": 1, "bf16, experts": 1}


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
    """One process that does the work of two, in float32 and in bf16."""
    folder = tmp_path_factory.mktemp("alone")
    ways = {"float32": {}, "bf16": {"bf16": True}}
    observe(
        folder, {name: settings | way | {"out": folder / name, "grad_accum_steps": 2} for name, way in ways.items()}, 1
    )
    return folder


@pytest.fixture(scope="module")
def pairs(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes, in each of the ways."""
    folder = tmp_path_factory.mktemp("pairs")
    observe(folder, {name: settings | {"out": folder / f"run {name}"} | way for name, way in WAYS.items()}, 2)
    return folder


def of_its_type(alone: Path, way: str) -> Path:
    return alone / ("bf16" if way.startswith("bf16") else "float32")


def check_alike(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """But for rounding: here and there a weight of bf16 may be the next one above or below, or have gone the other way
    for a step, by twice the learning rate, where the gradient is 0 but for rounding.
    """
    for name, weight in one.items():
        assert two[name].dtype == weight.dtype
        if weight.dtype == torch.float32:
            torch.testing.assert_close(two[name], weight, rtol=0, atol=2e-4)
        else:
            torch.testing.assert_close(two[name], weight, rtol=2**-7, atol=4e-3)
            off = ((two[name] - weight).abs() > 2e-4).sum()
            assert off <= max(2, 0.01 * weight.numel())  # 1 % of a norm's or a router's few weights is less than one


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_do_what_one_does(alone: Path, pairs: Path, way: str) -> None:
    out, alone = pairs / f"run {way}", of_its_type(alone, way)
    expected = losses(alone)
    assert [step for step, _ in expected] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len({loss for _, loss in expected}) == 8
    assert losses(out) == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in expected]
    assert len(norms(alone)) == STEPS
    assert norms(out) == pytest.approx(norms(alone), rel=1e-3)
    one, two = (torch.load(folder / "weights.pt") for folder in (alone, out))
    assert one.keys() == two.keys()
    check_alike(one, two)
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
    out, alone = taken_up / f"run {way}", of_its_type(alone, way)
    expected = [note for note in json.loads((alone / "rank-0.json").read_text()) if note[0] >= STOP]
    found = json.loads((out / "rank-0.json").read_text())
    assert [note[:2] for note in found] == [[step, pytest.approx(loss, rel=1e-4)] for step, loss, _ in expected]
    one, two = (torch.load(folder / "weights.pt") for folder in (alone, out))
    check_alike(one, two)


def test_gradients_are_added_up_in_float32(settings: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the weights are."""
    changes = {"out": tmp_path / "run", "bf16": True, "grad_accum_steps": 257}
    config = write_yaml(tmp_path / "bf16.yaml", settings | changes)
    result = run_program("python", "-c", SUMS, config)
    assert result.returncode == 0, result.stderr[-3000:]
    found = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("norm ")]
    expected = pytest.approx((1 + 256 / 512) / 257, rel=1e-3)
    assert [(int(stage), float(norm)) for stage, norm in found] == [(stage, expected) for stage in range(1, 4)]
