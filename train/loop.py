"""The frame around a single-process training loop: steps, progress bar, running means, checkpoints, interruption."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType, TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from speechllm.errors import InputError
from train.log import MetricLog, plot_metrics


def cosine(step: int, warmup: int, steps: int, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def training_device() -> torch.device:
    """Where a single process trains: on a GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def progress_bar(console: Console | None = None) -> Progress:
    """The one look of all progress bars."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM arrived; the state had been saved when it was raised."""


class Loop:
    """Counts steps, logs, saves every ``SAVE_EVERY`` steps and when interrupted, and takes up a saved run."""

    SAVE_EVERY, LOG_EVERY = 500, 20

    def __init__(
        self,
        name: str,
        out: Path,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int,
        resume: bool,
        base: str = "",
    ):
        """base: of what the module is trained on top; a run is not taken up on another.

        Raises InputError for a run that is there and not to be resumed, or is of other modules or another base.
        """
        self.name, self.module, self.optimizer, self.total = name, module, optimizer, steps
        self.folder = out / name
        self.state_path = self.folder / "state.pt"
        self.step = 0
        if self.state_path.exists():
            if not resume:
                raise InputError(f"{self.folder}: holds a run already: add --resume to go on, or set another 'out'")
            self.step = self._restore(base)
        self.base = base
        self.log = MetricLog(self.folder)
        self.progress = progress_bar()
        self._sums: dict[str, tuple[float, int]] = {}
        self._stop = False

    def _restore(self, base: str) -> int:
        """Module and optimizer as they were saved, but for what the settings say of the optimizer; the step."""
        own = [{name: value for name, value in g.items() if name != "params"} for g in self.optimizer.param_groups]
        try:
            state = torch.load(self.state_path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
            raise InputError(f"{self.state_path}: damaged: remove {self.folder} to start anew") from error
        if state.get("base", base) != base:
            raise InputError(f"{self.folder}: is on top of another codebook 0: remove it, or set another 'out'")
        try:
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{self.folder}: of other settings: set these again, or another 'out'") from error
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)
        return int(state["step"])

    def __enter__(self) -> Loop:
        self._previous = {s: signal.signal(s, self._ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self.log.close()

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop = True  # the step under way is finished first

    def range(self) -> range:
        """The steps still to do."""
        return range(self.step, self.total)

    def steps(self) -> Iterator[int]:
        """Yields each step still to do; after the caller's work on it, logs and saves."""
        task = self.progress.add_task(self.name, total=self.total, completed=self.step)
        for step in self.range():
            torch.manual_seed(step)  # quantisers draw random numbers: a resumed run must draw the same
            yield step
            self.step = step + 1
            if self.step % self.LOG_EVERY == 0:
                self.log.write(self.step, **{name: total / count for name, (total, count) in self._sums.items()})
                self._sums.clear()
            if self._stop or self.step % self.SAVE_EVERY == 0 or self.step == self.total:
                self.save()
            self.progress.update(task, completed=self.step)
            if self._stop:
                raise Interrupted(f"stopped after step {self.step}; go on with --resume")

    def save(self) -> None:
        """Write the state under another name first, so that an interruption leaves the old one whole."""
        new = self.state_path.with_suffix(".new")
        state = {"step": self.step, "base": self.base}
        torch.save(state | {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}, new)
        new.replace(self.state_path)

    def scalars(self, **values: float) -> None:
        """Values of this step; their means are logged every ``LOG_EVERY`` steps."""
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)

    def evaluation(self, **values: float) -> None:
        """Values measured on held-out data after this step; logged and shown at once."""
        self.log.write(self.step + 1, **values)
        shown = "  ".join(f"{name} {value:.2f}" for name, value in values.items())
        self.progress.console.print(f"step {self.step + 1}: {shown}", highlight=False)

    def plot(self, panels: dict[str, list[str]]) -> None:
        plot_metrics(self.log.path, panels, self.folder / "training.png")
