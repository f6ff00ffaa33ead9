"""The picture of a pretraining run: losses, speed and experts, then what validation found of each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from speechllm.tasks import TRAINABLE
from train.log import read_metrics
from train.scoring import SCORES

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

COLUMNS = 6  # of panels; two tasks share a row
# Inches: of a panel with what is around it, of labels, of the legend. Matplotlib finds them too, but in longer than all
# the rest takes.
WIDE, HIGH, LABELS, LEGEND = 3.4, 2.3, 0.55, 0.6
GREY = "0.75"
STYLES = ("-", "--", ":")  # of the scores of a task, the first is the one that counts


@dataclass(frozen=True)
class Line:
    """A scalar over the steps. color: None for the next one."""

    name: str
    label: str
    color: str | None = None
    style: str = "-"


@dataclass(frozen=True)
class Panel:
    """Lines that share an axis, a logarithmic one with ``log``."""

    title: str
    lines: tuple[Line, ...]
    log: bool = False


def plain(title: str, *names: str, log: bool = False) -> Panel:
    """A panel whose lines are labelled by their own names."""
    return Panel(title, tuple(Line(name, name) for name in names), log)


TRAINING = (
    plain("training losses", "loss", "answer", "audio", "ctc", "traits", "aux", "router_z", log=True),
    plain("gradient norm", "gradient_norm", log=True),
    plain("learning rate", "learning_rate"),
    plain("ids per second", "tokens_per_second"),
    plain("hours of audio per hour", "audio_hours_per_hour"),
    plain("shares of time, ids and peak", "waiting", "padding", "mfu"),
    plain("share of an expert", "busiest_expert", "idlest_expert"),
    plain("unused experts", "unused_experts"),
)


def task_panels(task: str, corpora: Mapping[str, str]) -> list[Panel]:
    """Losses (nats per answer id) in training and validation, listening gaps, and scores. corpora: name -> color."""
    of = TRAINABLE[task]
    dev = [Line(f"loss_{task}_{corpus}", corpus, color) for corpus, color in corpora.items()]
    gaps = [Line(f"gap_{task}_{corpus}", corpus, color) for corpus, color in corpora.items()]
    names = SCORES[of.metric]
    scores = [
        Line(f"{name}_{task}_{corpus}", corpus, color, style)
        for name, style in zip(names, STYLES, strict=False)
        for corpus, color in corpora.items()
    ]
    first, *others = names
    title = f"{task}: {first}" + (f" ({', '.join(others)} dashed)" if others else "")
    panels = [Panel(f"{task}: loss", (Line(f"answer_{task}", "training", GREY), *dev))]
    if of.listens:
        panels.append(Panel(f"{task}: listening gap", tuple(gaps)))
    return [*panels, Panel(title, tuple(scores))]


def plot_report(path: Path, tasks: Mapping[str, Sequence[str]], out: Path) -> None:
    """All of a run in one picture, from its ``metrics.jsonl``; panels without a point are left out.

    No picture where that is all of them. tasks: name -> the dev corpora it is validated on.
    """
    records = read_metrics(path)
    known = {name for record in records for name in record}
    corpora = dict.fromkeys(corpus for of_task in tasks.values() for corpus in of_task)
    colors = {corpus: f"C{n % 10}" for n, corpus in enumerate(corpora)}

    def shown(panels: Sequence[Panel]) -> list[Panel]:
        return [panel for panel in panels if any(line.name in known for line in panel.lines)]

    training = shown(TRAINING)
    starts = range(0, len(training), COLUMNS)
    rows = [list(enumerate(training[start : start + COLUMNS])) for start in starts]  # columns and panels
    of_tasks = [shown(task_panels(task, {name: colors[name] for name in dev})) for task, dev in tasks.items()]
    of_tasks = [panels for panels in of_tasks if panels]
    for first in range(0, len(of_tasks), 2):
        pair = of_tasks[first : first + 2]
        rows.append([(3 * side + n, panel) for side, panels in enumerate(pair) for n, panel in enumerate(panels)])
    if not rows:
        return
    wide, high = WIDE * COLUMNS, HIGH * len(rows) + LEGEND
    figure, axes = plt.subplots(
        len(rows),
        COLUMNS,
        figsize=(wide, high),
        squeeze=False,
        gridspec_kw={
            "left": LABELS / wide,
            "right": 1 - LABELS / 2 / wide,
            "bottom": LABELS / 2 / high,
            "top": 1 - LEGEND / high,
            "wspace": LABELS / (WIDE - LABELS),
            "hspace": LABELS / (HIGH - LABELS),
        },
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for row, panels in zip(axes, rows, strict=True):
        for column, panel in panels:
            draw(row[column], panel, records)
            row[column].set_xlim(0, records[-1]["step"])
            if panel in TRAINING and len(panel.lines) > 1:
                row[column].legend(fontsize=6, framealpha=0.6)
    if of_tasks:
        handles = [Line2D([], [], color=color, label=label) for label, color in {"training": GREY, **colors}.items()]
        figure.legend(handles=handles, loc="upper center", ncols=len(handles), fontsize=9)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def draw(axis: Axes, panel: Panel, records: Sequence[Mapping[str, float]]) -> None:
    """The panel's lines, as far as there are points of them."""
    axis.set_visible(True)
    for line in panel.lines:
        points = [(record["step"], record[line.name]) for record in records if line.name in record]
        if points:
            steps, values = zip(*points, strict=True)
            marker = "." if len(points) < 20 else ""
            axis.plot(steps, values, line.style, color=line.color, marker=marker, lw=1, ms=4, label=line.label)
    if panel.log:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_title(panel.title, fontsize=9)
    axis.tick_params(labelsize=7, which="both")
    axis.grid(alpha=0.3)
