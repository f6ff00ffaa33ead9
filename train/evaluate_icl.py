"""Does a checkpoint learn from shots? ``python -m train.evaluate_icl --model DIR --out DIR``

Questions about recordings of test splits after 0, 1, 2, … solved examples whose labels are made up, and the same with
controls, under which what the shots teach is gone. Rows that are finished are kept in ``rows.jsonl`` of the out folder:
an interrupted evaluation goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from speechllm.checkpoint import load_checkpoint
from speechllm.checkpoint_settings import DEFAULT
from speechllm.errors import InputError
from speechllm.metrics import bootstrap_interval, mean_interval, normalize_text, wer
from speechllm.tasks import TASKS
from speechllm.tasks.few_shot import HOT_WORD_LETTERS, HOT_WORD_RECORDINGS
from speechllm.tasks.wordings import TRANSCRIBE
from train.commands import plain_errors
from train.icl_answers import Advance, Listener
from train.icl_clips import GAP, HEARD, PAIRS, PART, SNR_DB, Sets
from train.icl_plot import plot
from train.icl_report import FREE, SHOTS, Point, Report, Row, read_row, write_report
from train.icl_suite import (
    CONTROLLED,
    CONTROLS,
    ROWS,
    TRANSCRIPTS,
    WORD_SHOTS,
    Episode,
    LabelRow,
    WordRow,
    controlled,
    episodes,
    short_enough,
    transcripts,
)
from train.icl_suite import SHOTS as COUNTS
from train.kept import Kept, file_digest, weights_fingerprint
from train.loop import progress_bar
from train.output import output_folder

KEPT = "rows.jsonl"


class Device(str, Enum):
    """Where the language model runs."""

    cpu = "cpu"
    cuda = "cuda"


@dataclass(frozen=True)
class Options:
    """shots: of each of two classes. asked: questions of each row, at most."""

    shots: tuple[int, ...] = COUNTS
    asked: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if 0 not in self.shots or not any(1 <= count <= CONTROLLED for count in self.shots):
            raise InputError(
                f"--shots {', '.join(map(str, self.shots))}: give 0 too, which tells what chance is, and one of 1 to "
                f"{CONTROLLED}, for the controls"
            )

    @property
    def control(self) -> int:
        """Shots of each class that controls are asked with."""
        return max(count for count in self.shots if count <= CONTROLLED)


Start = Callable[[int], Advance]  # told how many questions there are, gives what is to be told of each that is answered


def measure(row: LabelRow | WordRow, sets: Sets, listener: Listener, options: Options, start: Start) -> Row:
    """Ask all questions of a row. Raises InputError."""
    if isinstance(row, WordRow):
        return measure_words(row, sets, listener, options, start)
    return measure_labels(row, sets, listener, options, start)


def measure_labels(row: LabelRow, sets: Sets, listener: Listener, options: Options, start: Start) -> Row:
    """Accuracy by number of shots, under the controls, and without a grammar where labels are held-out names alone."""
    every = row.classes(sets, options.seed)
    classes, left_out = short_enough(row, every, max(options.shots), listener)
    whole = episodes(row, classes, options.asked, max(options.shots), options.seed)
    top = [episode.first(2 * options.control) for episode in whole]
    asked = {(SHOTS, k): [episode.first(2 * k) for episode in whole] for k in options.shots}
    asked |= {(name, options.control): controlled(row, top, name, options.seed) for name in CONTROLS}
    free = row.part == "A"
    advance = start(len(whole) * (len(asked) + free))
    points = []
    for (condition, shots), some in asked.items():
        said = listener.choose(prompts(listener, some), [episode.labels for episode in some], advance)
        points.append(accuracy(condition, shots, some, said))
    if free:
        longest = listener.answer_ids(row.labels)
        points.append(accuracy(FREE, options.control, top, listener.say(prompts(listener, top), longest, advance)))
    clips = {clip.key: clip for own in classes.values() for clip in own}
    return Row(
        name=row.name,
        part=row.part,
        sets=row.sets,
        unit="accuracy %",
        questions=len(whole),
        clips=len(clips),
        speakers=len({item.utterance.speaker for clip in clips.values() for item in clip.items} - {None}),
        left_out=left_out,
        fewest=min(len(others) for episode in whole for others in episode.others),
        points=tuple(points),
    )


def measure_words(row: WordRow, sets: Sets, listener: Listener, options: Options, start: Start) -> Row:
    """WER of transcripts, or recall of rare words, by condition."""
    asked, left_out = transcripts(row, sets, listener, options.asked, options.seed)
    advance = start(sum(map(len, asked.values())))
    answer_ids = listener.checkpoint.settings.max_answer_tokens
    score = recall if row.rare else word_errors
    points = []
    for (condition, shots), some in asked.items():
        said = listener.say(prompts(listener, some), answer_ids, advance, TASKS["transcribe"])
        points.append(score(condition, shots, some, said))
    whole = next(iter(asked.values()))
    heard = {clip.key: clip for some in asked.values() for episode in some for clip in episode.clips}
    return Row(
        name=row.name,
        part=row.part,
        sets=row.sets,
        unit="recall %" if row.rare else "WER %",
        questions=len(whole),
        clips=len(heard),
        speakers=len({clip.speaker for clip in heard.values()} - {None}),
        left_out=left_out,
        fewest=0,
        points=tuple(points),
    )


def prompts(listener: Listener, some: Sequence[Episode]) -> list:
    """Ids ``[seq]`` of each question. Raises InputError for one that does not fit the model."""
    room = listener.checkpoint.settings.max_answer_tokens
    return [
        listener.prompt(e.instruction, e.clip, e.shots, listener.answer_ids(e.labels) if e.labels else room)
        for e in some
    ]


def accuracy(condition: str, shots: int, some: Sequence[Episode], said: Sequence[str]) -> Point:
    """The share of answers that are the right label."""
    return _share(condition, shots, some, [answer == e.answer for e, answer in zip(some, said, strict=True)])


def recall(condition: str, shots: int, some: Sequence[Episode], said: Sequence[str]) -> Point:
    """The share of answers with the rare word in them."""
    found = [e.word in normalize_text(answer).split() for e, answer in zip(some, said, strict=True)]
    return _share(condition, shots, some, found)


def word_errors(condition: str, shots: int, some: Sequence[Episode], said: Sequence[str]) -> Point:
    """WER."""
    true = [episode.answer for episode in some]
    low, high = bootstrap_interval(true, said)
    return Point(condition, shots, 100 * wer(true, said), 100 * low, 100 * high)


def _share(condition: str, shots: int, some: Sequence[Episode], right: Sequence[bool]) -> Point:
    low, high = mean_interval(right, [episode.clip.key for episode in some])
    return Point(condition, shots, 100 * sum(right) / len(right), 100 * low, 100 * high)


def fingerprint(row: LabelRow | WordRow, sets: Sets, weights: str, options: Options) -> str:
    """Of all that a row's results depend on. weights: fingerprint of the checkpoint."""
    told: dict[str, Any] = {"row": row.name, "checkpoint": weights, **asdict(options)}
    told["heard"] = (HEARD, PART, GAP, SNR_DB, PAIRS)
    if isinstance(row, WordRow):
        told["asked"] = (TRANSCRIBE[0], TRANSCRIPTS, WORD_SHOTS, HOT_WORD_LETTERS, HOT_WORD_RECORDINGS)
    else:
        told["asked"] = (row.wording, row.labels, CONTROLLED)
    told["manifests"] = [file_digest(sets.manifest(name)) for name in (*row.sets, *row.needs)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def evaluate(model: Path, sets: Sets, rows: Sequence[str], options: Options, out: Path, device: str = "cpu") -> Report:
    """Measure the rows that are not kept in ``out`` yet.

    Raises InputError, before any of them where a set is missing.
    """
    for name in dict.fromkeys(name for row in rows for name in (*ROWS[row].sets, *ROWS[row].needs)):
        sets.manifest(name)
    checkpoint = load_checkpoint(model, device)
    listener, kept = Listener(checkpoint), Kept(out / KEPT, read_row)
    weights = weights_fingerprint(checkpoint.folder, checkpoint.settings, None)
    prints = {name: fingerprint(ROWS[name], sets, weights, options) for name in rows}
    found = {name: kept.found(name, own) for name, own in prints.items()}
    with progress_bar() as bar:
        for name in rows:
            if found[name] is None:
                line = bar.add_task(name, total=None)

                def start(total: int) -> Advance:
                    bar.update(line, total=total)  # noqa: B023
                    return lambda count: bar.advance(line, count)  # noqa: B023

                row = found[name] = measure(ROWS[name], sets, listener, options, start)
                kept.keep(name, prints[name], row)
    measured = tuple(row for row in found.values() if row is not None)
    return Report(checkpoint.settings.name, weights, options.asked, options.seed, measured)


def main(
    out: Annotated[Path, typer.Option(help="folder for results.json, results.md, results.png and rows.jsonl")],
    model: Annotated[Path, typer.Option(help="checkpoint folder")] = DEFAULT,
    corpus: Annotated[Path, typer.Option(help="folder of sets: test_en, test_words, …")] = Path("data/corpus"),
    source: Annotated[Path, typer.Option(help="folder of sets that are not there")] = Path("../shared/data"),
    shots: Annotated[
        list[int] | None,
        typer.Option(min=0, help=f"of each class; repeatable; by default {', '.join(map(str, COUNTS))}"),
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="questions of each row, at most")] = 200,
    only: Annotated[list[str] | None, typer.Option(help="only this row; repeatable")] = None,
    seed: Annotated[int, typer.Option(help="of what is drawn")] = 0,
    device: Annotated[Device, typer.Option(help="of the language model")] = Device.cpu,
) -> None:
    """Measure how well a checkpoint follows shots, with controls. Finished rows of an earlier call are kept."""
    with plain_errors("stopped: finished rows are kept; run the same command to go on"):
        for name in only or ():
            if name not in ROWS:
                raise InputError(f"--only {name}: no such row; there are {', '.join(ROWS)}")
        options = Options(tuple(sorted(set(shots or COUNTS))), episodes, seed)
        if device is Device.cuda and not torch.cuda.is_available():
            raise InputError("--device cuda: no CUDA device is available; use --device cpu")
        rows = [name for name in ROWS if name in (only or ROWS)]
        with output_folder(out):
            report = evaluate(model, Sets(corpus, source), rows, options, out, device.value)
            typer.echo(write_report(report, out))
            plot(report, out / "results.png")


if __name__ == "__main__":
    typer.run(main)
