"""Evaluations of several training runs side by side: ``python -m train.evaluate --compare RUN/results.json …``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from speechllm.errors import InputError
from train.evaluate_report import geometric_mean, scores, shown
from train.results import NAMES, Evaluation, Target

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Run = tuple[str, Evaluation]


def compare(runs: Sequence[tuple[str, Evaluation]], axes: Sequence[str], out: Path) -> str:
    """Write ``compare.md`` and, where two rows are there to be drawn, ``pareto.png``; returns the table.

    runs: path and results of each. axes: "SET TASK", two of them; without, the first two rows that all runs have.
    Raises InputError.
    """
    named = [(_name(path, runs), evaluation) for path, evaluation in runs]
    targets: dict[str, Target] = {}
    for _, evaluation in named:
        targets |= {t.key: t for t in evaluation.targets if t.trained and t.key not in targets}
    every = [scores(evaluation) for _, evaluation in named]
    common = [key for key in targets if all(key in own for own in every)]
    chosen = list(axes) or common[:2]
    if axes and (len(axes) != 2 or any(key not in targets for key in axes)):
        raise InputError(f"--axis: give it twice, each one of {', '.join(map(repr, targets))}")
    table = _table(named, targets, common)
    (out / "compare.md").write_text(table, encoding="utf-8")
    if len(chosen) == 2:
        points = [(name, own[chosen[0]], own[chosen[1]]) for (name, _), own in zip(named, every, strict=True)
                  if chosen[0] in own and chosen[1] in own]  # fmt: skip
        _plot(points, [targets[key] for key in chosen], out / "pareto.png")
    return table


def _name(path: str, runs: Sequence[tuple[str, Evaluation]]) -> str:
    """The folder of a run; its whole path where two folders are called alike."""
    folders = [Path(other).parent.name for other, _ in runs]
    own = Path(path).parent
    return own.name if own.name and folders.count(own.name) == 1 else str(own)


def _table(named: Sequence[Run], targets: dict[str, Target], common: Sequence[str]) -> str:
    """Every row with the scores of all runs. common: rows that all runs have."""
    lines = ["| row | metric | " + " | ".join(name for name, _ in named) + " |", "| --- " * (2 + len(named)) + "|"]
    for target in targets.values():
        cells = [shown(evaluation.whole(target)) or "–" for _, evaluation in named]
        lines.append(f"| {target.label} | {NAMES[target.metric]} | " + " | ".join(cells) + " |")
    if common:
        means = [geometric_mean([scores(e)[key] for key in common]) for _, e in named]
        lines.append(
            f"| geometric mean of the {len(common)} rows of all runs | 0–100 | "
            + " | ".join(f"{mean:.1f}" for mean in means)
            + " |"
        )
    return "\n".join(lines) + "\n"


def _plot(points: Sequence[tuple[str, float, float]], targets: Sequence[Target], path: Path) -> None:
    """Runs by two scores from 0 to 100; the line joins those that no other run beats in both (the Pareto front)."""
    front = [(x, y) for _, x, y in points if not any(a >= x and b >= y and (a, b) != (x, y) for _, a, b in points)]
    figure, axis = plt.subplots(figsize=(7, 5.5), layout="constrained")
    axis.plot(*zip(*sorted(front), strict=True), color="tab:blue", lw=1, alpha=0.6, label="Pareto front")
    for name, x, y in points:
        axis.plot(x, y, "o", color="tab:blue" if (x, y) in front else "0.6")
        axis.annotate(name, (x, y), textcoords="offset points", xytext=(6, 5), fontsize=8)
    labels = [f"{target.label}: score (of {NAMES[target.metric]}), more is better" for target in targets]
    axis.set(xlabel=labels[0], ylabel=labels[1])
    axis.margins(0.15)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
