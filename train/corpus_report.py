"""What is in a corpus, how long it took to build, and what its tests are worth: JSON, Markdown, a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from speechllm.data.manifest import Utterance
from speechllm.data.overlap import Heard, answering, heard, persons, trials, untested
from speechllm.tasks import TASKS
from train.amounts import shown_time
from train.corpus_config import SPOKEN, Corpus

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class Timings:
    """Seconds of wall clock that steps took: a line whenever one did something; it may go on in a later run."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, kind: str, name: str, seconds: float, made: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "name": name, "seconds": round(seconds, 1), "made": made}) + "\n")

    def read(self) -> dict[str, dict[str, float]]:
        """Name of a corpus -> kind of step -> seconds."""
        total: dict[str, dict[str, float]] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else ():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # cut by a kill
                continue
            steps = total.setdefault(record["name"], {})
            steps[record["kind"]] = round(steps.get(record["kind"], 0.0) + record["seconds"], 1)
        return total


def survey(corpora: Iterable[Corpus], timings: Timings) -> dict[str, Any]:
    """The report, as JSON holds it. Every manifest is read once, and only the test sets stay in memory.

    Raises:
        InputError: a manifest is missing or damaged.
    """
    trained, seconds = Heard(), timings.read()
    tests: dict[str, list[Utterance]] = {}
    tasks: dict[str, Any] = {task: {"train_recordings": 0, "tests": {}} for task in TASKS}
    described: dict[str, Any] = {}
    for corpus in corpora:
        splits = corpus.by_split()
        described[corpus.name] = {
            "kind": corpus.kind,
            "encoded": corpus.encoded,
            "splits": {split: _amount(utterances) for split, utterances in splits.items() if utterances},
            **corpus.sizes(),
            "seconds": seconds.get(corpus.name, {}),
        }
        if corpus.encoded:
            trained |= heard(splits["train"], written=True)
            for task, recordings in answering(splits["train"]).items():
                tasks[task]["train_recordings"] += len(recordings)
        if corpus.tests:
            tests[corpus.name] = splits["test"]
    found = trials(trained, tests)
    for trial in found:
        newness = {"speakers": trial.speakers, "sentences": trial.sentences, "unseen": trial.unseen}
        tasks[trial.task]["tests"][trial.test] = {"recordings": trial.recordings, **newness}
    return {
        "totals": _totals(described.values()),
        "corpora": described,
        "tasks": tasks,
        "tests": {name: _shared(utterances, trained) for name, utterances in tests.items()},
        "untested": [name for name in untested(found) if tasks[name]["train_recordings"]],
    }


def _amount(utterances: Sequence[Utterance]) -> dict[str, float]:
    hours = sum(utterance.duration for utterance in utterances) / 3600
    return {"utterances": len(utterances), "hours": round(hours, 6), "speakers": len(persons(utterances) - {None})}


def _hours(corpus: dict[str, Any]) -> float:
    return sum(split["hours"] for split in corpus["splits"].values())


def _totals(corpora: Iterable[dict[str, Any]]) -> dict[str, float]:
    totals: dict[str, float] = {f"hours_{kind}": 0.0 for kind in SPOKEN} | {"texts": 0, "seconds": 0.0, "bytes": 0}
    for corpus in corpora:
        if corpus["kind"] in SPOKEN:
            totals[f"hours_{corpus['kind']}"] += _hours(corpus)
        else:
            totals["texts"] += sum(split["utterances"] for split in corpus["splits"].values())
        totals["seconds"] += sum(corpus["seconds"].values())
        totals["bytes"] += corpus["audio_bytes"] + corpus["codes_bytes"]
    return {name: round(total, 6) for name, total in totals.items()}


def _shared(utterances: Sequence[Utterance], trained: Heard) -> dict[str, int]:
    everything = heard(utterances)
    shared = everything & trained
    return {
        "recordings": len(utterances),
        "persons": len(everything.persons - {None}),
        "shared_persons": len(shared.persons),
        "sentences": len(everything.sentences - {None}),
        "shared_sentences": len(shared.sentences),
    }


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


