"""The picture of ``train.evaluate_icl``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from train.icl_report import CHANCE, NONE, SHOTS, Point, Report, Row
from train.icl_suite import CONTROLS, PARTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

WIDTH = 11.0  # inches
COLORS = [plt.colormaps["tab20"](number) for number in range(20)]
BARS = {SHOTS: "tab:blue", **dict(zip(CONTROLS, ("0.45", "0.65", "0.82"), strict=True))}  # colours


def plot(report: Report, path: Path) -> None:
    """Accuracy against shots of each part with its 95 % bands, controls as bars, and the transcripts."""
    labels = [row for row in report.rows if row.part != "D"]
    words = [row for row in report.rows if row.part == "D"]
    parts = [[row for row in labels if row.part == part] for part in PARTS]
    parts = [rows for rows in parts if rows]
    heights = [1 + max(1.8, 0.22 * len(rows)) for rows in parts] + [4.6] * bool(labels) + [3.2] * bool(words)
    figure = plt.figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    places = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat)
    for rows in parts:
        left, right = places.pop(0).subplots(1, 2, width_ratios=(3, 1))
        draw_shots(left, right, rows)
    if labels:
        draw_controls(places.pop(0).subplots(), labels)
    if words:
        for axis, row in zip(places.pop(0).subplots(1, len(words), squeeze=False)[0], words, strict=True):
            draw_words(axis, row)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_shots(axis: Axes, beside: Axes, rows: Sequence[Row]) -> None:
    """A line and a band for each row, and which is which beside them."""
    counts = sorted({p.shots for row in rows for p in row.points if p.condition == SHOTS})
    for number, row in enumerate(rows):
        points = [p for p in row.points if p.condition == SHOTS]
        places, color = [counts.index(p.shots) for p in points], COLORS[number % len(COLORS)]
        axis.plot(places, [p.value for p in points], "o-", color=color, lw=2, ms=5, label=row.name)
        axis.fill_between(places, [p.low for p in points], [p.high for p in points], color=color, alpha=0.12, lw=0)
    axis.axhline(CHANCE, color="0.3", ls="--", lw=1)
    axis.set_title(f"{rows[0].part}. {PARTS[rows[0].part]}", loc="left", fontsize=12)
    axis.set_xticks(range(len(counts)), [str(count) for count in counts])
    axis.set(xlabel="shots of each class (k)", ylabel="accuracy %", ylim=(0, 103))
    beside.set_axis_off()
    beside.legend(*axis.get_legend_handles_labels(), loc="center left", fontsize=9, frameon=False)


def draw_controls(axis: Axes, rows: Sequence[Row]) -> None:
    """Bars of each row: true shots, and the controls."""
    width = 0.8 / len(BARS)
    for number, (condition, color) in enumerate(BARS.items()):
        points = [row.controlled[1] if condition == SHOTS else row.point(condition) for row in rows]
        found = [(place, p) for place, p in enumerate(points) if p]
        values = [p.value for _, p in found]
        spread = _spread([p for _, p in found])
        places = [place + (number - (len(BARS) - 1) / 2) * width for place, _ in found]
        name = "true shots" if condition == SHOTS else condition
        axis.bar(places, values, width, color=color, yerr=spread, error_kw={"lw": 0.8}, label=name)
    axis.axhline(CHANCE, color="0.3", ls="--", lw=1)
    axis.set_title(f"Controls, k = {max(row.controlled[1].shots for row in rows)}", loc="left", fontsize=12)
    axis.set_xticks(range(len(rows)), [row.name for row in rows], rotation=40, ha="right", fontsize=9)
    axis.set(ylabel="accuracy %", ylim=(0, 103), xlim=(-0.6, len(rows) - 0.4))
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(BARS), fontsize=9, frameon=False)


def draw_words(axis: Axes, row: Row) -> None:
    """Lines from the score without shots, one for each condition."""
    without = [p for p in row.points if p.condition == NONE]
    conditions = dict.fromkeys(p.condition for p in row.points if p.condition != NONE)
    for condition, color in zip(conditions, ("tab:blue", "0.55"), strict=True):
        points = without + [p for p in row.points if p.condition == condition]
        values = [p.value for p in points]
        axis.errorbar(
            [p.shots for p in points], values, _spread(points), fmt="o-", color=color, capsize=3, label=condition
        )
    axis.set_title(f"D. {row.name}", loc="left", fontsize=12)
    axis.set_xticks(sorted({p.shots for p in row.points}))
    axis.set(xlabel="shots", ylabel=row.unit, ylim=(0, None if row.unit == "WER %" else 103))
    axis.legend(fontsize=9)


def _spread(points: Sequence[Point]) -> list[list[float]]:
    """How far below and above the values their intervals end, ``[2, points]``; 0 where rounding says less."""
    return [[max(0.0, p.value - p.low) for p in points], [max(0.0, p.high - p.value) for p in points]]
