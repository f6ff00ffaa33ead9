"""The report of ``train.evaluate_codec``: what was asked of the codec and whether it is reached, tables, plots."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch

from speechllm.codec import Codec

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOG_MEL, ORIGINAL, ENCODEC = "log-mel", "original", "EnCodec 24 kHz"
ABOVE_MEL, PLAIN_TIMES, USED, STABLE, FASTER = 20.0, 2.0, 50.0, 90.0, 1.0  # the bounds, as verdicts() states them
READABLE = 60.0  # WER %; where both are above it the probes have not learnt to read, and all inputs look alike
LEVELS = ("+1 dB", "-1 dB")
Results = dict[str, dict[str, Any]]  # part -> key of a unit -> its result


@dataclass(frozen=True)
class Verdict:
    """One bound: what was measured on which speech, and whether it is reached."""

    what: str
    on: str
    value: str
    bound: str
    reached: bool | None  # None: cannot be judged


def at_least(what: str, on: str, value: float, bound: float, unit: str, digits: int = 0) -> Verdict:
    return Verdict(what, on, f"{value:.{digits}f}{unit}", f"at least {bound:g}{unit}", value >= bound)


def above_log_mel(rate: str, group: str, ours: float, mel: float) -> Verdict:
    above = 100 * (ours / mel - 1) if mel else 0.0 if not ours else float("inf")
    reached = None if rate == "wer" and min(ours, mel) > READABLE else above <= ABOVE_MEL
    what = f"{rate.upper()} of a probe on codebook 0, above log-mel's"
    return Verdict(what, group, f"{above:+.0f} % ({ours:.1f} to {mel:.1f})", f"at most {ABOVE_MEL:+.0f} %", reached)


def times_better(rate: str, other: str, group: str, ours: float, theirs: float) -> Verdict:
    times = theirs / ours if ours else float("inf")
    what = f"{rate.upper()} of {other}'s codebook 0 over ours"
    return Verdict(
        what, group, f"{times:.1f} ({theirs:.1f} to {ours:.1f})", f"at least {PLAIN_TIMES:g}", times >= PLAIN_TIMES
    )


def verdicts(results: Results, names: list[str]) -> list[Verdict]:
    """What was asked of the first codec in ``names``; the others are compared with. Parts not measured are left out."""
    ours, *others = names
    found: list[Verdict] = []
    words = results.get("words", {})
    for group, score in words.get(f"{ours}/0", {}).get("tests", {}).items():
        for rate in ("wer", "cer"):
            if LOG_MEL in words:
                found.append(above_log_mel(rate, group, score[rate], words[LOG_MEL]["tests"][group][rate]))
            for other in others:
                if theirs := words.get(f"{other}/0"):
                    found.append(times_better(rate, other, group, score[rate], theirs["tests"][group][rate]))
    for group, measured in results.get("use", {}).get(ours, {}).items():
        shares = [100 * value / measured["card"] for value in measured["perplexity"]]
        found.append(at_least("perplexity of codebook 0, of its codes", group, shares[0], USED, " %"))
        found.append(at_least("the same of the least used codebook", group, min(shares), USED, " %"))
    for group, measured in results.get("stability", {}).get(ours, {}).items():
        same = min(measured[change][0] for change in LEVELS)
        found.append(at_least("codes of codebook 0 that stay under ±1 dB", group, same, STABLE, " %", 1))
    both = [result for result in results.get("speed", {}).values() if ENCODEC in result]
    for way in ("encode", "decode") if both else ():
        ratio = min(result[ENCODEC][way] / result[ours][way] for result in both)
        found.append(at_least(f"times faster than {ENCODEC} to {way}", "any length", ratio, FASTER, "", 1))
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def _order(results: dict[str, Any], names: list[str]) -> list[str]:
    """Keys of probes as they are read: log-mel, then each codec's, single codebooks first, then by their number."""

    def place(key: str) -> tuple[int, ...]:
        numbers = [int(number) for number in key.split("/")[1].split("-")]
        return len(numbers), numbers[-1]

    by_codec = (sorted((key for key in results if key.startswith(f"{name}/")), key=place) for name in names)
    return [key for key in results if key == LOG_MEL] + [key for keys in by_codec for key in keys]


def phonemes_table(results: dict[str, Any], names: list[str]) -> str:
    groups = list(next(iter(results.values())))
    rows = []
    for name in (n for n in names if n in results):
        rates = [results[name][group] for group in groups]
        rows.append([name, *(f"{r['per']:.1f} ({r['low']:.1f}–{r['high']:.1f})" for r in rates)])
    head = "Phoneme errors, % (95 % interval), of the recogniser that codebook 0 was trained in:\n\n"
    return head + table(["codec", *groups], rows)


