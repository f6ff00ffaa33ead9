"""Score a checkpoint on held-out speech through ``speechllm ask``: ``python -m train.evaluate SET … --out DIR``."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated

import matplotlib
import typer

from speechllm.adapter import find_adapter, read_adapter
from speechllm.audio import write_audio
from speechllm.checkpoint import DEFAULT, read_settings
from speechllm.data.corpus import Item, read_corpus
from speechllm.data.manifest import Split
from speechllm.errors import InputError
from speechllm.metrics import bleu, bootstrap_interval, cer
from speechllm.tasks import TASKS, Facts, ParsedAnswer, Parts, Segment, Task
from train.loop import progress_bar
from train.scoring import by_speech, score

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FILES_A_CALL = 100
RATE = 16000
NAMES = {  # of scores, in tables
    "wer": "WER %",
    "bleu": "BLEU",
    "invented": "invented words, % of clips without speech",
    "uar": "UAR %",
    "accuracy": "accuracy %",
    "der": "DER %",
    "cpwer": "cpWER %",
    "f1": "speech F1 %",
    "slot_f1": "slot F1 %",
    "intent_accuracy": "intent accuracy %",
    "malformed": "malformed %",
}


@dataclass(frozen=True)
class Result:
    """One task on one set, or on the clips of one speaker in it (``speaker`` not None)."""

    set: str
    task: str
    metric: str
    speaker: str | None
    clips: int
    seconds: float
    value: float  # percent; BLEU from 0 to 100
    low: float | None = None  # 95 % interval over clips (bootstrap), for WER
    high: float | None = None
    cer: float | None = None
    signature: str | None = None  # of sacrebleu


@dataclass(frozen=True)
class Question:
    """What one clip is asked, and the right answer."""

    item: Item
    instruction: str
    answer: Parts


def set_name(path: Path) -> str:
    """Of a set in tables: the name of its folder. path: the folder, or the manifest in it."""
    return path.name if path.is_dir() else path.parent.name


def pose(items: Sequence[Item], task: Task) -> list[Question]:
    """The first wording of the task, asked about each clip of a test set whose data hold the answer.

    Where the answer may be no, what is asked about is so of another of these clips.
    """
    pairs = [(item, item.utterance.facts()) for item in items]
    able = [(item, facts) for item, facts in pairs if task.pose(facts, Random(0))]

    def question(item: Item, facts: Facts) -> Question:
        rng = Random(item.utterance.id)
        asked = task.pose(facts, rng, task.wordings[:1], lambda: rng.choice(able)[1])
        assert asked is not None
        return Question(item, *asked)

    return [question(item, facts) for item, facts in able]


def answers(
    questions: Sequence[Question], task: Task, serving: Sequence[str], advance: Callable[[int], None]
) -> list[ParsedAnswer]:
    """What ``speechllm ask`` answers, in order. serving: its options for the model."""
    found = []
    for answer in ask_all(questions, serving, advance):
        segments = tuple(Segment(**segment) for segment in answer["segments"])
        text = answer["text"]
        found.append(ParsedAnswer(text, segments) if task.marks else task.read((text,) if text else ()))
    return found


def ask_all(questions: Sequence[Question], serving: Sequence[str], advance: Callable[[int], None]) -> list[dict]:
    """The answers of ``speechllm ask``, one JSON object a question, in order."""
    found: dict[int, dict] = {}
    for instruction in dict.fromkeys(question.instruction for question in questions):
        own = [n for n, question in enumerate(questions) if question.instruction == instruction]
        found |= zip(own, ask([questions[n].item for n in own], instruction, serving, advance), strict=True)
    return [found[n] for n in range(len(questions))]


def ask(items: Sequence[Item], instruction: str, serving: Sequence[str], advance: Callable[[int], None]) -> list[dict]:
    """The answers of ``speechllm ask``, one JSON object an item, in order."""
    found: list[dict] = []
    for start in range(0, len(items), FILES_A_CALL):
        chunk = items[start : start + FILES_A_CALL]
        with tempfile.TemporaryDirectory() as folder:
            files = []
            for number, item in enumerate(chunk):
                if item.utterance.tar is None:
                    files.append(str(item.root / item.utterance.audio))
                else:  # a member of a tar file becomes a file of its own
                    files.append(f"{folder}/{number:04d}.wav")
                    write_audio(files[-1], item.wav(RATE), RATE)
            command = [sys.executable, "-m", "serve.cli", "ask", instruction, *files]
            done = subprocess.run([*command, *serving, "--format", "json"], capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        if failed := [line for line in lines if "error" in line]:
            raise InputError(f"{failed[0]['file']}: {failed[0]['error']}")
        if len(lines) != len(chunk):
            raise InputError(f"speechllm ask ended with code {done.returncode}: {done.stderr.strip()[-500:]}")
        found += lines
        advance(len(chunk))
    return found


def results_of(
    name: str, task: Task, speaker: str | None, questions: Sequence[Question], said: Sequence[ParsedAnswer]
) -> list[Result]:
    """The task's scores on these questions, WER with its interval and CER."""
    true = [task.read(question.answer) for question in questions]
    durations = [question.item.utterance.duration for question in questions]
    results = []
    spoken, silent = by_speech(true, said, task)
    for metric, value in score(task, true, said, durations).items():
        if metric == "malformed" and task.marks:
            continue  # the segments of an answer are what could be read of it
        result = Result(name, task.name, NAMES[metric], speaker, len(questions), sum(durations), value)
        if metric == "wer":
            low, high = bootstrap_interval(*spoken)
            result = replace(result, clips=len(spoken[0]), low=100 * low, high=100 * high, cer=100 * cer(*spoken))
        elif metric == "bleu":
            result = replace(result, clips=len(spoken[0]), signature=bleu(*spoken)[1])
        elif metric == "invented":
            result = replace(result, clips=len(silent))
        results.append(result)
    return results


