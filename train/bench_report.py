"""The training benchmark's results as tables, as JSON and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

from train.bench_runs import PARTS, Lap

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PLAIN, SAME, ALL = "plain", "ours, same loss", "ours, all losses"
SAID = {
    "loader": "waiting for the loader",
    "forward": "forward",
    "losses": "losses, their heads and logits",
    "backward": "backward",
    "optimizer": "optimizer",
    "rest": "the rest",
}


def summary(laps: dict[str, list[Lap]]) -> dict[str, dict[str, Any]]:
    """Of each of PLAIN, SAME and ALL: speeds of its laps, their median, padding, and how many times as fast as PLAIN.

    A lap is compared with the plain one next to it, so that what else the machine does meanwhile weighs on both.
    """
    plain = [lap.speed for lap in laps[PLAIN]]
    return {
        name: {
            "ids_per_second": median(lap.speed for lap in own),
            "laps": [lap.speed for lap in own],
            "padding": 1 - sum(lap.ids for lap in own) / sum(lap.positions for lap in own),
            "ratio": median(lap.speed for lap in own) / median(plain),
            "ratios": [lap.speed / other for lap, other in zip(own, plain, strict=True)],
        }
        for name, own in laps.items()
    }


def speed_table(runs: list[dict[str, Any]]) -> str:
    """Ids a second; times as fast, with the slowest and fastest pair of laps."""
    lines = [
        f"| config | weights | {PLAIN} | {SAME} | times | {ALL} | times | padding: {PLAIN} | ours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        speeds = run["speeds"]
        cells = [run["config"], run["weights"], f"{speeds[PLAIN]['ids_per_second']:,.0f}"]
        for name in (SAME, ALL):
            ratios = speeds[name]["ratios"]
            cells += [
                f"{speeds[name]['ids_per_second']:,.0f}",
                f"**{speeds[name]['ratio']:.2f}** ({min(ratios):.2f}–{max(ratios):.2f})",
            ]
        cells += [f"{speeds[name]['padding']:.0%}" for name in (PLAIN, SAME)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parts_table(runs: list[dict[str, Any]]) -> str:
    """Milliseconds of a step of ours, all losses, and their share."""
    names = [f"{run['config']}, {run['weights']}" for run in runs]
    lines = [f"| a step, ms | {' | '.join(names)} |", f"| --- |{' --- |' * len(runs)}"]
    for part in PARTS:
        shares = [run["parts"][part] / sum(run["parts"].values()) for run in runs]
        cells = [f"{1000 * run['parts'][part]:.0f} ({share:.0%})" for run, share in zip(runs, shares, strict=True)]
        lines.append(f"| {SAID[part]} | {' | '.join(cells)} |")
    whole = [f"{1000 * sum(run['parts'].values()):.0f}" for run in runs]
    return "\n".join([*lines, f"| in all | {' | '.join(whole)} |"])


def gpu_table(gpu: dict[str, dict[str, dict[str, Any]]]) -> str:
    """What each variant of each configuration reached on one GPU."""
    lines = ["| config | variant | ids/s | MFU | padding |", "| --- | --- | --- | --- | --- |"]
    for config, variants in gpu.items():
        for variant, reached in variants.items():
            if reached["problem"]:
                lines.append(f"| {config} | {variant} | {reached['problem']} | | |")
                continue
            mfu = "?" if reached["mfu"] is None else f"{reached['mfu']:.1%}"
            speed, padding = f"{reached['ids_per_second']:,.0f}", f"{reached['padding']:.1%}"
            lines.append(f"| {config} | {variant} | {speed} | {mfu} | {padding} |")
    return "\n".join(lines)


def as_markdown(result: dict[str, Any]) -> str:
    """Tables for people."""
    machine = f"{result['device']}, {result['threads']} threads, torch {result['torch']}"
    parts = [
        f"Ids a second in training, padding not counted ({machine}; medians of {result['repeats']} laps of "
        f"{result['steps']} steps, in turns):",
        speed_table(result["runs"]),
        f"Where the time of a step goes ({ALL}):",
        parts_table(result["runs"]),
    ]
    if result["gpu"]:
        parts += ["On one GPU:", gpu_table(result["gpu"])]
    return "\n\n".join(parts) + "\n"


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Bars: the speeds of each run with the range of their laps, and the parts of a step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    names = [f"{run['config']}\n{run['weights']}" for run in runs]
    for number, name in enumerate((PLAIN, SAME, ALL)):
        speeds = [run["speeds"][name] for run in runs]
        middle = [of["ids_per_second"] for of in speeds]
        around = [
            [m - min(of["laps"]) for m, of in zip(middle, speeds, strict=True)],
            [max(of["laps"]) - m for m, of in zip(middle, speeds, strict=True)],
        ]
        places = [place + 0.27 * (number - 1) for place in range(len(runs))]
        bars = left.bar(places, middle, 0.26, yerr=around, capsize=2, label=name, ecolor="0.3")
        left.bar_label(bars, [f"{of['ratio']:.1f}×" for of in speeds], padding=2, fontsize=7)
    left.set(ylabel="ids per second, without padding")
    left.set_xticks(range(len(runs)), names, fontsize=8)
    left.margins(y=0.15)
    left.legend(fontsize=8)
    bottom = [0.0] * len(runs)
    for part in PARTS:
        values = [1000 * run["parts"][part] for run in runs]
        right.bar(names, values, 0.6, bottom=bottom, label=SAID[part])
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    right.set(ylabel="ms of a step, all losses")
    right.tick_params(axis="x", labelsize=8)
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(out: Path, result: dict[str, Any]) -> str:
    """``bench.json``, ``bench.md`` and ``bench.png`` in the folder ``out``; the Markdown."""
    markdown = as_markdown(result)
    (out / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "bench.md").write_text(markdown, encoding="utf-8")
    plot(result["runs"], out / "bench.png")
    return markdown
