"""Trainings that are killed, run out of disk, or diverge: nothing is lost but the steps since the last whole state."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_program, write_yaml

from speechllm.checkpoint import load_checkpoint

STEPS, KILLS = 16, 9
# Starts the command again and again in a child that is killed (with the loaders it started) at a random moment after it
# has saved no, one or two states, until KILLS were killed; then once more, to the end.
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
latest, seen, period, killed = out / "state" / "latest", [], 1.0, True


def ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def counting():
    return latest.read_text() if latest.exists() else ""


while killed:
    child, killed = os.fork(), False
    if not child:
        os.setpgid(0, 0)
        pretrain.main()
        os._exit(0)
    if kills:
        for _ in range(max(kills % 3, not latest.exists())):
            begun, before = time.monotonic(), counting()
            while counting() == before and not ended(child):
                time.sleep(0.001)
            period = time.monotonic() - begun  # of a step and a save, when it is not the first
        time.sleep(rng.uniform(0, period))
        if not ended(child):
            os.killpg(child, signal.SIGKILL)
            killed, kills = True, kills - 1
    _, status = os.waitpid(child, 0)
    states = sorted(path.name for path in latest.parent.glob("step-*"))
    seen.append({"status": status, "latest": counting().strip(), "states": states})
(out / "seen.json").write_text(json.dumps(seen))
"""
# Starts the command, and lets no file grow beyond what the state of step FULL needs less a little.
FULL = """
import resource
import signal
import sys

from train import pretrain

train_step, full = pretrain.Trainer.train_step, int(sys.argv.pop())


def step_on_a_full_disk(trainer, step, batches):
    if step == full:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        largest = max(path.stat().st_size for path in trainer.state.folder.rglob("*.pt"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, resource.RLIM_INFINITY))
    return train_step(trainer, step, batches)


pretrain.Trainer.train_step = step_on_a_full_disk
pretrain.main()
"""


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
    out = tmp_path / "run"
    config = write_yaml(tmp_path / "r.yaml", settings | {"out": out})
    result = run_program("python", "-c", FULL, "--config", config, 4)
    assert result.returncode == 2, result.stderr
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith(f"error: {out}: step 5 cannot be saved (")
    assert error.endswith("the state of step-4 is kept: make room, then go on with --resume")
    assert "Traceback" not in result.stderr
    assert (out / "state" / "latest").read_text() == "step-4\n"
    assert not same(out, undisturbed), "the checkpoint of step 4"
    resumed = run_program("python", "train/pretrain.py", "--config", config, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert same(out, undisturbed)


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


def test_a_half_written_state_is_never_taken_for_whole(
    settings: dict[str, Any], undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """A newer one that is not named, as a kill leaves it, is not looked at; a damaged one that is named is refused."""
    out = tmp_path / "run"
    config = write_yaml(tmp_path / "r.yaml", settings | {"out": out})
    first = run_program("python", "-c", FULL, "--config", config, 4)
    assert first.returncode == 2
    (out / "state" / "step-5" / "mp_rank_00_model_states.pt").parent.mkdir(exist_ok=True)
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
