"""Drop what is unfit for training from a manifest: ``python -m train.filter MANIFEST --out NEW.jsonl``.

The rules and what they do not see are described in ``speechllm/data/filtering.py``.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
from rich.console import Console

from speechllm.data.corpus import FILTERED, MANIFEST, Item, manifest_of, read_corpus
from speechllm.data.filtering import RULES, UNREADABLE, Measured, Rule, Verdicts, judge, measure
from speechllm.data.manifest import Utterance, write_manifest
from speechllm.errors import InputError
from train.amounts import shown_time
from train.commands import plain_errors
from train.loop import progress_bar
from train.workers import worker_pool

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CHUNK = 32  # utterances a worker takes at a time
EXAMPLES = 5  # of each rule, in the Markdown table; the JSON names all


def read_bounds(given: Sequence[str]) -> tuple[Rule, ...]:
    """The rules with bounds as given, e.g. ``rate=2:25``; an empty side is no bound.

    Raises:
        InputError: it is not written so, names no rule, or the lower bound is above the upper one.
    """
    rules = {rule.name: rule for rule in RULES}
    for text in given:
        name, _, bounds = text.partition("=")
        if name not in rules:
            raise InputError(f"--bound {text}: no rule is called {name!r}; there are {', '.join(rules)}")
        try:
            low, high = (float(side) if side.strip() else None for side in bounds.split(":"))
        except ValueError:
            raise InputError(f"--bound {text}: write it as {name}=LOW:HIGH, a side left empty is no bound") from None
        rule = replace(rules[name], low=-math.inf if low is None else low, high=math.inf if high is None else high)
        if not rule.low <= rule.high:
            raise InputError(f"--bound {text}: {low} is above {high}, nothing could be kept")
        rules[name] = rule
    return tuple(rules.values())


def measure_chunk(items: list[Item]) -> list[Measured]:
    torch.set_num_threads(1)
    return [measure(item) for item in items]


def measure_all(items: Sequence[Item], jobs: int, title: str) -> list[Measured]:
    """Every utterance measured, in order, by ``jobs`` processes."""
    chunks = [list(items[start : start + CHUNK]) for start in range(0, len(items), CHUNK)]
    measured: list[Measured] = []
    with progress_bar(Console(stderr=True)) as bar, worker_pool(jobs) as pool:
        task = bar.add_task(title, total=len(items))
        for result in pool.imap(measure_chunk, chunks):
            measured += result
            bar.advance(task, len(result))
    return measured


def moved(utterance: Utterance, root: Path, folder: Path) -> Utterance:
    """The utterance with paths for a manifest in ``folder``; absolute ones stay as they are."""
    if utterance.is_text:
        return utterance
    name = "audio" if utterance.tar is None else "tar"
    path = getattr(utterance, name)
    if os.path.isabs(path) or folder.resolve() == root.resolve():
        return utterance
    # from the folder's real place: ".." out of a linked folder leads to its target's parent
    return utterance.model_copy(update={name: os.path.relpath(os.path.abspath(root / path), folder.resolve())})


def summary(manifest: Path, out: Path, items: Sequence[Item], verdicts: Verdicts, rules: Sequence[Rule]) -> dict:
    """What report.json holds: the counts of ``dropped`` and ``kept`` add up to ``read``."""
    counts = Counter(dropped.rule for dropped in verdicts.dropped)
    described: list[tuple[str, str, float | None, float | None]] = [
        (UNREADABLE, "the audio can be decoded", None, None)
    ]
    for rule in rules:
        low, high = (bound if math.isfinite(bound) else None for bound in (rule.low, rule.high))
        described.append((rule.name, rule.measured, low, high))
    table: list[dict[str, Any]] = []
    for name, measured, low, high in described:
        table.append(
            {
                "rule": name,
                "measured": measured,
                "low": low,
                "high": high,
                "judged": len(verdicts.values[name]) if name in verdicts.values else len(items),
                "not_judged": verdicts.unjudged.get(name, {}),
                "breaking": verdicts.broken[name],
                "dropped": counts[name],
                "share": counts[name] / len(items),
            }
        )
    hours = [sum(u.duration for u in us) / 3600 for us in ([i.utterance for i in items], kept_of(items, verdicts))]
    return {
        "manifest": str(manifest),
        "out": str(out),
        "read": len(items),
        "kept": len(verdicts.kept),
        "dropped": len(verdicts.dropped),
        "hours_read": hours[0],
        "hours_kept": hours[1],
        "rules": table,
        "utterances": [asdict(dropped) for dropped in verdicts.dropped],
    }


def kept_of(items: Sequence[Item], verdicts: Verdicts) -> list[Utterance]:
    return [items[i].utterance for i in verdicts.kept]


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a table with a few examples of each rule."""
    kept, read = (shown_time(3600 * report[f"hours_{which}"]) for which in ("kept", "read"))
    lines = [
        f"Kept {report['kept']} of {report['read']} utterances ({kept} of {read}) of {report['manifest']}.\n",
        "What breaks several rules is dropped by the first of them: *dropped* adds up, *breaking* need not.\n",
        "| rule | measured | kept | judged | not judged, and why | breaking | dropped | share | examples |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["rules"]:
        low, high = (f"{row[side]:g}" if row[side] is not None else "" for side in ("low", "high"))
        bounds = f"{low} to {high}" if low and high else f"≥ {low}" if low else f"≤ {high}" if high else "all"
        examples = []
        for dropped in [d for d in report["utterances"] if d["rule"] == row["rule"]][:EXAMPLES]:
            value = "" if dropped["value"] is None else f"{dropped['value']:.3g}"
            said = " ".join(part for part in (value, dropped["note"]) if part)
            examples.append(f"{dropped['id']} ({said})".replace("|", "\\|").replace("\n", " "))
        cells = [
            row["rule"],
            row["measured"],
            "readable" if row["rule"] == UNREADABLE else bounds,
            str(row["judged"]),
            "; ".join(f"{count} {reason}" for reason, count in row["not_judged"].items()),
            str(row["breaking"]),
            str(row["dropped"]),
            f"{100 * row['share']:.2f} %",
            "; ".join(examples),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(path: Path, verdicts: Verdicts, rules: Sequence[Rule]) -> None:
    """A histogram of each measure with its bounds."""
    figure, axes = plt.subplots(1, len(rules), figsize=(4 * len(rules), 3.2))
    for axis, rule in zip(axes, rules, strict=True):
        values = verdicts.values[rule.name]
        bounds = [bound for bound in (rule.low, rule.high) if math.isfinite(bound)]
        if values:  # what is dropped is rare: only a logarithm shows it
            axis.hist(values, bins=50, range=(min(values + bounds), max(values + bounds)), log=True)
        for bound in bounds:
            axis.axvline(bound, color="black", linestyle="--")
        axis.set(title=f"{rule.name} ({len(values)})", xlabel=rule.measured, ylabel="utterances")
        axis.xaxis.label.set_size(8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def filter_corpus(manifest: Path, out: Path, folder: Path, jobs: int, rules: Sequence[Rule]) -> str:
    """Write the manifest of what is kept, and the report to ``folder``; returns the Markdown.

    Raises:
        InputError: the manifest cannot be read or holds nothing, ``out`` is the manifest itself, or nothing is kept
            (the report is written, ``out`` is not).
    """
    source = manifest_of(manifest)
    if out.resolve() == source.resolve():
        raise InputError(f"--out {out}: is what is filtered; give another name, the original is kept")
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; name the new manifest, e.g. {out / FILTERED}")
    items = [item for split in ("train", "dev", "test") for item in read_corpus([manifest], split, True, texts=True)]
    if not items:
        raise InputError(f"{manifest}: holds no utterance")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        new = out.with_name(out.name + ".new")
        new.write_bytes(b"")  # before the work, not after it
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written there ({error.strerror}); give another --out") from error
    try:
        verdicts = judge(items, measure_all(items, jobs, f"filter {manifest}"), rules)
        write_manifest(new, [moved(items[i].utterance, items[i].root, out.parent) for i in verdicts.kept])
        if verdicts.kept:
            new.replace(out)
        else:
            out.unlink(missing_ok=True)  # what an earlier call left is not what is left now
    finally:
        new.unlink(missing_ok=True)
    report = summary(manifest, out, items, verdicts, rules)
    text = as_markdown(report)
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(text, encoding="utf-8")
    plot(folder / "distributions.png", verdicts, rules)
    if not verdicts.kept:
        rule, count = Counter(dropped.rule for dropped in verdicts.dropped).most_common(1)[0]
        raise InputError(f"{manifest}: nothing is kept, {rule} drops {count} of {len(items)}: see {folder}/report.md")
    return text


def default_out(manifest: Path) -> Path:
    """Beside the manifest, and called after it where a folder may hold several."""
    return manifest.with_name(FILTERED if manifest.name == MANIFEST else f"{manifest.stem}-{FILTERED}")


def main(
    manifest: Annotated[Path, typer.Argument(help="a manifest.jsonl, or its folder")],
    out: Annotated[
        Path | None, typer.Option(help=f"new manifest; default: beside it, {FILTERED} or NAME-{FILTERED}")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="folder of the report; default: beside the new manifest")] = None,
    bound: Annotated[
        list[str] | None,
        typer.Option(help="RULE=LOW:HIGH, other bounds for a rule, e.g. rate=2:25; 'language=:' turns one off"),
    ] = None,
    jobs: Annotated[int, typer.Option(help="processes", min=1)] = 2,
) -> None:
    """Drop utterances that are unreadable, of another length, silent, clipped, mislabelled or there twice; says why."""
    with plain_errors("stopped; nothing was written"):
        out = out or default_out(manifest_of(manifest))
        folder = report or out.parent / f"{out.stem}-report"
        typer.echo(filter_corpus(manifest, out, folder, jobs, read_bounds(bound or [])))
        typer.echo(f"{out}\n{folder}")


if __name__ == "__main__":
    typer.run(main)
