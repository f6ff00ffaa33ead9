"""The report of ``train.evaluate_icl``: what is measured of each row, as JSON, Markdown and what the numbers say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from train.icl_clips import GAP, HEARD, PART, SNR_DB
from train.icl_suite import CONTROLS, PARTS

CHANCE, LEARNT = 50.0, 80.0  # percent: of two labels, and what counts as learnt from shots
SHOTS, FREE, NONE = "shots", "free", "no shots"  # conditions; the others are named in icl_suite

Unit = Literal["accuracy %", "WER %", "recall %"]


@dataclass(frozen=True)
class Point:
    """A score in percent with its 95 % interval. shots: of each class where there are labels, else in all."""

    condition: str
    shots: int
    value: float
    low: float
    high: float

    @property
    def at_chance(self) -> bool:
        return self.low <= CHANCE <= self.high

    def __str__(self) -> str:
        return f"{self.value:.1f} ({self.low:.1f}–{self.high:.1f})"


@dataclass(frozen=True)
class Row:
    """One row of the report.

    clips, speakers: different ones that are heard of. left_out: clips that are too long. fewest: different clips that
    any class has for its shots, at least.
    """

    name: str
    part: str
    sets: tuple[str, ...]
    unit: Unit
    questions: int
    clips: int
    speakers: int
    left_out: int
    fewest: int
    points: tuple[Point, ...]

    def point(self, condition: str, shots: int | None = None) -> Point | None:
        """The score under a condition; with so many shots, or with the most. None where it was not measured."""
        found = [p for p in self.points if p.condition == condition and shots in (None, p.shots)]
        return max(found, key=lambda p: p.shots, default=None)

    @property
    def controlled(self) -> tuple[Point, Point]:
        """Without shots, and with as many as the controls have. Of a row of labels."""
        control = self.point(next(iter(CONTROLS)))
        assert control
        first, top = self.point(SHOTS, 0), self.point(SHOTS, control.shots)
        assert first and top
        return first, top


@dataclass(frozen=True)
class Report:
    """All that is measured of a checkpoint. fingerprint: of its weights. asked: questions of each row, at most."""

    model: str
    fingerprint: str
    asked: int
    seed: int
    rows: tuple[Row, ...]


def read_row(told: dict) -> Row:
    """A row from JSON."""
    return Row(**told | {"sets": tuple(told["sets"]), "points": tuple(Point(**point) for point in told["points"])})


def write_report(report: Report, folder: Path) -> str:
    """Write ``results.json`` and ``results.md``; returns the Markdown."""
    text = markdown(report)
    (folder / "results.json").write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(text, encoding="utf-8")
    return text


def markdown(report: Report) -> str:
    """Tables by part, and the verdicts."""
    labels = [row for row in report.rows if row.part != "D"]
    words = [row for row in report.rows if row.part == "D"]
    lines = [
        f"In-context learning of {report.model}: recordings of test splits, up to {report.asked} questions a row "
        f"(seed {report.seed}), in percent with 95 % intervals (bootstrap over the clips asked about).\n",
        *verdicts(labels),
    ]
    for part in dict.fromkeys(row.part for row in labels):
        lines += [f"### {part}. {PARTS[part].capitalize()}\n", *label_table([r for r in labels if r.part == part]), ""]
    if labels:
        lines += [
            'k: shots of each of two classes; chance is 50 %. The answer is decoded among the two labels, "free" among '
            "all there is. Clips: different ones in the row's classes; fewest: those a class has for shots at least "
            f"(where k is more, they come again). But for words and intents only the first {HEARD:g} s of a longer "
            f"clip are heard; of two that are joined {PART:g} s each, {GAP:g} s apart; noise is white, {SNR_DB:g} dB. "
            "Words that are said alone in training sets are left out of test_words. Shuffled labels: the shots' labels "
            "in any order. Other audio: each shot lets hear a clip of either class. No audio: shots are only text.\n"
        ]
    if words:
        lines += [f"### D. {PARTS['D'].capitalize()}\n", *word_table(words), "", *map(told, words)]
    if too_long := [f"{row.name} {row.left_out}" for row in report.rows if row.left_out]:
        lines.append(f"\nClips left out, too long for the model's positions with all shots: {', '.join(too_long)}.")
    return "\n".join(lines).rstrip() + "\n"


def label_table(rows: Sequence[Row]) -> list[str]:
    """Accuracy by number of shots, and under the controls."""
    counts = sorted({p.shots for row in rows for p in row.points if p.condition == SHOTS})
    free = any(row.point(FREE) for row in rows)
    controls = {name: max(p.shots for row in rows if (p := row.point(name))) for name in CONTROLS}
    head = ["row", "questions", "clips", "speakers", "fewest", *(f"k = {k}" for k in counts)]
    head += [f"{name}, k = {k}" for name, k in controls.items()] + free * ["free"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for row in rows:
        points = [row.point(SHOTS, k) for k in counts] + [row.point(name) for name in controls]
        points += free * [row.point(FREE)]
        cells = [row.name, row.questions, row.clips, row.speakers, row.fewest, *(p or "" for p in points)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def word_table(rows: Sequence[Row]) -> list[str]:
    """Scores of transcripts by condition and number of shots, a line each."""
    lines = ["| row | metric | questions | condition | shots | value (95 % interval) |", "| --- " * 6 + "|"]
    return lines + [
        f"| {row.name} | {row.unit} | {row.questions} | {p.condition} | {p.shots} | {p} |"
        for row in rows
        for p in row.points
    ]


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What the numbers say: which rows are learnt from the shots, and whether controls fall to chance."""
    if not rows:
        return []
    learnt = [row.name for row in rows if is_learnt(row)]
    of = f"**{len(learnt)} of {len(rows)} rows are learnt from the shots**: {', '.join(learnt) or 'none'}."
    return [
        f"{of} At chance without them, at {LEARNT:g} % or more with them, and clearly less under every control.\n",
        *map(verdict, rows),
        "",
    ]


