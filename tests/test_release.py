"""A release: stages in order, stamps, what is taken up, what is refused, and what it cost."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from conftest import ROOT, command
from typer import Typer
from typer.testing import CliRunner

from speechllm.errors import InputError
from train import assemble
from train import release as train_release
from train.config import read_config
from train.release import Release
from train.stage_costs import Cost, Rapl, of_stages, read_costs, together

# Notes what it was given; with a second word it waits for Ctrl-C, says so, and ends.
STAGE = """
import sys, time
from pathlib import Path
path, *words = sys.argv[1:]
with Path(path).open("a") as file:
    print(*words, file=file)
if "wait" in words and "--resume" not in words:
    try:
        Path(path).with_name("state").touch()
        time.sleep(60)
    except KeyboardInterrupt:
        Path(path).with_name("stopped").touch()
        sys.exit(1)
"""
# Starts a process that ends after it, as a launcher that is interrupted leaves its ranks.
LAUNCHER = """
import subprocess, sys
rank = '''
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, lambda *_: stop.append(True))
stop = []
Path(sys.argv[1]).touch()
while not stop:
    time.sleep(0.01)
time.sleep(0.5)
sum(range(3_000_000))
Path(sys.argv[2]).touch()
'''
subprocess.Popen([sys.executable, "-c", rank, *sys.argv[1:]])
import time
time.sleep(60)
"""


def python(code: str, *words: object) -> str:
    return shlex.join(["python", "-c", code, *map(str, words)])


def recipe(folder: Path, stages: dict[str, Any], **settings: Any) -> Path:
    """A config file; unlike write_yaml it keeps the order of the stages."""
    told = {"out": folder / "out", "stages": stages, **settings}
    path = folder / "release.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(told, default=str)), sort_keys=False))
    return path


def arguments(config: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "train.release", "--config", str(config), *options]


def release(config: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments(config, *options), cwd=ROOT, capture_output=True, text=True, timeout=60)


def plan(config: Path, *options: str) -> Result:
    """A dry run; in this process, since it starts nothing."""
    app = Typer()
    app.command()(train_release.main)
    return CliRunner().invoke(app, ["--config", str(config), "--dry-run", *options], catch_exceptions=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "settings.yaml").write_text("steps: 1\n")
    return tmp_path


@pytest.fixture
def config(folder: Path) -> Path:
    """Three stages that note in ``ran`` what they were given; the last is left out unless it is named."""
    ran = folder / "ran"
    return recipe(
        folder,
        {
            "one": {"command": python(STAGE, ran, "one", folder / "settings.yaml")},
            "two": {"command": python(STAGE, ran, "two")},
            "put": {"command": python(STAGE, ran, "put"), "only_by_name": True},
        },
    )


def ran(folder: Path) -> list[str]:
    """The stages that have been run, and with what beside paths."""
    path = folder / "ran"
    lines = path.read_text().splitlines() if path.exists() else []
    return [" ".join(word for word in line.split() if "/" not in word) for line in lines]


def test_stages_are_done_once_and_in_order(config: Path, folder: Path) -> None:
    first = release(config)
    assert first.returncode == 0, first.stderr
    assert ran(folder) == ["one", "two"]
    assert "[1/3] one: done in" in first.stdout and "--only put" in first.stdout
    again = release(config)
    assert again.returncode == 0 and "[2/3] two: done already" in again.stdout
    assert ran(folder) == ["one", "two"]
    assert release(config, "--only", "put").returncode == 0
    assert ran(folder) == ["one", "two", "put"]


def test_what_changed_is_done_again_with_all_after_it(config: Path, folder: Path) -> None:
    release(config)
    (folder / "settings.yaml").write_text("steps: 2\n")
    release(config)
    assert ran(folder) == ["one", "two"] * 2
    (folder / "out" / "stamps" / "one.json").unlink()  # done anew, though nothing changed
    release(config)
    assert ran(folder) == ["one", "two"] * 3


def test_from_leaves_out_and_only_is_alone(config: Path, folder: Path) -> None:
    assert release(config, "--from", "two").returncode == 0
    assert ran(folder) == ["two"]
    assert release(config, "--only", "one").returncode == 0
    assert ran(folder) == ["two", "one"]
    assert release(config).returncode == 0  # what came before stage two was not there when that was done
    assert ran(folder) == ["two", "one", "two"]


def test_dry_run(config: Path, folder: Path) -> None:
    release(config, "--only", "one")
    told = plan(config)
    assert told.exit_code == 0 and ran(folder) == ["one"] and "put" not in told.stdout
    done, left = [line.partition(": ") for line in told.stdout.split("\n") if line.startswith(("one", "two"))]
    assert done[0] == "one (done)" and left[0] == "two"
    stages = yaml.safe_load(config.read_text())["stages"]
    assert all(stages[name]["command"] in told.stdout for name in ("one", "two"))
    (folder / "settings.yaml").write_text("steps: 2\n")
    assert "(done)" not in plan(config).stdout


def test_a_failure_ends_it_with_its_exit_code(folder: Path) -> None:
    stages = {
        "one": {"command": python("import sys; sys.exit('no room')")},
        "two": {"command": python("import os; os.kill(os.getpid(), 9)")},
        "three": {"command": python(STAGE, folder / "ran", "three")},
    }
    config = recipe(folder, stages)
    failed = release(config)
    assert failed.returncode == 1 and ran(folder) == []
    assert "no room" in failed.stderr and "error: stage one failed with exit code 1" in failed.stderr
    assert release(config, "--from", "two").returncode == 128 + 9
    outcomes = [(cost.stage, cost.outcome) for cost in read_costs(folder / "out" / "stages.jsonl")]
    assert outcomes == [("one", "failed"), ("two", "failed")]
    assert release(config).returncode == 1  # it was not done


def interrupt(config: Path, once: Path, number: int = signal.SIGINT) -> tuple[int, str]:
    """Send a signal when the file is there; exit code and standard error."""
    process = subprocess.Popen(arguments(config), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not once.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    return process.returncode, error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_stage_is_taken_up(folder: Path, number: int) -> None:
    stages = {
        "one": {"command": python(STAGE, folder / "ran", "one")},
        "two": {"command": python(STAGE, folder / "ran", "two", "wait"), "state": folder / "state"},
    }
    config = recipe(folder, stages)
    code, error = interrupt(config, folder / "state", number)
    assert code == 130 and (folder / "stopped").exists()
    assert error.count("\n") == 1 and f"go on with: python -m train.release --config {config}" in error
    assert "two wait --resume" in " ".join(plan(config).stdout.splitlines()[-1].split()[-3:])
    assert release(config).returncode == 0
    assert ran(folder) == ["one", "two wait", "two wait --resume"]
    costs = read_costs(folder / "out" / "stages.jsonl")
    assert [cost.outcome for cost in costs] == ["done", "interrupted", "done"]
    both = of_stages(costs)[1]
    assert both.outcome == "done" and both.seconds == pytest.approx(costs[1].seconds + costs[2].seconds)


def test_what_was_begun_otherwise_is_not_taken_up(folder: Path) -> None:
    settings = folder / "settings.yaml"
    stages = {"one": {"command": python(STAGE, folder / "ran", "one", settings), "state": folder / "state"}}
    config = recipe(folder, stages)
    (folder / "state").touch()
    refused = release(config)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert f"stages.one: {folder / 'state'} is of a run" in refused.stderr
    (folder / "state").unlink()
    assert release(config).returncode == 0
    (folder / "state").touch()
    settings.write_text("steps: 2\n")
    assert release(config).returncode == 2
    assert ran(folder) == ["one"]


@pytest.mark.skipif(sys.platform != "linux", reason="who waits for orphans is a matter of Linux")
def test_an_interruption_waits_for_what_the_stage_started(folder: Path) -> None:
    config = recipe(folder, {"one": {"command": python(LAUNCHER, folder / "begun", folder / "saved")}})
    code, _ = interrupt(config, folder / "begun")
    assert code == 130 and (folder / "saved").exists()
    (cost,) = read_costs(folder / "out" / "stages.jsonl")
    assert cost.seconds > 0.5


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_a_failure_leaves_nothing_that_the_stage_started(folder: Path) -> None:
    failing = (
        "import subprocess, sys; from pathlib import Path; "
        "rank = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "Path(sys.argv[1]).write_text(str(rank.pid)); sys.exit(3)"
    )
    config = recipe(folder, {"one": {"command": python(failing, folder / "rank")}})
    assert release(config).returncode == 3
    assert not Path("/proc", (folder / "rank").read_text()).exists()


def test_costs(folder: Path) -> None:
    burn = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    config = recipe(folder, {"one": {"command": python(burn)}}, watts_per_core=20)
    told = release(config)
    (cost,) = read_costs(folder / "out" / "stages.jsonl")
    assert 0.3 <= cost.cpu_seconds < 2 and cost.seconds >= cost.cpu_seconds * 0.5
    if not Rapl().readable:
        assert cost.joules == pytest.approx(20 * cost.cpu_seconds, rel=0.01)
        assert "energy: an estimate, processor time × 20 W a core" in told.stdout


def test_stages_add_up_their_last_run_alone() -> None:
    starts = (("old", "interrupted"), ("new", "done"), ("new", "interrupted"), ("new", "done"))
    made = [Cost("one", key, outcome, 10.0, 5.0, 50.0, "x") for key, outcome in starts]
    (one,) = of_stages(made)
    assert (one.key, one.seconds, one.cpu_seconds, one.joules) == ("new", 20.0, 10.0, 100.0)
    assert together(made).seconds == 40


def test_energy_counters_that_go_round(tmp_path: Path) -> None:
    for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:1", "psys")):
        (tmp_path / zone).mkdir()
        for file, content in (("name", name), ("energy_uj", "9000000"), ("max_energy_range_uj", "10000000")):
            (tmp_path / zone / file).write_text(f"{content}\n")
    rapl = Rapl(tmp_path)
    assert rapl.readable and not Rapl(tmp_path / "none").readable
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1500000\n")
    rapl.sample()
    assert rapl.joules == pytest.approx(2.5)
    rapl.sample()
    assert rapl.joules == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        ({"one": {"command": "nothing-like-it"}}, (), "stages.one: nothing-like-it: no such program"),
        ({"one": {"command": "python x.yaml"}}, (), "stages.one: x.yaml: no such file"),
        ({"one": {"command": "python 'x"}}, (), "stages.one: No closing quotation"),
        ({"one": {"command": "python", "shell": "bash"}}, (), "stages.one.shell: Extra inputs"),
        ({"../one": {"command": "python"}}, (), "String should match pattern"),
        ({"one": {"command": "python"}}, ("--from", "two"), "--from two: no such stage; there are one"),
        ({"one": {"command": "python"}}, ("--from", "one", "--only", "one"), "exclude each other"),
    ],
)
def test_mistakes_take_one_line(folder: Path, stages: dict[str, Any], options: tuple[str, ...], message: str) -> None:
    told = plan(recipe(folder, stages), *options)
    assert told.exit_code == 2 and told.stderr.count("\n") == 1
    assert message in told.stderr and not (folder / "out").exists()


def test_a_damaged_stamp_is_told(config: Path, folder: Path) -> None:
    release(config)
    (folder / "out" / "stamps" / "one.json").write_text("{")
    told = release(config)
    assert told.returncode == 2 and "one.json: damaged" in told.stderr


def test_the_recipe_of_the_shipped_checkpoint() -> None:
    shipped = read_config(ROOT / "train" / "configs" / "release.yaml", Release)
    assert list(shipped.stages)[-1] == "install" and shipped.stages["install"].only_by_name
    for name, stage in shipped.stages.items():
        program, *words = stage.words
        script = ROOT / (words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[2])
        assert program in ("python", "deepspeed") and script.is_file(), name
        if stage.state is not None:
            assert "--resume" in script.read_text() or "resume:" in script.read_text(), name


def test_assembling(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "release"
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "large").write_bytes(bytes(1_000_000))
    size = assemble.megabytes([tiny_checkpoint])
    given = ("--out", out, "--beside", tmp_path / "beside", "--at-most-mb", size + 1.1)
    (out / "old").mkdir(parents=True)
    assert f"{size + 1:.1f} MB" in command(assemble.main, tiny_checkpoint, *given)
    assert {p.relative_to(out) for p in out.rglob("*")} == {
        p.relative_to(tiny_checkpoint) for p in tiny_checkpoint.rglob("*")
    }
    with pytest.raises(InputError, match=r"beside \(1\.0\) are .* more than --at-most-mb"):
        assemble.assemble(tiny_checkpoint, out, [tmp_path / "beside"], size + 0.9)
    with pytest.raises(InputError, match="not a checkpoint folder"):
        assemble.assemble(tmp_path / "beside", out, [], None)
    with pytest.raises(InputError, match="holds what is to be copied"):
        assemble.assemble(out, out, [], None)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".new", ".old")]
    assert json.loads((out / "speechllm.json").read_text())["name"] == "tiny random"
    assert os.access(out / "lm", os.R_OK)
