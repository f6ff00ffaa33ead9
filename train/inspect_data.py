"""What is in a corpus: ``python -m train.inspect_data MANIFEST... [--out DIR]``.

Not named ``inspect``: a script of this folder (``python train/pretrain.py``) would import it for Python's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import Annotated, Any, get_args

import matplotlib
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from speechllm.checkpoint_settings import DEFAULT
from speechllm.codec import Codec, load_codec
from speechllm.data.corpus import Item, read_corpus
from speechllm.data.manifest import Split, Utterance
from speechllm.errors import InputError
from speechllm.prompt import Example, Rendered, render
from speechllm.tasks import TASKS, Parts, Task
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train.amounts import shown_time
from train.commands import plain_errors
from train.loop import progress_bar
from train.output import output_folder

matplotlib.use("Agg")
import matplotlib.pyplot as plt

N_Q = 1  # codebooks, as train.encode keeps unless told otherwise
SHOWN_CODES = 3
SHOWN_ROWS = 15  # of a table of names, on the screen and in Markdown; the JSON holds all
UNKNOWN = "(unknown)"
COLUMNS: dict[str, Callable[[Utterance], str | None]] = {
    "split": lambda u: u.split,
    "language": lambda u: u.language,
    "speaker": lambda u: u.speaker,
    "source": lambda u: u.source,
}


def numbers(values: Sequence[float]) -> dict[str, float]:
    """Least, median, mean, most and sum; nothing for no values."""
    if not values:
        return {}
    found = {"min": min(values), "median": median(values), "mean": mean(values), "max": max(values), "sum": sum(values)}
    return {name: round(float(value), 4) for name, value in found.items()}


def counted(groups: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Name -> durations in seconds, to name -> utterances and hours; most utterances first."""
    ordered = sorted(groups.items(), key=lambda pair: -len(pair[1]))
    return {name: {"utterances": len(s), "hours": round(sum(s) / 3600, 6)} for name, s in ordered}


def by_column(items: Sequence[Item]) -> dict[str, dict[str, dict[str, float]]]:
    """Column of the manifest -> value -> utterances and hours."""
    tables = {}
    for column, value_of in COLUMNS.items():
        groups: dict[str, list[float]] = {}
        for item in items:
            groups.setdefault(value_of(item.utterance) or UNKNOWN, []).append(item.utterance.duration)
        tables[column] = counted(groups)
    return tables


def questions(utterance: Utterance) -> dict[Task, tuple[str, Parts]]:
    """The tasks that have an answer for an utterance: the first wording, and the answer."""
    posed = {task: task.pose(utterance.facts(), Random(utterance.id), task.wordings[:1]) for task in TASKS.values()}
    return {task: asked for task, asked in posed.items() if asked}


def heard(task: Task, codes: Tensor) -> Tensor:
    """The codes ``[n_q, frames]``, none of them for a task on text alone."""
    return codes if task.listens else codes[:, :0]


def by_task(items: Sequence[Item]) -> dict[str, dict[str, float]]:
    """Task -> utterances it has an answer for, and their hours; every task is named."""
    groups: dict[str, list[float]] = {name: [] for name in TASKS}
    for item in items:
        for task in questions(item.utterance):
            groups[task.name].append(item.utterance.duration)
    return counted(groups)


def sequence_lengths(
    items: Sequence[Item], codec: Codec, vocabulary: Vocabulary, text: TextTokenizer
) -> Iterator[list[int]]:
    """For each utterance the ids of its training sequences, one for each task it has an answer for.

    The audio is not encoded: its frames follow from the duration, and codes that never repeat stand for it.
    """
    for item in items:
        frames = math.ceil(round(item.utterance.duration * codec.frame_rate, 3))
        codes = (torch.arange(frames) % vocabulary.card).expand(vocabulary.n_q, frames)
        yield [
            len(render(Example(heard(task, codes), *asked, task.name), vocabulary, text).ids)
            for task, asked in questions(item.utterance).items()
        ]


def control_names(vocabulary: Vocabulary) -> dict[int, str]:
    """Control id -> the name of the vocabulary's property for it."""
    names = [name for name, value in vars(Vocabulary).items() if isinstance(value, property) and name[0] != "_"]
    found = {getattr(vocabulary, name): name for name in names if name != "size"}
    marks = {vocabulary.speaker(n): f"speaker {n}" for n in range(1, vocabulary.MAX_SPEAKERS + 1)}
    marks |= {
        vocabulary.time(n * vocabulary.TIME_STEP): f"{n * vocabulary.TIME_STEP:.2f}" for n in range(vocabulary.times)
    }
    return {index: name for index, name in found.items() if isinstance(index, int)} | marks