def is_learnt(row: Row) -> bool:
    """At chance without shots, at 80 % or more with as many as the controls have, and clearly less under those."""
    without, top = row.controlled
    controls = [point for name in CONTROLS if (point := row.point(name))]
    return without.at_chance and top.value >= LEARNT and all(point.high < top.low for point in controls)


def verdict(row: Row) -> str:
    """The row in words."""
    without, top = row.controlled
    said = f"{without} without shots, {top} at k = {top.shots}"
    if is_learnt(row):
        said = f"learnt from the shots: {said}"
    elif without.at_chance and top.value >= LEARNT:
        said = f"shots help, but not by what they tell: {said}"
    elif not without.at_chance:
        said = f"not at chance without shots, so they alone do not tell: {said}"
    elif top.at_chance:
        said = f"at chance with shots too: {said}"
    else:
        said = f"{'above' if top.low > CHANCE else 'below'} chance, but not at {LEARNT:g} %: {said}"
    controls = []
    for name in CONTROLS:
        point = row.point(name)
        assert point
        falls = "stays at chance" if top.at_chance else "falls to chance"
        controls.append(f"{name} {falls if point.at_chance else 'is not at chance'}, {point}")
    return f"- {row.name}: {said}. {'; '.join(controls)}."


def told(row: Row) -> str:
    """A row of transcripts in words."""
    without = row.point(NONE)
    assert without
    parts = []
    for condition in dict.fromkeys(p.condition for p in row.points if p.condition != NONE):
        point = row.point(condition)
        assert point
        if point.high < without.low:
            change = "lower"
        elif point.low > without.high:
            change = "higher"
        else:
            change = "no different (intervals overlap)"
        parts.append(f"{condition}, {point.shots} shots: {point}, {change}")
    return f"- {row.name}, {row.unit}: {without} without shots; {'; '.join(parts)}."