def _corpus_rows(name: str, corpus: dict[str, Any]) -> Iterable[list[object]]:
    """A row for each split; the sizes and times of all are on the first."""
    sizes = [corpus[key] / 1e6 for key in ("audio_bytes", "codes_bytes")]
    steps = corpus["seconds"]
    rest = [*sizes, steps.get("synthesize", 0) + steps.get("converse", 0), steps.get("encode", 0)]
    shown = [f"{number:.1f}" if number else "" for number in rest]
    for split, amount in corpus["splits"].items():
        spoken = [shown_time(3600 * amount["hours"]), amount["speakers"]] if corpus["kind"] in SPOKEN else ["", ""]
        yield [name, corpus["kind"], split, amount["utterances"], *spoken, *shown]
        shown = [""] * len(shown)


def as_markdown(report: dict[str, Any]) -> str:
    """Totals, and tables of corpora, tasks and test sets."""
    totals, tests = report["totals"], report["tests"]
    length = {kind: shown_time(3600 * totals[f"hours_{kind}"]) for kind in SPOKEN}
    corpora = [row for name, corpus in report["corpora"].items() for row in _corpus_rows(name, corpus)]
    columns = ("corpus", "kind", "split", "utterances", "length", "speakers", "audio, MB", "codes, MB")
    tasks = []
    for task, of in report["tasks"].items():
        groups: dict[bool, list[str]] = {True: [], False: []}
        for name, test in of["tests"].items():
            seen = [f"{what} {test[what]}" for what in ("speakers", "sentences") if test[what] != "new"]
            groups[test["unseen"]].append(name if test["unseen"] else f"{name} ({', '.join(seen)})")
        tasks.append([task, of["train_recordings"], *(", ".join(group) for group in groups.values())])
    counts = ("test set", "recordings", "persons", "shared persons", "sentences", "shared sentences")
    parts = [
        "# What is in the corpus",
        f"{length['synthesized']} synthesized, {length['conversations']} of conversations, {length['recorded']} "
        f"recorded, {totals['texts']:,} sentences as text; {shown_time(totals['seconds'])} of work, "
        f"{totals['bytes'] / 1e6:.0f} MB made. "
        "Speakers are persons: several synthetic voices may be one.",
        _table((*columns, "made in, s", "encoded in, s"), corpora),
        "Test sets with answers for a task, first those of new speakers (where the task has audio) and new sentences:",
        _table(("task", "train recordings", "test sets, unseen", "other test sets, and why"), tasks),
        "What test sets share with what is trained on:",
        _table(counts, [[name, *of.values()] for name, of in tests.items()]),
        f"Not tested unseen: {', '.join(report['untested']) or 'no task'}.",
    ]
    return "\n\n".join(parts) + "\n"


def plot(report: dict[str, Any], out: Path) -> None:
    """Bars: how long every corpus is, train recordings of every task."""
    corpora = report["corpora"]
    height = 1.2 + 0.22 * max(len(corpora), len(TASKS))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, height))
    for number, kind in enumerate(SPOKEN):
        hours = {name: _hours(corpus) for name, corpus in corpora.items() if corpus["kind"] == kind and _hours(corpus)}
        bars = left.barh(list(hours), list(hours.values()), color=f"C{number}", label=kind if hours else None)
        left.bar_label(bars, [shown_time(3600 * length) for length in hours.values()], padding=3, fontsize=7)
    left.set(xlabel="hours")
    left.legend(fontsize=8)
    counts = {task: of["train_recordings"] for task, of in report["tasks"].items()}
    right.bar_label(right.barh(list(counts), list(counts.values())), fmt="{:,.0f}", padding=3, fontsize=7)
    right.set(xlabel="train recordings with an answer")
    for axis in (left, right):
        axis.invert_yaxis()
        axis.margins(x=0.12, y=0.01)
        axis.tick_params(axis="y", labelsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def write_report(out: Path, report: dict[str, Any]) -> None:
    """``corpus.json``, ``corpus.md`` and ``corpus.png`` in the folder ``out``."""
    (out / "corpus.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "corpus.md").write_text(as_markdown(report), encoding="utf-8")
    plot(report, out / "corpus.png")