def readable(rendered: Rendered, vocabulary: Vocabulary, text: TextTokenizer) -> str:
    """A sequence as people read it: ``<control>``, ``<code 17> … (54 codes)``, "text"; ⟦ ⟧ is what is trained on."""
    names = control_names(vocabulary)
    kinds = torch.where(vocabulary.is_text(rendered.ids), 1, torch.where(vocabulary.is_audio(rendered.ids), 2, 0))
    marked = list(zip(rendered.loss_mask.tolist(), kinds.tolist(), rendered.ids.tolist(), strict=True))
    parts: list[str] = []
    for loss, part in groupby(marked, key=lambda one: one[0]):
        shown: list[str] = []
        for kind, run in groupby(part, key=lambda one: one[1]):
            ids = [index for _, _, index in run]
            if kind == 1:
                shown.append(json.dumps(text.decode(ids), ensure_ascii=False))
            elif kind == 2:
                codes = vocabulary.codes(torch.tensor(ids)).T.flatten().tolist()
                dots = ["…"] if len(codes) > SHOWN_CODES else []
                shown += [*(f"<code {code}>" for code in codes[:SHOWN_CODES]), *dots, f"({len(codes)} codes)"]
            else:
                shown += [f"<{names.get(index, f'control {index - vocabulary.text_size}')}>" for index in ids]
        parts.append(f"⟦{' '.join(shown)}⟧" if loss else " ".join(shown))
    return " ".join(parts)


def examples(
    items: Sequence[Item], count: int, codec: Codec, vocabulary: Vocabulary, text: TextTokenizer
) -> list[dict[str, Any]]:
    """Some training sequences, the same at every call; each task in turn, as far as the corpus has answers for it."""
    shuffled = list(items)
    Random(0).shuffle(shuffled)
    by_task: dict[Task, list[Item]] = {}
    for item in shuffled:
        for task in questions(item.utterance):
            by_task.setdefault(task, []).append(item)
    # each time another utterance: one that has answers for several tasks would come first in all of them
    turns = [
        (task, found[(number * len(by_task) + offset) % len(found)])
        for number in range(count)
        for offset, (task, found) in enumerate(by_task.items())
    ]
    shown = []
    for task, item in turns[:count]:
        known = item.utterance
        if known.is_text:
            codes = torch.zeros(N_Q, 0, dtype=torch.int64)
        else:
            codes = codec.encode(item.wav(codec.sample_rate), n_q=N_Q)
        example = Example(heard(task, codes), *questions(known)[task], task.name, known.language, known.speaker)
        rendered = render(example, vocabulary, text)
        sequence = readable(rendered, vocabulary, text)
        shown.append({"id": known.id, "task": task.name, "ids": len(rendered.ids), "sequence": sequence})
    return shown


