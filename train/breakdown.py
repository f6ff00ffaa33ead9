"""For whom answers are good: scores by speaker, gender, accent, language, noise and duration, and the gaps between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from scipy.stats import studentized_range

from speechllm.data.corpus import Item
from speechllm.tasks import TASKS, Trait
from train.results import LOWER_IS_BETTER, NAMES, OURS, Evaluation, Result
from train.suite import Kind

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SECONDS = (2.0, 5.0, 10.0)  # edges of the bins of durations
SNRS_DB = (10.0, 20.0)
FEWEST = 10  # clips of a group in the table of gaps: of fewer a score is mostly chance


@dataclass(frozen=True)
class Gap:
    """The best and the worst group of one kind in one row; where they differ by how much, in points."""

    label: str
    kind: str
    metric: str
    groups: tuple[Result, ...]  # best first

    @property
    def best(self) -> Result:
        return self.groups[0]

    @property
    def worst(self) -> Result:
        return self.groups[-1]

    @property
    def points(self) -> float:
        return abs(self.best.value - self.worst.value)

    @property
    def apart(self) -> bool:
        """Whether the best and the worst of so many equal groups would hardly (5 %) differ as much by chance (Tukey's
        range test, with the errors that the intervals tell).
        """
        if self.best.low is None or self.worst.low is None:
            return False
        critical = float(studentized_range.ppf(0.95, len(self.groups), np.inf)) / math.sqrt(2)
        return self.points > critical * math.hypot(_error(self.best), _error(self.worst))


def _error(result: Result) -> float:
    """Standard error in points. Where no clip differs an interval has no width: by the rule of three (3 / clips)."""
    assert result.low is not None and result.high is not None
    return (result.high - result.low or 300 / result.clips) / (2 * 1.96)


def group_of(kind: Kind, item: Item) -> str | None:
    """The group of a clip as results name it, "speaker=ann"; None where the data do not tell it."""
    utterance = item.utterance
    if kind == "accent":
        accent = TASKS["accent"]
        assert isinstance(accent, Trait)
        value = accent.of(utterance.facts())
    elif kind == "noise":
        snr = utterance.labels.get("snr_db")
        value = "none" if snr is None else _bin(float(snr), SNRS_DB, "dB")
    elif kind == "duration":
        value = _bin(utterance.duration, SECONDS, "s")
    else:
        value = getattr(utterance, kind)
    return None if value is None else f"{kind}={value}"


def groups_of(kinds: Sequence[Kind], items: Sequence[Item]) -> dict[str, np.ndarray]:
    """Group -> its clips, bool ``[clips]``, of every kind that has several groups here."""
    found: dict[str, np.ndarray] = {}
    for kind in kinds:
        own = [group_of(kind, item) for item in items]
        names = sorted({name for name in own if name is not None}, key=_order)
        if len(names) > 1:
            found |= {name: np.array([group == name for group in own]) for name in names}
    return found


def gaps(evaluation: Evaluation, system: str = OURS) -> list[Gap]:
    """Of each row and each kind of groups, by the metric that the row is judged by."""
    found = []
    for target in evaluation.targets:
        key = (target.set, target.task, target.metric, system, "")
        own = [
            r
            for r in evaluation.results
            if (r.set, r.task, r.metric, r.system, r.wording) == key and r.group and r.clips >= FEWEST
        ]
        for kind in dict.fromkeys(r.group.partition("=")[0] for r in own):
            some = [r for r in own if r.group.startswith(f"{kind}=")]
            some.sort(key=lambda r: r.value, reverse=target.metric not in LOWER_IS_BETTER)
            if len(some) > 1:
                found.append(Gap(target.label, kind, target.metric, tuple(some)))
    return found


def bias_table(found: Sequence[Gap]) -> str:
    """Markdown; "" where there are no groups."""
    if not found:
        return ""
    lines = ["| row | by | groups | metric | best | worst | gap | beyond chance |", "| --- " * 8 + "|"]
    for gap in found:
        best, worst = map(_shown, (gap.best, gap.worst))
        lines.append(
            f"| {gap.label} | {gap.kind} | {len(gap.groups)} | {NAMES[gap.metric]} | {best} | {worst} | "
            f"{gap.points:.1f} | {'yes' if gap.apart else 'no'} |"
        )
    lines.append(
        f"\nGroups of fewer than {FEWEST} clips are left out; gap in points. Of many groups the best and the worst "
        "differ by chance alone; beyond it: by Tukey's range test at 5 %."
    )
    return "\n".join(lines) + "\n"


def plot_bias(found: Sequence[Gap], path: Path) -> None:
    """The groups of each row as points with their 95 % intervals, the best and the worst named."""
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.55 * len(found)), layout="constrained")
    for place, gap in enumerate(reversed(found)):
        for group in gap.groups:
            color = "tab:green" if group is gap.best else "tab:red" if group is gap.worst else "0.6"
            low, high = (group.value if edge is None else edge for edge in (group.low, group.high))
            axis.plot([low, high], [place, place], color=color, lw=1.5, alpha=0.6)
            axis.plot(group.value, place, "o", color=color, ms=5)
        for group, above in ((gap.best, 0.16), (gap.worst, -0.38)):
            name = group.group.partition("=")[2]
            axis.text(group.value, place + above, name, ha="center", fontsize=7)
    labels = [f"{gap.label}, by {gap.kind} ({NAMES[gap.metric]})" for gap in reversed(found)]
    axis.set_yticks(range(len(found)), labels, fontsize=8)
    axis.set(xlabel="score of each group, 95 % interval (green: best, red: worst)", ylim=(-0.7, len(found) - 0.3))
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _shown(result: Result) -> str:
    interval = "" if result.low is None or result.high is None else f" ({result.low:.1f}–{result.high:.1f})"
    return f"{result.group.partition('=')[2]}: {result.value:.1f}{interval}, {result.clips} clips"


def _bin(value: float, edges: Sequence[float], unit: str) -> str:
    place = int(np.searchsorted(edges, value, side="right"))
    if place == 0:
        return f"under {edges[0]:g} {unit}"
    if place == len(edges):
        return f"{edges[-1]:g} {unit} and more"
    return f"{edges[place - 1]:g}-{edges[place]:g} {unit}"


def _order(name: str) -> tuple[float, str]:
    """Bins by their values, other groups by their names."""
    kind, _, value = name.partition("=")
    if kind not in ("noise", "duration"):
        return (0.0, name)
    first = value.removeprefix("under ").partition(" ")[0].partition("-")[0]
    return (float("inf") if value == "none" else float(first) - value.startswith("under"), name)
