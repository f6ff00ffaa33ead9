"""The report of ``train.evaluate``: ``results.json``, ``results.md`` and pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from train.breakdown import bias_table, gaps, plot_bias
from train.results import LOWER_IS_BETTER, NAMES, OURS, Confusion, Evaluation, Result, Target, normalised, write_results

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes

HELD_OUT = (
    "The server does not know these wordings either: answers are plain text, but where they are to hold times or "
    "speakers, for which the task is named beside the words (`--task`).\n"
)
FLOOR = 1.0  # of a score in the geometric mean: a single 0 does not erase the others
BAR, GAP = 0.3, 0.25  # inches, of pictures
RIGHT = 105.0  # end of the axis
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "0.6", "tab:olive", "tab:pink")


def scores(evaluation: Evaluation) -> dict[str, float]:
    """ "SET TASK" -> the score that the row is judged by, 0 to 100, more is better."""
    found = ((target, evaluation.whole(target)) for target in evaluation.targets)
    return {target.key: normalised(result.metric, result.value) for target, result in found if result is not None}


def geometric_mean(values: Sequence[float]) -> float:
    """Of scores, each at least ``FLOOR``."""
    return math.exp(sum(math.log(max(FLOOR, value)) for value in values) / len(values))


def write_report(evaluation: Evaluation, out: Path) -> None:
    """Into the folder ``out``. Raises OSError where it cannot be written."""
    write_results(out / "results.json", evaluation)
    (out / "results.md").write_text(report(evaluation), encoding="utf-8")
    if scores(evaluation):
        plot(evaluation, out / "results.png")
    if found := gaps(evaluation):
        plot_bias(found, out / "bias.png")
    for target in evaluation.targets:
        if (confusion := evaluation.confusions.get(target.key)) is not None:
            plot_confusion(target.label, confusion, out / f"confusion-{re.sub('[^A-Za-z0-9]+', '-', target.key)}.png")


def report(evaluation: Evaluation) -> str:
    """Markdown: the summary, the targets, all scores, held-out wordings, gaps between groups, and how it was done."""
    values = list(scores(evaluation).values())
    pieces = [f"# {evaluation.checkpoint}\n"]
    if values:
        pieces.append(
            f"Geometric mean of {len(values)} scores: **{geometric_mean(values):.1f}** of 100 (error rates as "
            f"max(0, 100 − x), each score counted as at least {FLOOR:g}).\n"
        )
    pieces.append(targets_table(evaluation))
    whole = [r for r in evaluation.results if not r.group and not r.wording]
    pieces += ["## All scores\n", results_table(whole)]
    if held_out := [r for r in evaluation.results if r.wording]:
        pieces += ["## Wordings that were never trained on\n", HELD_OUT, results_table(held_out, noted=True)]
    if table := bias_table(gaps(evaluation)):
        pieces += ["## Groups\n", table]
    judged = {(target.set, target.task, target.metric) for target in evaluation.targets}
    if groups := [r for r in evaluation.results if r.group and (r.set, r.task, r.metric) in judged]:
        pieces += ["## Scores of each group\n", results_table(groups)]
    pieces.append(f"{_how(evaluation)}\n\n    {evaluation.command}\n")
    return "\n".join(pieces)


def targets_table(evaluation: Evaluation) -> str:
    """Every row with its score, what it must reach, and what it should, and the scores of baselines."""
    systems = list(dict.fromkeys(r.system for r in evaluation.results if r.system != OURS))
    head = ["row", "metric", "value", "at least", "reached", "aim", "reached", "baselines"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for target in evaluation.targets:
        own = evaluation.whole(target)
        bars = [cell for wanted in (target.at_least, target.aim) for cell in _judged(target, own, wanted)]
        said = shown(own) or "not trained"
        others = [(system, evaluation.whole(target, system)) for system in systems]
        told = "; ".join(f"{system}: {shown(other)}" for system, other in others if other is not None)
        lines.append("| " + " | ".join([target.label, NAMES[target.metric], said, *bars, told]) + " |")
    lines.append(
        "\nIn brackets 95 % bootstrap intervals over clips. Of error rates less is better (≤). Unsure: the interval "
        "holds both yes and no."
    )
    return "\n".join(lines) + "\n"


def results_table(results: Sequence[Result], noted: bool = False) -> str:
    """One line a result. noted: whether notes have a column; else each is told once, below."""
    columns = ["set", "task", "of", "metric", "value", "95 % interval", "clips", "minutes", *["note"] * noted]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for r in results:
        of = ", ".join(filter(None, (r.system if r.system != OURS else "", r.group, r.wording))) or "all"
        interval = "" if r.low is None or r.high is None else f"{r.low:.1f}–{r.high:.1f}"
        cells = [r.set, r.task, of, NAMES[r.metric], f"{r.value:.1f}", interval, str(r.clips), f"{r.seconds / 60:.1f}"]
        lines.append("| " + " | ".join([*cells, *[r.note.replace("|", "\\|")] * noted]) + " |")
    notes = dict.fromkeys(f"{NAMES[r.metric]}: `{r.note}`" for r in results if r.note and not noted)
    return "\n".join([*lines, *(f"\n{note}" for note in notes)]) + "\n"


def shown(result: Result | None) -> str:
    """A score and its interval; "" for none."""
    if result is None:
        return ""
    interval = "" if result.low is None or result.high is None else f" ({result.low:.1f}–{result.high:.1f})"
    return f"{result.value:.1f}{interval}"


def plot(evaluation: Evaluation, path: Path) -> None:
    """A bar with its interval for each row and system; marks at what must be reached (line) and should be (star)."""
    systems = list(dict.fromkeys(r.system for r in evaluation.results))
    colors = dict(zip(systems, COLORS * len(systems), strict=False))
    rows = [(t, [r for s in systems if (r := evaluation.whole(t, s)) is not None]) for t in evaluation.targets]
    rows = [(target, own) for target, own in rows if own]
    figure, axis = plt.subplots(figsize=(10, 1.5 + sum(BAR * len(own) + GAP for _, own in rows)), layout="constrained")
    top, places = 0.0, []
    for target, own in rows:
        for number, result in enumerate(own):
            _bar(axis, top + BAR * number, result, colors[result.system])
        if target.at_least is not None:
            axis.plot(target.at_least, top, "|", color="black", ms=14, mew=2, clip_on=False)
        if target.aim is not None:
            axis.plot(target.aim, top, "*", color="black", ms=9, clip_on=False)
        places.append(top + BAR * (len(own) - 1) / 2)
        top += BAR * len(own) + GAP
    labels = [f"{t.label}\n{NAMES[t.metric]} {'↓' if t.metric in LOWER_IS_BETTER else '↑'}" for t, _ in rows]
    axis.set_yticks(places, labels, fontsize=8)
    axis.set_ylim(top - GAP, -BAR - GAP / 2)
    axis.set(xlim=(0, RIGHT), xlabel="score, 95 % interval (↑ more, ↓ less is better)", title=evaluation.checkpoint)
    handles: list[Artist] = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    handles += [plt.Line2D([], [], marker=marker, color="black", ls="") for marker in "|*"]
    figure.legend(handles, [*systems, "at least", "aim"], fontsize=8, loc="outside lower center", ncols=4)
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bar(axis: Axes, place: float, result: Result, color: str) -> None:
    """Those that are too long for the axis end in their value."""
    low, high = (result.value if edge is None else edge for edge in (result.low, result.high))
    spread = [[max(0.0, result.value - low)], [max(0.0, high - result.value)]]
    axis.barh(place, result.value, 0.85 * BAR, color=color, xerr=spread, error_kw={"capsize": 2, "ecolor": "0.2"})
    if result.value < 1:  # no bar to be seen
        axis.text(0.5, place, f"{result.value:.1f}", va="center", color=color, fontsize=8)
    if result.value > RIGHT:
        axis.text(RIGHT - 1, place, f"{result.value:.0f} →", ha="right", va="center", color="white", fontsize=8)


def plot_confusion(title: str, confusion: Confusion, path: Path) -> None:
    """Counts; shades are shares of each row."""
    counts = np.array(confusion.counts)  # [true, said]
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    side = 2.5 + 0.45 * len(confusion.labels)
    figure, axis = plt.subplots(figsize=(side, side), layout="constrained")
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts):
        color = "white" if shares[row, column] > 0.5 else "black"
        axis.text(column, row, counts[row, column], ha="center", va="center", color=color, fontsize=8)
    every = range(len(confusion.labels))
    axis.set_xticks(every, confusion.labels, rotation=60, ha="right", fontsize=8)
    axis.set_yticks(every, confusion.labels, fontsize=8)
    axis.set(xlabel="answered", ylabel="true")
    axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _judged(target: Target, own: Result | None, wanted: float | None) -> tuple[str, str]:
    """What is wanted, and whether it is reached."""
    if wanted is None:
        return "", ""
    sign = "≤" if target.metric in LOWER_IS_BETTER else "≥"
    reached = "" if own is None else "yes" if target.reached(own.value, wanted) else "no"
    unsure = ", unsure" if own is not None and target.unsure(own, wanted) else ""
    return f"{sign} {wanted:g}", reached + unsure


def _how(evaluation: Evaluation) -> str:
    ours = sum(seconds for key, seconds in evaluation.seconds.items() if " / " not in key)
    return (
        f"Asked through `speechllm serve`, 16 requests at once, at temperature 0; {ours:.0f} s of answering the first "
        f"wording. Checkpoint {evaluation.fingerprint}. Intervals: 1,000 draws of clips, with replacement; "
        "where no clip is wrong they have no width, which few clips do not prove."
    )
