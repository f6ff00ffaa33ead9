"""The results of the benchmark of answering as tables, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, INT8, PLAIN, HUGGING_FACE = "ours", "ours, int8", "ours, not compiled", "Hugging Face generate"
BUSY = 0.5  # processes that want to run already, on the average


def table(columns: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """In Markdown."""
    lines = [list(columns), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def decoding_table(batches: list[dict[str, Any]]) -> str:
    """How many times as fast as Hugging Face, and ids a second: of those after the first, and from the prompt on."""
    rows = []
    for batch in batches:
        other = batch["ways"][HUGGING_FACE]
        for name, own in batch["ways"].items():
            speeds = [(own[key], other[key]) for key in ("later_ids_per_second", "ids_per_second")]
            times = [f"**{mine / theirs:.1f}**" if mine and theirs else "?" for mine, theirs in speeds]
            rates = [f"{mine:,.0f}" if mine else "?" for mine, _ in speeds]
            if name == HUGGING_FACE:
                times, name = ["1", "1"], f"{name} (`{batch['experts']}`, its fastest)"
            rows.append([batch["batch"], name, *times, f"{own['same_answers']} of {batch['batch']}", *rates])
    columns = ("batch", "way", "times", "with the prompt", "same answers", "ids/s", "with the prompt")
    return table(columns, rows)


def latency_table(latencies: list[dict[str, float]]) -> str:
    rows = [
        (f"{row['seconds']:g} s", f"{row['real_time_factor']:.4f}", _ms(row["first"]), _ms(row["last"]), row["tokens"])
        for row in latencies
    ]
    return table(("clip", "real-time factor", "to the first word, ms", "to the last word, ms", "ids"), rows)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f}"


def throughput_table(throughputs: list[dict[str, float]]) -> str:
    alone = throughputs[0]["clips_per_second"]
    rows = [
        (
            row["concurrent"],
            f"{row['clips_per_second'] / alone:.2f}",
            f"{row['clips_per_second']:.1f}",
            f"{row['audio_per_second']:.0f}",
        )
        for row in throughputs
    ]
    return table(("clips at once", f"times {throughputs[0]['concurrent']}", "clips/s", "seconds of audio/s"), rows)


def questions_table(questions: list[dict[str, float]]) -> str:
    rows = [
        (
            row["questions"],
            f"**{row['one_by_one'] / row['together']:.1f}**",
            _ms(row["together"]),
            _ms(row["one_by_one"]),
        )
        for row in questions
    ]
    return table(("questions", "times as fast", "together, ms", "one by one, ms"), rows)


def shots_table(shots: list[dict[str, float]]) -> str:
    rows = [
        (
            f"{row['shots']:g}",
            f"{row['ids']:,.0f}",
            f"{row['megabytes']:.1f}",
            _ms(row["new"]),
            _ms(row["again"]),
            f"**{row['new'] / row['again']:.1f}**",
        )
        for row in shots
    ]
    return table(("shots", "ids", "memory, MB", "new, ms", "seen, ms", "times as fast"), rows)


def peers_table(result: dict[str, Any]) -> str:
    """How many times as fast ours is, and seconds a second of audio."""
    kinds = result["peers"]
    columns = [f"{kind['seconds']:g} s" if kind["seconds"] else f"{kind['clips']} short clips" for kind in kinds]
    rows = [[OURS, *(f"{kind['real_time_factors'][OURS]:.4f}" for kind in kinds), f"{result['checkpoint']}"]]
    for name, computes in result["computes"].items():
        cells = []
        for kind in kinds:
            factor = kind["real_time_factors"][name]
            cells.append(f"**{factor / kind['real_time_factors'][OURS]:.1f}×** ({factor:.4f})")
        rows.append([name, *cells, computes])
    rows += [[name, *("" for _ in kinds), reason] for name, reason in result["missing"].items()]
    ids = ", ".join(f"{kind['tokens']:g}" for kind in kinds)
    return table(("way", *columns, "what it computes"), rows) + f"\n\nIds made for each clip: {ids}."


def machine_line(machine: dict[str, Any]) -> str:
    """What was measured on, and a warning where it had other work."""
    told = {key: value for key, value in machine.items() if key not in ("processor", "load")}
    line = f"{machine['processor']}, " + ", ".join(f"{key} {value}" for key, value in told.items())
    line += f"; load average at the start {machine['load']:.2f}."
    if machine["load"] > BUSY:
        line += " **The machine was busy: seconds are too long, and ratios less certain.**"
    return line


def as_markdown(result: dict[str, Any]) -> str:
    """Tables for people."""
    differ = [row for row in result["decoding"] if row["ways"][OURS]["same_answers"] < row["batch"]]
    memory = ", ".join(
        f"{count} at once: {megabytes:.0f} MB" if megabytes else f"{count} at once: not told here"
        for count, megabytes in result["megabytes"].items()
    )
    parts = [
        f"# Speed of {result['checkpoint']}",
        f"{machine_line(result['machine'])} Medians of {result['repeats']}, the ways in turns. "
        "Ratios carry over to other machines; seconds do not.",
        "## Decoding",
        f"Times as many ids a second as {HUGGING_FACE} with the same weights and prompts, greedy: of those after an "
        "answer's first, and of all with the time for the prompt.",
        decoding_table(result["decoding"]),
        *(["**Answers differ from Hugging Face's.**"] if differ else []),
        *([] if result["compiled"] else ["There is no C++ compiler here, or the model does not fit the kernel."]),
        "## From file to answer",
        latency_table(result["latency"]),
        "Short clips, so many at a time:",
        throughput_table(result["throughput"]),
        f"From the start of `speechllm ask` to its first answer: {result['cold_start']:.2f} s. "
        f"Most memory it held, clips {memory}.",
        "## Several questions about one clip",
        questions_table(result["questions"]),
        "## Shots before a question",
        "Clips of 2 s and their words, encoded beforehand. Those that were there before an earlier question are not "
        "computed again; their memory is taken once.",
        shots_table(result["shots"]),
        "## Beside others",
        "Ours is so many times as fast as each; in brackets seconds for a second of audio, from file to answer, with "
        "the program loaded. All make as many ids as ours; random weights take the time of trained ones.",
        peers_table(result),
    ]
    return "\n\n".join(parts) + "\n"


def _ratios(result: dict[str, Any]) -> dict[str, float]:
    """How many times as fast ours is as what."""
    ratios = {}
    for key, what in (("later_ids_per_second", "decoding"), ("ids_per_second", "with the prompt")):
        for batch in result["decoding"]:
            own, other = (batch["ways"][name][key] for name in (OURS, HUGGING_FACE))
            if own and other:
                ratios[f"{HUGGING_FACE}, {what}, batch {batch['batch']}"] = own / other
    last, kind = result["questions"][-1], result["peers"][-1]
    ratios[f"{last['questions']} questions, one by one"] = last["one_by_one"] / last["together"]
    shots = result["shots"][-1]
    ratios[f"{shots['shots']} shots, computed anew"] = shots["new"] / shots["again"]
    factors = kind["real_time_factors"]
    return ratios | {f"{name}, {kind['clips']} clips": factors[name] / factors[OURS] for name in result["computes"]}


def plot(result: dict[str, Any], path: Path) -> None:
    """Ratios as bars, clips a second against how many come at once, seconds to the answer by length."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), width_ratios=(1.2, 1, 1.2))
    ratios = _ratios(result)
    bars = left.barh(list(ratios), [ratio - 1 for ratio in ratios.values()], left=1)
    left.bar_label(bars, [f"{ratio:.1f}×" for ratio in ratios.values()], padding=2, fontsize=8)
    left.invert_yaxis()
    left.axvline(1, color="0.3", linewidth=0.8)
    left.set(xscale="log", xlabel="times as fast as")
    left.margins(x=0.15)
    left.tick_params(axis="y", labelsize=8)

    rows = result["throughput"]
    middle.plot([row["concurrent"] for row in rows], [row["clips_per_second"] for row in rows], "o-")
    middle.set(xscale="log", xlabel="clips at once", ylabel="clips per second")
    middle.set_ylim(0, 1.1 * max(row["clips_per_second"] for row in rows))
    middle.set_xticks([row["concurrent"] for row in rows], [str(row["concurrent"]) for row in rows])
    middle.minorticks_off()

    rows = result["latency"]
    lengths = [row["seconds"] for row in rows]
    right.plot(lengths, [row["last"] for row in rows], "o-", color="C0", label=f"{OURS}, last word")
    right.plot(lengths, [row["first"] for row in rows], "o--", color="C0", label=f"{OURS}, first word")
    for number, name in enumerate(result["computes"], 1):
        single = [kind for kind in result["peers"] if kind["seconds"]]
        seconds = [kind["real_time_factors"][name] * kind["seconds"] for kind in single]
        right.plot([kind["seconds"] for kind in single], seconds, "s-", color=f"C{number}", label=name)
    right.set(xscale="log", yscale="log", xlabel="seconds of audio", ylabel="seconds to the answer")
    right.set_xticks(lengths, [f"{length:g}" for length in lengths])
    right.minorticks_off()
    right.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(out: Path, result: dict[str, Any]) -> str:
    """``bench.json``, ``bench.md`` and ``bench.png`` in the folder ``out``; the Markdown."""
    markdown = as_markdown(result)
    (out / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "bench.md").write_text(markdown, encoding="utf-8")
    plot(result, out / "bench.png")
    return markdown
