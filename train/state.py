"""What a run goes on from: the newest of its states that was saved whole."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import deepspeed
from torch import distributed

from speechllm.errors import InputError
from train.ranks import nothing, write_together

STATE = "state"  # in the folder of a run


def check_begun(out: Path, resume: bool) -> None:
    """Raises InputError when ``out`` holds a run that is not to be resumed."""
    if (out / STATE).exists() and not resume:
        raise InputError(f"{out}: holds a run already: add --resume to go on, or set another 'out'")


@dataclass(frozen=True)
class Layout:
    """How a state is cut into files."""

    world: int
    zero_stage: int
    expert_parallel: int
    spread: bool = False  # whether DeepSpeed holds the experts, even where those of a layer are on one rank

    def __str__(self) -> str:
        return f"{self.world} ranks, zero_stage {self.zero_stage}, expert_parallel {self.expert_parallel}"


class RunState:
    """States in ``folder/step-N``. ``folder/latest`` names the one that counts: it is replaced, as a whole, when a
    newer one is complete, and only then are older ones removed. What a killed process left half-written is never read.
    """

    def __init__(self, folder: Path, layout: Layout):
        self.folder, self.layout = folder, layout

    @property
    def tag(self) -> str | None:
        """Name of the state that counts; None when none was saved."""
        latest = self.folder / "latest"
        return latest.read_text(encoding="utf-8").strip() if latest.exists() else None

    def saved_as(self) -> Layout:
        """How the state that counts is cut. Raises InputError when its description is missing or damaged."""
        path = self.folder / f"{self.tag}" / "layout.json"
        try:
            return Layout(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: damaged, or saved by an older version: start anew with another 'out'") from error

    @property
    def universal(self) -> bool:
        """Whether the state that counts must be made universal first: ranks now are to hold other parts of it."""
        if self.tag is None:
            return False
        saved = self.saved_as()
        if saved.expert_parallel == self.layout.expert_parallel and not saved.zero_stage and not self.layout.zero_stage:
            return False  # each rank holds all of it
        return replace(saved, spread=False) != self.layout

    @cached_property
    def spread(self) -> bool:
        """Whether DeepSpeed is to hold the experts, even those of one rank: a state keeps the form it was saved in.

        Raises:
            InputError: the state was saved in the other form.
        """
        spread = self.layout.expert_parallel > 1
        if self.tag and spread and not self.saved_as().spread:
            raise InputError(
                f"{self.folder / self.tag}: saved with expert_parallel = 1: go on with that, or begin a new run with "
                "its checkpoint as start_from"
            )
        return spread or (self.tag is not None and self.saved_as().spread)

    def save(self, engine: deepspeed.DeepSpeedEngine, step: int, client: dict[str, Any]) -> None:
        """Write the state after ``step``; all ranks must call it. When it fails, the one before still counts.

        Raises:
            SavingError: on all ranks, when a file cannot be written.
        """
        tag, layout = f"step-{step}", replace(self.layout, spread=self.spread)
        new = self.folder / tag
        first = distributed.get_rank() == 0

        def prepare() -> None:
            if tag != self.tag:
                shutil.rmtree(new, ignore_errors=True)  # of a run that was killed as it saved, perhaps with more ranks
            new.mkdir(parents=True, exist_ok=True)

        def complete() -> None:
            (new / "layout.json").write_text(json.dumps(asdict(layout)) + "\n", encoding="utf-8")
            self._count(tag)

        write_together(prepare if first else nothing)
        write_together(lambda: save_whole(engine, self.folder, tag, client))
        write_together(complete if first else nothing)

    def _count(self, tag: str) -> None:
        """From now on ``tag`` is what a run goes on from."""
        pointer = self.folder / "latest.new"
        pointer.write_text(tag + "\n", encoding="utf-8")
        pointer.replace(self.folder / "latest")
        for older in self.folder.glob("*step-*"):
            if older.name != tag:
                shutil.rmtree(older)

    def load(self, engine: deepspeed.DeepSpeedEngine) -> dict[str, Any]:
        """Restore ``engine``, which was started with :attr:`universal`; what was given to :meth:`save` as ``client``.

        Raises:
            InputError: files are missing or damaged.
        """
        tag = self.tag
        assert tag is not None
        if self.universal:
            tag = self._universal(tag)
        groups = [dict(group) for group in engine.optimizer.param_groups]
        try:
            _, client = engine.load_checkpoint(str(self.folder), tag=tag)
        except (OSError, RuntimeError, LookupError, ValueError, EOFError, AssertionError, UnpicklingError) as error:
            reason = textwrap.shorten(str(error) or type(error).__name__, 300)
            raise InputError(
                f"{self.folder / tag}: cannot be read ({reason}): keep the settings it was saved with, or start anew "
                "with another 'out'"
            ) from error
        if client is None:
            raise InputError(f"{self.folder / tag}: files are missing: start anew with another 'out'")
        for group, own in zip(engine.optimizer.param_groups, groups, strict=True):
            if "name" in own:  # of the ranks that hold a layer's experts: the state has that of those that saved it
                group["name"] = own["name"]
        return client

    def _universal(self, tag: str) -> str:
        """The state ``tag`` in a form that any number of ranks can read, beside it."""
        made, saved = f"universal-{tag}", self.saved_as()
        if distributed.get_rank() == 0:
            shutil.rmtree(self.folder / made, ignore_errors=True)
            folders = ("--input_folder", self.folder / tag, "--output_folder", self.folder / made)
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *map(str, folders)]
            result = subprocess.run([*command, "--inject_missing_state"], capture_output=True, text=True)
            if result.returncode:
                reason = (result.stderr.strip() or "killed").splitlines()[-1]
                raise InputError(f"{self.folder / tag}: cannot be made universal ({reason}): resume with {saved}")
        distributed.barrier()
        return made


def save_whole(engine: deepspeed.DeepSpeedEngine, folder: Path, tag: str, client: dict[str, Any]) -> None:
    """DeepSpeed's saving, in which ranks wait for one another even when one of them cannot write.

    Raises:
        OSError, RuntimeError: that of the first file of this rank that cannot be written, when all ranks are through.
    """
    failures: list[Exception] = []

    def attempted(write: Callable[..., None]) -> Callable[..., None]:
        def attempt(*arguments: Any, **named: Any) -> None:
            try:
                write(*arguments, **named)
            except (OSError, RuntimeError) as error:
                failures.append(error)

        return attempt

    writers = ((engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script"))
    for owner, name in writers:
        setattr(owner, name, attempted(getattr(owner, name)))
    try:
        engine.save_checkpoint(str(folder), tag=tag, client_state=client, save_latest=False)
    finally:
        for owner, name in writers:
            delattr(owner, name)  # the method of its class is seen again
    if failures:
        raise failures[0]
