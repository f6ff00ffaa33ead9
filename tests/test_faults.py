"""Trainings that are killed, run out of disk, or diverge: nothing is lost but the steps since the last whole state."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_program, write_yaml

from speechllm.checkpoint import load_checkpoint

STEPS, KILLS = 12, 5
# Starts the command again and again in a child that is killed (with the loaders it started) after it has saved no, one
# or two states, at a random moment until the next, until KILLS were killed; then once more, to the end.
KILLED = """
import json
import os
import signal
import sys
import time
from pathlib import Path
from random import Random

from train import pretrain

out, kills, rng = Path(sys.argv.pop()), int(sys.argv.pop()), Random(0)
latest, seen, period, killed = out / "state" / "latest", [], 0.3, True


def ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def counting():
    return latest.read_text() if latest.exists() else ""


def wait_for_a_save(seconds=float("inf")):
    begun, before = time.monotonic(), counting()
    while counting() == before and time.monotonic() - begun < seconds and not ended(child):
        time.sleep(0.001)
    return time.monotonic() - begun


while killed:
    child, killed = os.fork(), False
    if not child:
        os.setpgid(0, 0)
        pretrain.main()
        os._exit(0)
    if kills:
        for number in range(max(kills % 3, not latest.exists())):
            taken = wait_for_a_save()
            period = taken if number else period  # of a step and a save; before the first save there is the start
        wait_for_a_save(rng.uniform(0, period))
        if not ended(child):
            os.killpg(child, signal.SIGKILL)
            killed, kills = True, kills - 1
    _, status = os.waitpid(child, 0)
    states = sorted(path.name for path in latest.parent.glob("step-*"))
    seen.append({"status": status, "latest": counting().strip(), "states": states})
(out / "seen.json").write_text(json.dumps(seen))
"""
# Starts the command, and lets no file of a rank grow beyond what the state of step FULL needs less a little.
FULL = """
import resource
import signal
import sys

from train import pretrain

train_step, rank, full = pretrain.Trainer.train_step, int(sys.argv.pop()), int(sys.argv.pop())


def step_on_a_full_disk(trainer, step, batches):
    if step == full and trainer.rank == rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        largest = max(path.stat().st_size for path in trainer.state.folder.rglob("*.pt"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, resource.RLIM_INFINITY))
    return train_step(trainer, step, batches)


pretrain.Trainer.train_step = step_on_a_full_disk
pretrain.main()
"""
# Starts the command; in the second micro batch of step 2 the loss of rank 1 is no number. Prints how weights are.
POISONED = """
import sys

import torch

from train import pretrain
from train.objective import Objective

forward, train_step, micro_batches = Objective.forward, pretrain.Trainer.train_step, []


def poisoned(objective, batch):
    losses = forward(objective, batch)
    micro_batches.append(batch.draws)
    if len(micro_batches) == 6 and torch.distributed.get_rank() == 1:
        losses["loss"] = losses["loss"] * torch.nan
    return losses


def step_and_look(trainer, step, batches):
    try:
        train_step(trainer, step, batches)
    finally:
        finite = all(bool(weight.isfinite().all()) for weight in trainer.lm.parameters())
        print("step", step, finite, "|", trainer.mixture.named(batches[1].draws))