def tables(report: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of every table of the report."""
    spans = {"duration (s)": report["durations"], "ids per sequence": report["sequence_ids"]}
    rows = [
        [name, *(f"{span[key]:.2f}" for key in ("min", "median", "mean", "max"))]
        for name, span in spans.items()
        if span
    ]
    title = f"{report['utterances']} utterances, {shown_time(3600 * report['hours'])}"
    yield title, ["", "least", "median", "mean", "most"], rows
    for title, groups in {**report["by"], "task": report["tasks"]}.items():
        rows = [[name, str(of["utterances"]), shown_time(3600 * of["hours"])] for name, of in groups.items()]
        if len(rows) > SHOWN_ROWS and title != "task":  # of tasks it matters which have no answers
            rest = list(groups.values())[SHOWN_ROWS:]
            length = shown_time(3600 * sum(of["hours"] for of in rest))
            rows = [*rows[:SHOWN_ROWS], [f"… {len(rest)} more", str(sum(of["utterances"] for of in rest)), length]]
        yield f"by {title}", [title, "utterances", "length"], rows


def as_markdown(report: dict[str, Any]) -> str:
    parts = []
    for title, head, rows in tables(report):
        cells = [head, ["---"] * len(head), *rows]
        parts.append(f"## {title}\n\n" + "\n".join("| " + " | ".join(row).replace("\n", " ") + " |" for row in cells))
    for example in report["examples"]:
        parts.append(f"## {example['id']}, {example['task']}, {example['ids']} ids\n\n```\n{example['sequence']}\n```")
    return "\n\n".join(parts) + "\n"


def show(report: dict[str, Any], console: Console) -> None:
    for title, head, rows in tables(report):
        table = Table(title=title, title_justify="left")
        for number, name in enumerate(head):
            table.add_column(name, justify="right" if number else "left")
        for row in rows:
            table.add_row(*(cell.replace("[", "\\[") for cell in row))
        console.print(table)
    for example in report["examples"]:
        line = f"\n{example['id']}, {example['task']}, {example['ids']} ids"
        console.print(line, example["sequence"], sep="\n", markup=False, highlight=False, soft_wrap=True)


def plots(out: Path, durations: Sequence[float], lengths: Sequence[int], tasks: dict[str, dict[str, float]]) -> None:
    """durations.png, sequences.png and tasks.png."""
    for name, values, label in (
        ("durations", durations, "duration (s)"),
        ("sequences", lengths, "ids per training sequence"),
    ):
        figure, axis = plt.subplots(figsize=(5.5, 3.6))
        axis.hist(values, bins=50)
        axis.set(xlabel=label, ylabel="utterances" if name == "durations" else "sequences")
        _save(figure, out / f"{name}.png")
    figure, axis = plt.subplots(figsize=(5.5, 1.5 + 0.3 * len(tasks)))
    axis.barh(list(tasks)[::-1], [of["utterances"] for of in tasks.values()][::-1])
    axis.set(xlabel="utterances with an answer")
    _save(figure, out / "tasks.png")


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def inspect_corpus(
    manifests: Sequence[Path], out: Path | None, text_model: Path, codec_folder: Path, count: int
) -> dict[str, Any]:
    """Everything that is said about the corpus; written to ``out`` too where it is given.

    Raises:
        InputError: a manifest, the text model, the codec or the audio of an example cannot be read.
    """
    items = [item for split in get_args(Split) for item in read_corpus(manifests, split, True, texts=True)]
    if not items:
        raise InputError(f"no utterance in {', '.join(map(str, manifests))}")
    text = TextTokenizer.load(text_model)
    codec = load_codec(codec_folder)
    longest = max(item.utterance.duration for item in items)
    times = math.ceil(longest / Vocabulary.TIME_STEP) + 1
    vocabulary = Vocabulary(text.size, N_Q, codec.card, times=times)
    lengths: list[int] = []
    with progress_bar(Console(stderr=True)) as bar:
        for found in bar.track(sequence_lengths(items, codec, vocabulary, text), len(items), description="render"):
            lengths += found
    durations = [item.utterance.duration for item in items if not item.utterance.is_text]
    report = {
        "manifests": [str(path) for path in manifests],
        "utterances": len(items),
        "hours": round(sum(durations) / 3600, 6),
        "durations": numbers(durations),
        "by": by_column(items),
        "tasks": by_task(items),
        "sequence_ids": numbers(lengths),
        "examples": examples(items, count, codec, vocabulary, text),
    }
    if out is not None:
        with output_folder(out):
            (out / "inspect.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            (out / "inspect.md").write_text(as_markdown(report), encoding="utf-8")
            plots(out, durations, lengths, by_task(items))
    return report


def main(
    manifest: Annotated[list[Path], typer.Argument(help="manifest.jsonl files, or their folders")],
    out: Annotated[Path | None, typer.Option(help="folder for inspect.json, inspect.md and the plots")] = None,
    text_model: Annotated[Path, typer.Option(help="text tokenizer")] = DEFAULT / "text.model",
    codec: Annotated[Path, typer.Option(help="codec folder")] = DEFAULT / "codec",
    examples: Annotated[int, typer.Option(help="training sequences to show", min=0)] = 3,
) -> None:
    """Count a corpus by split, language, speaker, source and task, and show some of its training sequences.

    These are of codebook 0 alone, with every frame: other layouts of a config have other ids.
    """
    with plain_errors():
        torch.set_num_threads(1)
        show(inspect_corpus(manifest, out, text_model, codec, examples), Console())


if __name__ == "__main__":
    typer.run(main)
