"""What a training run leaves behind: one JSON object per record, TensorBoard scalars, and a plot."""

from __future__ import annotations

import json
import time
from pathlib import Path

import matplotlib
from torch.utils.tensorboard import SummaryWriter

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class MetricLog:
    """Appends scalars to ``folder/metrics.jsonl`` and to TensorBoard; a resumed run goes on in the same files."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._board = SummaryWriter(str(folder / "tensorboard"))
        self._start = time.monotonic()

    def write(self, step: int, **scalars: float) -> None:
        record = {"step": step, "seconds": round(time.monotonic() - self._start, 1)}
        record |= {name: round(float(value), 6) for name, value in scalars.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self) -> None:
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Records of a ``metrics.jsonl``; of a step written twice (before and after a resume) the later one counts."""
    latest: dict[tuple[str, str], dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        latest[(str(record["step"]), " ".join(record))] = record
    return sorted(latest.values(), key=lambda record: record["step"])


def plot_metrics(path: Path, panels: dict[str, list[str]], out: Path) -> None:
    """One panel for each title, with the scalars named for it, over the steps; four in a row."""
    records = read_metrics(path)
    columns, rows = min(4, len(panels)), -(-len(panels) // 4)
    figure, axes = plt.subplots(rows, columns, figsize=(4.5 * columns, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        for name in names:
            points = [(r["step"], r[name]) for r in records if name in r]
            if points:
                axis.plot(*zip(*points, strict=True), label=name)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)