Objective.forward, pretrain.Trainer.train_step = poisoned, step_and_look
pretrain.main()
"""


def run_ranks(script: str, *arguments: object) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of two processes, none of which is ended when the other one is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            cwd=ROOT,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ends = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *end) for process, end in zip(processes, ends, strict=True)]


@pytest.fixture(scope="module")
def settings(pretrain_settings: dict[str, Any]) -> dict[str, Any]:
    changes = {"steps": STEPS, "log_every": 1, "save_every": 1, "evaluate_every": STEPS, "zero_stage": 1}
    changes["curriculum"] = {}
    return pretrain_settings | changes


@pytest.fixture(scope="module")
def undisturbed(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights that the training ends with."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    result = run_program(
        "python", "train/pretrain.py", "--config", write_yaml(out.with_name("r.yaml"), settings | {"out": out})
    )
    assert result.returncode == 0, result.stderr
    return load_checkpoint(out / "checkpoint").lm.state_dict()


def same(out: Path, expected: dict[str, torch.Tensor]) -> bool:
    found = load_checkpoint(out / "checkpoint").lm.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_killed_at_random_moments(
    settings: dict[str, Any], undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    config = write_yaml(tmp_path / "r.yaml", settings | {"out": out})
    result = run_program("python", "-c", KILLED, "--config", config, "--resume", KILLS, out)
    assert result.returncode == 0, result.stderr[-3000:]
    seen = json.loads((out / "seen.json").read_text())
    assert [end["status"] for end in seen] == [9] * (len(seen) - 1) + [0]
    steps = [int(end["latest"].removeprefix("step-")) for end in seen]
    assert steps == sorted(steps), "no state is lost"
    assert steps[-1] == STEPS
    assert len(set(steps)) > 3, "killed at many steps"
    assert all(end["latest"] in end["states"] for end in seen)
    assert same(out, undisturbed)


def test_a_full_disk_keeps_the_last_state(
    settings: dict[str, Any], undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """A newer one that is not named, as a kill leaves it, is not looked at; a damaged one that is named is refused."""
    out = tmp_path / "run"
    config = write_yaml(tmp_path / "r.yaml", settings | {"out": out})
    result = run_program("python", "-c", FULL, "--config", config, 4, 0)
    assert result.returncode == 2, result.stderr
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith(f"error: {out}: step 5 cannot be saved (")
    assert error.endswith("the state of step-4 is kept: make room, then go on with --resume")
    assert "Traceback" not in result.stderr
    assert (out / "state" / "latest").read_text() == "step-4\n"
    assert not same(out, undisturbed), "the checkpoint of step 4"
    (out / "state" / "step-5").mkdir(exist_ok=True)
    (out / "state" / "step-5" / "mp_rank_00_model_states.pt").write_bytes(b"half")
    resumed = run_program("python", "train/pretrain.py", "--config", config, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert same(out, undisturbed)
    (path,) = (out / "state").glob("step-*/mp_rank_00_model_states.pt")
    path.write_bytes(path.read_bytes()[:-1000])
    refused = run_program("python", "train/pretrain.py", "--config", config, "--resume")
    assert refused.returncode == 2
    assert "cannot be read" in refused.stderr.strip().splitlines()[-1]
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("full", [0, 1])
def test_one_rank_that_cannot_write_stops_all(settings: dict[str, Any], tmp_path: Path, full: int) -> None:
    """None waits for another until it gives up; all say why."""
    out = tmp_path / "run"
    config = write_yaml(tmp_path / "r.yaml", settings | {"out": out, "loader_workers": 0})
    ends = run_ranks(FULL, "--config", config, 2, full)
    errors = {errors.strip().splitlines()[-1] for _, _, errors in ends}
    assert [code for code, _, _ in ends] == [2, 2], ends
    (error,) = errors
    assert error.startswith(f"error: {out}: step 3 cannot be saved (")
    assert error.endswith("the state of step-2 is kept: make room, then go on with --resume")
    assert not any("Traceback" in errors for _, _, errors in ends)
    assert (out / "state" / "latest").read_text() == "step-2\n"


def test_a_loss_that_is_no_number_stops_all_before_it_is_learnt(settings: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = {"out": out, "loader_workers": 0, "grad_accum_steps": 2, "zero_stage": 0, "save_every": 2}
    ends = run_ranks(POISONED, "--config", write_yaml(tmp_path / "r.yaml", settings | changes))
    assert [code for code, _, _ in ends] == [2, 2], ends
    errors = [errors.strip().splitlines()[-1] for _, _, errors in ends]
    seen = [[line for line in output.splitlines() if line.startswith("step ")] for _, output, _ in ends]
    for steps in seen:
        assert [line.split(" |")[0] for line in steps[-3:]] == [f"step {step} True" for step in range(3)]
    named = seen[1][-1].split("| ")[1]
    assert errors[0].startswith("error: step 2: the loss of another rank is not finite")
    assert errors[1].startswith(f"error: step 2: the loss of {named} is not finite")
    assert all(error.endswith("go on from step-2 with --resume") for error in errors)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_training_that_diverges_stops(settings: dict[str, Any], tmp_path: Path, zero_stage: int) -> None:
    out = tmp_path / "run"
    settings = settings | {"out": out, "learning_rate": 1e20, "save_every": 100, "zero_stage": zero_stage}
    result = run_program("python", "train/pretrain.py", "--config", write_yaml(tmp_path / "r.yaml", settings))
    assert result.returncode == 2, result.stderr
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("error: step ")
    assert "is not finite" in error
    assert "lower learning_rate" in error
    assert error.endswith("go on from the start with --resume")
    assert "Traceback" not in result.stderr
    assert not (out / "checkpoint").exists(), "nothing of it is kept"
