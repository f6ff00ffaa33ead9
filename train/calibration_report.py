"""The report of ``train.calibrate``: what is measured of each set, as JSON, Markdown and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from decimal import ROUND_FLOOR, Context
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np

from train.calibration import (
    BINS,
    Judgements,
    Kept,
    Reliability,
    abstention,
    at_coverage,
    auroc,
    brier,
    error_interval,
    reliability,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

POINTS = 20  # of a risk–coverage curve, at equal steps of coverage
SHOWN = (1.0, 0.9, 0.8, 0.7, 0.5)  # coverages in the table
BEFORE, AFTER = "0.6", "tab:blue"  # colours


@dataclass(frozen=True)
class Measures:
    """Confidences at one temperature. ECE in percent with its 95 % interval over clips."""

    ece: float
    low: float
    high: float
    brier: float
    bins: Reliability


@dataclass(frozen=True)
class Row:
    """The words, or the whole answers, of one task on one test set.

    right: in percent. auroc, kept: the same before and after but for the confidences told, which are those after.
    risk: what the curve ``kept`` counts.
    """

    set: str
    task: str
    of: Literal["words", "answers"]
    count: int
    right: float
    before: Measures
    after: Measures
    auroc: float | None
    risk: str
    kept: tuple[Kept, ...]


@dataclass(frozen=True)
class Report:
    """fingerprint: of the checkpoint's weights. likelihood: mean log-likelihood of the ``fitted_on`` words and labels
    of the dev sets, in nats.
    """

    model: str
    fingerprint: str
    temperature: float
    dev_sets: tuple[str, ...]
    fitted_on: int
    likelihood_before: float
    likelihood_after: float
    rows: tuple[Row, ...]


def make_row(
    name: str, task: str, of: Literal["words", "answers"], judged: Judgements, temperature: float, risk: str
) -> Row:
    """All that is measured of ``judged``."""
    curve = abstention(judged, temperature)
    kept = tuple(dict.fromkeys(at_coverage(curve, (point + 1) / POINTS) for point in range(POINTS)))
    before, after = measures(judged, 1.0), measures(judged, temperature)
    right = 100 * float(judged.right.mean())
    return Row(name, task, of, len(judged.right), right, before, after, auroc(judged), risk, kept)


def measures(judged: Judgements, temperature: float) -> Measures:
    bins = reliability(judged, temperature)
    low, high = error_interval(judged, temperature)
    return Measures(100 * bins.error, 100 * low, 100 * high, brier(judged, temperature), bins)


def write_report(report: Report, folder: Path) -> str:
    """Write the three files; returns the Markdown."""
    text = markdown(report)
    (folder / "calibration.json").write_text(
        json.dumps(asdict(report), indent=1, default=np.ndarray.tolist) + "\n", encoding="utf-8"
    )
    (folder / "calibration.md").write_text(text, encoding="utf-8")
    plot(report, folder / "calibration.png")
    return text


def markdown(report: Report) -> str:
    """Two tables: calibration, and what withholding answers brings."""
    lines = [
        f"{report.model}: temperature {report.temperature:.3f}, fitted on {report.fitted_on} words and labels of "
        f"{', '.join(report.dev_sets)} (log-likelihood {report.likelihood_before:.3f} → {report.likelihood_after:.3f} "
        "nats each).\n",
        "| set | task | of | number | right % | ECE % before | 95 % interval | ECE % after | 95 % interval "
        "| Brier before | after | AUROC |",
        "| --- " * 12 + "|",
    ]
    for row in report.rows:
        cells = [row.set, row.task, row.of, str(row.count), f"{row.right:.1f}"]
        for measured in (row.before, row.after):
            cells += [f"{measured.ece:.1f}", f"{measured.low:.1f}–{measured.high:.1f}"]
        cells += [f"{measured.brier:.3f}" for measured in (row.before, row.after)]
        lines.append(f"| {' | '.join([*cells, '' if row.auroc is None else f'{row.auroc:.3f}'])} |")
    lines += [
        f"\nECE: {BINS} bins of equal width. Before: at temperature 1. AUROC is the same at any temperature. A word's "
        "confidence is its probability, a label's that among the labels; that of an answer in words is the probability "
        "of all of it, which a long one has little of: it ranks answers.\n",
        "What is left when the least confident are withheld, and for that the least confidence (`--min-confidence` of "
        "answers):\n",
        f"| set | task | of | | {' | '.join(f'{100 * share:g} % kept' for share in SHOWN)} |",
        "| --- " * (4 + len(SHOWN)) + "|",
    ]
    for row in report.rows:
        points = [at_coverage(row.kept, share) for share in SHOWN]
        cells = [row.set, row.task, row.of, row.risk]
        cells += ["" if p.risk is None else f"{100 * p.risk:.1f} ({floored(p.confidence):.4g})" for p in points]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def floored(confidence: float) -> float:
    """To four digits that count, never above: what has this confidence is to be kept."""
    return float(Context(prec=4, rounding=ROUND_FLOOR).create_decimal_from_float(confidence))


def plot(report: Report, path: Path) -> None:
    """For each row: the reliability diagram, the histogram of confidences, the risk–coverage curve."""
    rows = report.rows
    figure, axes = plt.subplots(len(rows), 3, figsize=(12, 3.3 * len(rows)), squeeze=False, layout="constrained")
    for (left, middle, right), row in zip(axes, rows, strict=True):
        draw_reliability(left, row)
        draw_histogram(middle, row)
        draw_kept(right, row.kept, row.risk)
        middle.set_title(f"{row.set}, {row.task}: {row.count} {row.of}", fontsize=10)
    figure.suptitle(f"{report.model}: confidences at temperature 1 (grey) and {report.temperature:.3f} (blue)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_reliability(axis: Axes, row: Row) -> None:
    """Share of what is right against mean confidence of each bin; larger dots hold more."""
    axis.plot([0, 1], [0, 1], "--", color="0.8", lw=1)
    for measured, color in ((row.before, BEFORE), (row.after, AFTER)):
        used = measured.bins.counts > 0
        counts, confidence, right = (
            values[used] for values in (measured.bins.counts, measured.bins.confidence, measured.bins.right)
        )
        axis.plot(confidence / counts, right / counts, color=color, lw=1)
        axis.scatter(confidence / counts, right / counts, 4 + 150 * counts / counts.sum(), color=color)
    axis.set(xlabel="confidence", ylabel="right", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axis.set_title(f"ECE {row.before.ece:.1f} % → {row.after.ece:.1f} %", fontsize=10)


def draw_histogram(axis: Axes, row: Row) -> None:
    edges = np.linspace(0, 1, BINS + 1)
    axis.stairs(row.before.bins.counts, edges, color=BEFORE, fill=True, alpha=0.5)
    axis.stairs(row.after.bins.counts, edges, color=AFTER, lw=1.5)
    axis.set(xlabel="confidence", ylabel=row.of, xlim=(0, 1))


def draw_kept(axis: Axes, kept: Sequence[Kept], risk: str) -> None:
    points = [(point.coverage, point.risk) for point in kept if point.risk is not None]
    axis.plot([100 * c for c, _ in points], [100 * r for _, r in points], ".-", color=AFTER)
    axis.set(xlabel="kept, most confident first, %", ylabel=risk, xlim=(0, 102), ylim=(0, None))
