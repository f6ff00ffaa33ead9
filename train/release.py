"""Make a checkpoint from nothing, and all that is said of it: ``python -m train.release``, or ``make train-tiny``.

The YAML file names the stages, each a command. What is done is not done again, what was interrupted is taken up:
a stage has a stamp that follows from its command, the YAML files in that and the stamps of all stages before it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from pydantic import Field

from speechllm.errors import InputError
from train.commands import plain_errors
from train.config import Settings, read_config
from train.output import write_whole
from train.stage_costs import MEASURED, Cost, Outcome, Rapl, add_cost, cost_table, estimated, of_stages, read_costs

COSTS = "stages.jsonl"
SAMPLE_SECONDS = 60.0  # between readings of energy counters, which go round within some minutes at the soonest
PR_SET_CHILD_SUBREAPER = 36  # of prctl(2)
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class Stage(Settings):
    """One command of the recipe."""

    command: str = Field(min_length=1, description="as in a shell, but there is none; python is this one")
    state: Path | None = Field(
        None, description="what a run that was begun leaves: when it is there the command is given --resume"
    )
    only_by_name: bool = Field(False, description="left out unless --only names it")

    @property
    def words(self) -> list[str]:
        return shlex.split(self.command)


class Release(Settings):
    """The YAML file."""

    out: Path = Field(description="folder of stages.jsonl and of the stamps")
    watts_per_core: float = Field(
        10.0, gt=0, description="what an estimate of energy assumes, where processors' counters cannot be read"
    )
    stages: dict[Name, Stage] = Field(min_length=1, description="in order")

    def check(self, names: list[str]) -> None:
        """Raises InputError when a command of these stages, or a YAML file that it is given, is not there."""
        for name in names:
            stage = self.stages[name]
            try:
                program, *arguments = stage.words
            except ValueError as error:
                raise InputError(f"stages.{name}: {error}: {stage.command}") from error
            if find_program(program) is None:
                raise InputError(
                    f"stages.{name}: {program}: no such program; pip install -e '.[train]' has all of them"
                )
            if missing := [path for path in map(Path, arguments) if is_config(path) and not path.is_file()]:
                raise InputError(f"stages.{name}: {missing[0]}: no such file; write it, or correct the command")


def is_config(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml")


def find_program(name: str) -> str | None:
    """Its path: of this environment, or else anywhere."""
    if name == "python":
        return sys.executable
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


class Stopped(Exception):
    """Ctrl-C or SIGTERM arrived, and the stage has ended."""


@dataclass(frozen=True)
class Stamps:
    """What is known of the stages: a file for each that was begun."""

    release: Release

    def path(self, name: str) -> Path:
        return self.release.out / "stamps" / f"{name}.json"

    def key(self, name: str) -> str:
        """Follows from all that the result of the stage depends on, as far as the recipe tells."""
        digest = hashlib.sha256()
        for other, stage in self.release.stages.items():
            if other == name:
                break
            if not stage.only_by_name:
                digest.update(self.path(other).read_bytes() if self.path(other).exists() else b"none")
        words = self.release.stages[name].words
        digest.update(json.dumps(words).encode())
        for path in filter(is_config, map(Path, words)):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    def read(self, name: str) -> Mapping[str, object]:
        """Empty when there is none. Raises InputError when it is damaged."""
        path = self.path(name)
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
        except ValueError as error:
            raise InputError(f"{path}: damaged ({error}); remove it to do the stage again") from error

    def write(self, name: str, key: str, done: bool) -> None:
        """The time is part of it: what was done again invalidates all after it."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"key": key, "done": done, "time": time.time()}) + "\n")

    def is_done(self, name: str) -> bool:
        stamp = self.read(name)
        return bool(stamp.get("done")) and stamp["key"] == self.key(name)

    def words(self, name: str) -> list[str]:
        """The command, with --resume when it is to take up what was begun.

        Raises:
            InputError: something was begun that is not this stage as it is now.
        """
        stage = self.release.stages[name]
        if stage.state is None or not stage.state.exists():
            return stage.words
        if self.read(name).get("key") != self.key(name):
            raise InputError(
                f"stages.{name}: {stage.state} is of a run that was begun with another command, config or earlier "
                "stage: remove that run's folder to do it again"
            )
        return [*stage.words, "--resume"]


def reap_orphans() -> None:
    """Have processes whose parent ends become this one's, which waits for them and counts their time (Linux)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and a closed terminal count as Ctrl-C, which even a shell's background may send."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run(words: list[str], rapl: Rapl) -> tuple[int, bool]:
    """A command to its end: its exit code, and whether it was interrupted.

    It has a process group of its own, so that all of its processes get one signal, and end before this returns. A
    second Ctrl-C kills them.
    """
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    program = find_program(words[0])
    assert program is not None
    process = subprocess.Popen([program, *words[1:]], env=os.environ | {"PATH": programs}, start_new_session=True)
    try:
        while True:
            try:
                code = process.wait(SAMPLE_SECONDS)
                if code:  # a launcher that was killed leaves its ranks
                    _end_group(process.pid)
                return code, False
            except subprocess.TimeoutExpired:
                rapl.sample()
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait()
                _wait_for_group(process.pid)
                break
            except KeyboardInterrupt:
                continue
            except ProcessLookupError:
                break
        return process.wait(), True


def _end_group(group: int) -> None:
    """Kill what is left of it: ranks that wait for one that is gone heed nothing else, and what they saved is whole."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    _wait_for_group(group)