def words_table(words: dict[str, Any], names: list[str]) -> str:
    """Single codebooks beyond the first are in the JSON and the plot only."""
    keys = [key for key in _order(words, names) if key == LOG_MEL or key.endswith("/0") or "-" in key.split("/")[1]]
    groups = list(next(iter(words.values()))["tests"])
    rows = []
    for key in keys:
        row = [key]
        for group in groups:
            r = words[key]["tests"][group]
            mel = words[LOG_MEL]["tests"][group]["wer"] if LOG_MEL in words and key != LOG_MEL else 0
            relative = f", {100 * (r['wer'] / mel - 1):+.0f} %" if mel else ""
            row.append(f"{r['wer']:.1f} ({r['low']:.1f}–{r['high']:.1f}), {r['cer']:.1f}{relative}")
        rows.append(row)
    first = next(iter(words.values()))
    probe = f"a small CTC probe ({first['steps']} steps on {first['train_clips']} clips)"
    head = f"WER % (95 % interval), CER %, and WER relative to log-mel, of {probe}:\n\n"
    return head + table(["input", *groups], rows)


def traits_table(results: Results, names: list[str]) -> str:
    columns: dict[str, dict[str, Any]] = {}  # "speaker synthetic" -> key of an input -> result
    for task in ("speaker", "emotion"):
        for key, result in results.get(task, {}).items():
            group, name = key.split("/", 1)
            columns.setdefault(f"{task} {group}", {})[name] = result
    keys = _order({key: None for column in columns.values() for key in column}, names)
    rows = [[key, *(f"{c[key]['uar']:.1f}" if key in c else "" for c in columns.values())] for key in keys]
    first = [next(iter(column.values())) for column in columns.values()]
    rows.append(["chance", *(f"{r['chance']:.1f} ({r['classes']} classes, {r['test_clips']} clips)" for r in first)])
    return "UAR % of a small probe, mean over seeds:\n\n" + table(["input", *columns], rows)


def fidelity_table(results: dict[str, Any], names: list[str]) -> str:
    groups = list(next(iter(results.values())))
    rows = []
    for key in [ORIGINAL, *_order(results, names)]:
        for group in groups if key in results else ():
            r = results[key][group]
            measured = [f"{r[m]:.2f}" if m in r else "" for m in ("mel_db", "si_sdr", "stoi", "pesq")]
            rows.append([key, group, *measured, f"{r['wer']:.1f} ({r['low']:.1f}–{r['high']:.1f})"])
    head = ["codebooks", "speech", "mel L1 (dB)", "SI-SDR (dB)", "STOI", "PESQ wb", "PocketSphinx WER %"]
    return table(head, rows)


def codes_table(results: Results, names: list[str]) -> str:
    rows = []
    for name in names:
        for group, r in results.get("use", {}).get(name, {}).items():
            shares = [100 * value / r["card"] for value in r["perplexity"]]
            bits = [f"{r['nominal_bits_per_second']:.0f}", f"{r['entropy_bits_per_second']:.0f}"]
            first = f"{r['perplexity'][0]:.0f} of {r['card']} ({shares[0]:.0f} %)"
            rows.append([name, group, first, f"{min(shares):.0f} %", *bits])
    head = ["codec", "speech", "perplexity, codebook 0", "least used codebook", "bit/s nominal", "bit/s entropy"]
    return table(head, rows)


def stability_table(results: dict[str, Any], names: list[str]) -> str:
    rows, changes = [], list(next(iter(next(iter(results.values())).values())))
    for name in (n for n in names if n in results):
        for group, r in results[name].items():
            cells = [f"{r[c][0]:.1f}; {sum(r[c][1:]) / max(1, len(r[c]) - 1):.1f}" for c in changes]
            rows.append([name, group, *cells])
    return "Codes that stay, %: codebook 0; mean of the others:\n\n" + table(["codec", "speech", *changes], rows)


def speed_table(results: dict[str, Any], ours: str) -> str:
    rows = []
    for key, r in results.items():
        seconds, threads = key.split("/")
        row = [seconds, threads, *(f"{r[ours][way]:.4f}" for way in ("encode", "decode"))]
        if ENCODEC in r:
            pairs = ((r[ENCODEC][way], r[ENCODEC][way] / r[ours][way]) for way in ("encode", "decode"))
            row += [f"{theirs:.4f} ({ratio:.1f}×)" for theirs, ratio in pairs]
        rows.append(row if ENCODEC in r else [*row, "", ""])
    longest = max(
        (k.split("/")[0] for k, r in results.items() if ENCODEC in r), key=lambda s: float(s[:-2]), default=""
    )
    note = f"{ENCODEC} (random weights) was timed up to {longest}, for memory." if longest else ""
    head = ["clip", "threads", "encode", "decode", "EnCodec encode", "EnCodec decode"]
    return f"Seconds of work per second of audio. {note}\n\n" + table(head, rows)