def table(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    lines = ["| set | task | speaker | clips | metric | value | 95 % interval | CER % |", "| --- " * 8 + "|"]
    for r in results:
        interval = f"{r.low:.1f}–{r.high:.1f}" if r.low is not None and r.high is not None else ""
        characters = f"{r.cer:.1f}" if r.cer is not None else ""
        speaker = r.speaker or "all"
        lines.append(
            f"| {r.set} | {r.task} | {speaker} | {r.clips} | {r.metric} | {r.value:.1f} | {interval} | {characters} |"
        )
    lines += [
        f"\nBLEU: sacrebleu, `{signature}`" for signature in sorted({r.signature for r in results if r.signature})
    ]
    return "\n".join(lines) + "\n"


def plot(results: Sequence[Result], path: Path) -> None:
    """A bar for each result with its interval, one panel for each metric."""
    metrics = sorted({r.metric for r in results})
    figure, axes = plt.subplots(1, len(metrics), figsize=(6 * len(metrics), 1 + 0.35 * len(results)), squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        chosen = [r for r in results if r.metric == metric][::-1]
        labels = [f"{r.set} {r.task} {r.speaker or 'all'}" for r in chosen]
        spread = [
            (0.0 if r.low is None else r.value - r.low, 0.0 if r.high is None else r.high - r.value) for r in chosen
        ]
        axis.barh(labels, [r.value for r in chosen], xerr=list(zip(*spread, strict=True)), color="tab:blue", capsize=3)
        axis.set(xlabel=metric, xlim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def evaluate(
    sets: Sequence[Path], tasks: Sequence[str], serving: Sequence[str], split: Split, limit: int | None
) -> list[Result]:
    """Every task on every set that holds its answers: overall, and by speaker where there are several.

    serving: options of ``speechllm ask`` for the model.
    """
    results = []
    for path in sets:
        items = read_corpus([path], split)
        name = set_name(path)
        for task in (TASKS[t] for t in tasks):
            questions = pose(items, task)[:limit]
            if not questions:
                continue
            with progress_bar() as bar:
                line = bar.add_task(f"{name} {task.name}", total=len(questions))
                said = answers(questions, task, serving, lambda n: bar.advance(line, n))  # noqa: B023
            results += results_of(name, task, None, questions, said)
            speakers = sorted({question.item.utterance.speaker or "" for question in questions})
            for speaker in speakers if len(speakers) > 1 else ():
                own = [n for n, q in enumerate(questions) if (q.item.utterance.speaker or "") == speaker]
                results += results_of(name, task, speaker, [questions[n] for n in own], [said[n] for n in own])
    return results


def main(
    sets: Annotated[list[Path], typer.Argument(help="manifest.jsonl files, or folders of recorded sets")],
    out: Annotated[Path, typer.Option(help="folder for results.json, results.md and results.png")],
    task: Annotated[
        list[str] | None, typer.Option(help="repeatable; by default those on audio that the model was trained on")
    ] = None,
    model: Annotated[Path, typer.Option(help="checkpoint folder")] = DEFAULT,
    adapter: Annotated[str | None, typer.Option(help="of the checkpoint, by its name or folder")] = None,
    split: Annotated[Split, typer.Option(help="which part of the sets")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="only the first clips of each set")] = None,
) -> None:
    """Score a checkpoint on held-out speech; writes JSON, Markdown and a plot."""
    try:
        for name in task or ():
            if name not in TASKS:
                raise InputError(f"--task {name}: unknown; known are {', '.join(TASKS)}")
        serving = ["--model", str(model)]
        known = read_settings(model).tasks
        if adapter is not None:
            serving += ["--adapter", adapter]
            known = read_adapter(find_adapter(model, adapter)).tasks
        results = evaluate(sets, task or [name for name in known if TASKS[name].listens], serving, split, limit)
        if not results:
            raise InputError("none of the sets holds an answer to any of the tasks")
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n", encoding="utf-8")
    (out / "results.md").write_text(table(results), encoding="utf-8")
    plot(results, out / "results.png")
    typer.echo(table(results))


if __name__ == "__main__":
    typer.run(main)