def _wait_for_group(group: int) -> None:
    """Until no process of it is left: launchers may end before the ranks that they have started."""
    while True:
        try:
            os.waitpid(-group, 0)
        except ChildProcessError:
            return


def perform(release: Release, stamps: Stamps, name: str, place: str) -> None:
    """Do one stage, and write down what it cost.

    Raises:
        InputError: a run is in its way.
        typer.Exit: it failed, with its exit code (128 more than the signal that killed it).
        Stopped: it was interrupted.
    """
    words, key = stamps.words(name), stamps.key(name)
    typer.echo(f"[{place}] {name}: {shlex.join(words)}")
    stamps.write(name, key, done=False)
    rapl, begun, used = Rapl(), time.monotonic(), children_seconds()
    code, interrupted = run(words, rapl)
    seconds, cpu_seconds = time.monotonic() - begun, children_seconds() - used
    if rapl.readable:
        rapl.sample()
        joules, energy = rapl.joules, MEASURED
    else:
        joules, energy = cpu_seconds * release.watts_per_core, estimated(release.watts_per_core)
    outcome: Outcome = "interrupted" if interrupted else "failed" if code else "done"
    cost = Cost(name, key, outcome, round(seconds, 3), round(cpu_seconds, 3), round(joules, 3), energy)
    add_cost(release.out / COSTS, cost)
    if interrupted:
        raise Stopped(f"[{place}] {name}: stopped after {cost}")
    if code:
        code = code if code > 0 else 128 - code
        typer.echo(f"error: stage {name} failed with exit code {code} after {cost}; what it says is above", err=True)
        raise typer.Exit(code)
    stamps.write(name, key, done=True)
    typer.echo(f"[{place}] {name}: done in {cost}")


def children_seconds() -> float:
    """Processor time of all processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def chosen(release: Release, start: str | None, only: str | None) -> list[str]:
    """Names of the stages to do. Raises InputError for a name that there is not."""
    names = list(release.stages)
    for option, name in (("--from", start), ("--only", only)):
        if name is not None and name not in names:
            raise InputError(f"{option} {name}: no such stage; there are {', '.join(names)}")
    if only is not None:
        if start is not None:
            raise InputError("--from and --only exclude each other: give one of them")
        return [only]
    first = 0 if start is None else names.index(start)
    return [name for name in names[first:] if not release.stages[name].only_by_name or name == start]


def plan(release: Release, stamps: Stamps, names: list[str]) -> None:
    """Print what would be done."""
    undone = False  # what comes after a stage that is to be done is to be done too
    for name in names:
        words = release.stages[name].words
        done = stamps.is_done(name) and not undone
        undone = undone or not done
        if not done and stamps.read(name).get("key") == stamps.key(name):
            words = stamps.words(name)
        typer.echo(f"{name} (done): {shlex.join(words)}" if done else f"{name}: {shlex.join(words)}")


def perform_all(release: Release, stamps: Stamps, names: list[str]) -> None:
    """Do what is not done yet. Raises as :func:`perform` does."""
    reap_orphans()
    try:
        with interruptible():
            for name in names:
                place = f"{list(release.stages).index(name) + 1}/{len(release.stages)}"
                if stamps.is_done(name):
                    typer.echo(f"[{place}] {name}: done already; to do it again remove {stamps.path(name)}")
                else:
                    perform(release, stamps, name, place)
    except KeyboardInterrupt as stop:
        raise Stopped("stopped between stages") from stop


def report(release: Release) -> None:
    """Print what the stages cost."""
    path = release.out / COSTS
    costs = of_stages(read_costs(path)) if path.exists() else []
    typer.echo(cost_table([cost for cost in costs if cost.stage in release.stages]), nl=False)
    for energy in dict.fromkeys(cost.energy for cost in costs):
        typer.echo(f"energy: {energy}")


def main(
    config: Annotated[Path, typer.Option(help="the recipe, a YAML file")] = Path("train/configs/release.yaml"),
    start: Annotated[str | None, typer.Option("--from", help="leave out the stages before this one")] = None,
    only: Annotated[str | None, typer.Option(help="do this stage alone")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the commands")] = False,
) -> None:
    """Data, codec, codes, training, calibration, evaluation, model card: whatever of it is not done yet."""
    with plain_errors():
        release = read_config(config, Release)
        names, stamps = chosen(release, start, only), Stamps(release)
        release.check(names)
        if dry_run:
            plan(release, stamps, names)
            return
        try:
            perform_all(release, stamps, names)
        except Stopped as stop:
            again = ["python", "-m", "train.release", "--config", str(config)]
            again += ["--from", start] if start else ["--only", only] if only else []
            raise KeyboardInterrupt(f"{stop}; go on with: {shlex.join(again)}") from stop
    report(release)
    for name, stage in release.stages.items():
        if stage.only_by_name and name not in names:
            typer.echo(f"left: python -m train.release --config {config} --only {name}")


if __name__ == "__main__":
    typer.run(main)