def bars(
    path: Path, panels: dict[str, dict[str, dict[str, float]]], unit: str, lines: dict[str, dict[str, float]]
) -> None:
    """Grouped bars: panel -> series -> label -> value, and for some panels horizontal lines: name -> height."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 3.6), squeeze=False)
    for axis, (title, series) in zip(axes[0], panels.items(), strict=True):
        labels = list(dict.fromkeys(label for values in series.values() for label in values))
        width = 0.8 / max(1, len(series))
        for number, (name, values) in enumerate(series.items()):
            places = [labels.index(label) + (number - (len(series) - 1) / 2) * width for label in values]
            axis.bar(places, list(values.values()), width, label=name)
        for style, (name, height) in zip(("--", ":"), lines.get(title, {}).items(), strict=False):
            axis.axhline(height, color="black", linestyle=style, label=name)
        axis.set_xticks(range(len(labels)), labels, rotation=30, fontsize=8)
        axis.set(title=title, ylabel=unit)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plots(out: Path, results: Results, names: list[str]) -> None:
    """A picture of each part that was measured, by its name."""
    if found := results.get("phonemes"):
        rates = {name: {group: r["per"] for group, r in found[name].items()} for name in names if name in found}
        bars(out / "phonemes.png", {"phonemes misheard": rates}, "%", {})
    if words := results.get("words"):
        groups = list(next(iter(words.values()))["tests"])
        panels = {
            g: {
                n: {k.split("/")[1]: words[k]["tests"][g]["wer"] for k in _order(words, [n]) if k != LOG_MEL}
                for n in names
            }
            for g in groups
        }
        lines = {g: {LOG_MEL: words[LOG_MEL]["tests"][g]["wer"]} for g in groups if LOG_MEL in words}
        bars(out / "words.png", panels, "WER %", lines)
    for task in ("speaker", "emotion"):
        panels, lines = {}, {}
        for key, result in results.get(task, {}).items():
            group, name = key.split("/", 1)
            series = panels.setdefault(f"{task} {group}", {})
            if name == LOG_MEL:
                lines[f"{task} {group}"] = {LOG_MEL: result["uar"], "chance": result["chance"]}
            else:
                series.setdefault(name.split("/")[0], {})[name.split("/")[1]] = result["uar"]
        if panels:
            bars(out / f"{task}.png", panels, "UAR %", lines)
    if found := results.get("fidelity"):
        panels = {}
        for key, by_group in found.items():
            for group, r in by_group.items():
                for measure in ("mel_db", "stoi", "pesq", "wer"):
                    if measure in r:
                        name, books = ([*key.split("/"), ORIGINAL])[:2]
                        panels.setdefault(measure, {}).setdefault(f"{name} {group}", {})[books] = r[measure]
        bars(out / "fidelity.png", panels, "", {})
    if found := results.get("use"):
        series = {
            f"{name} {group}": {str(b): 100 * p / r["card"] for b, p in enumerate(r["perplexity"])}
            for name in names
            for group, r in found.get(name, {}).items()
        }
        bars(
            out / "use.png",
            {"perplexity by codebook": series},
            "% of card",
            {"perplexity by codebook": {"bound": USED}},
        )
    if found := results.get("stability"):
        panels = {
            f"{name} {group}": {change: {str(b): v for b, v in enumerate(values)} for change, values in r.items()}
            for name in names
            for group, r in found.get(name, {}).items()
        }
        bars(out / "stability.png", panels, "codes that stay, %", {})
    if found := results.get("speed"):
        panels = {way: {} for way in ("encode", "decode")}
        for key, r in found.items():
            seconds, threads = key.split("/")
            for name, ways in r.items():
                for way, value in ways.items():
                    panels[way].setdefault(f"{name}, {threads} threads", {})[seconds] = value
        bars(out / "speed.png", panels, "seconds per second of audio", {})


def write_report(out: Path, codecs: dict[str, Codec], results: Results) -> str:
    """results.json, results.md and the plots, from whatever has been measured; returns the Markdown."""
    names = list(codecs)
    found = verdicts(results, names)
    words = {True: "reached", False: "not reached", None: f"not judged: no WER below {READABLE:g}"}
    rows = [[v.what, v.on, v.value, v.bound, words[v.reached]] for v in found]
    parts = [table(["asked", "speech", "measured", "bound", ""], rows)] if rows else []
    if "phonemes" in results:
        parts.append(phonemes_table(results["phonemes"], names))
    if "words" in results:
        parts.append(words_table(results["words"], names))
    if "speaker" in results or "emotion" in results:
        parts.append(traits_table(results, names))
    if "fidelity" in results:
        parts.append(fidelity_table(results["fidelity"], names))
    if "use" in results:
        parts.append(codes_table(results, names))
    if "stability" in results:
        parts.append(stability_table(results["stability"], names))
    if "speed" in results:
        parts.append(speed_table(results["speed"], names[0]))
    text = "\n".join(parts)
    about = {
        name: {
            "parameters": sum(p.numel() for p in c.parameters()) if isinstance(c, torch.nn.Module) else None,
            "n_q": c.n_q,
            "card": c.card,
            "frame_rate": c.frame_rate,
            "weights": c.fingerprint(c.n_q),
        }
        for name, c in codecs.items()
    }
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    whole = {"codecs": about, "machine": machine, "bounds": [asdict(v) for v in found], **results}
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (out / "results.md").write_text(text, encoding="utf-8")
    plots(out, results, names)
    return text
