"""Score a checkpoint on held-out speech through ``speechllm ask``: ``python -m train.evaluate SET … --out DIR``."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

from speechllm.audio import write_audio
from speechllm.checkpoint import DEFAULT
from speechllm.data.corpus import Item, read_corpus
from speechllm.data.manifest import Split
from speechllm.errors import InputError
from speechllm.metrics import bleu, bootstrap_interval, cer, wer
from speechllm.tasks import TASKS, Task
from train.loop import progress_bar

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FILES_A_CALL = 100
RATE = 16000


@dataclass(frozen=True)
class Result:
    """One task on one set, or on the clips of one speaker in it (``speaker`` not None)."""

    set: str
    task: str
    metric: str
    speaker: str | None
    clips: int
    seconds: float
    value: float  # percent for WER, 0-100 for BLEU
    low: float | None  # 95 % interval over clips (bootstrap), for WER
    high: float | None
    cer: float | None
    signature: str | None = None  # of sacrebleu


def reference(item: Item, task: Task) -> str | None:
    """What the answer to ``task`` should be, or None when the data do not say."""
    return task.write(item.utterance.text, item.utterance.translations)


def ask(items: Sequence[Item], instruction: str, model: Path, advance: Callable[[int], None]) -> list[dict]:
    """The answers of ``speechllm ask``, one JSON object an item, in order."""
    answers: list[dict] = []
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
            done = subprocess.run(
                [*command, "--model", str(model), "--format", "json"], capture_output=True, text=True, check=False
            )
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        if failed := [line for line in lines if "error" in line]:
            raise InputError(f"{failed[0]['file']}: {failed[0]['error']}")
        if len(lines) != len(chunk):
            raise InputError(f"speechllm ask ended with code {done.returncode}: {done.stderr.strip()[-500:]}")
        answers += lines
        advance(len(chunk))
    return answers


def score(name: str, task: Task, speaker: str | None, items: Sequence[Item], hypotheses: Sequence[str]) -> Result:
    """The task's metric over ``items``."""
    references = [reference(item, task) or "" for item in items]
    seconds = sum(item.utterance.duration for item in items)
    if task.metric == "bleu":
        value, signature = bleu(references, hypotheses)
        return Result(name, task.name, "BLEU", speaker, len(items), seconds, value, None, None, None, signature)
    low, high = bootstrap_interval(references, hypotheses)
    errors, characters = wer(references, hypotheses), cer(references, hypotheses)
    return Result(
        name, task.name, "WER %", speaker, len(items), seconds, 100 * errors, 100 * low, 100 * high, 100 * characters
    )


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


def evaluate(sets: Sequence[Path], tasks: Sequence[str], model: Path, split: Split, limit: int | None) -> list[Result]:
    """Every task on every set that holds its answers: overall, and by speaker where there are several."""
    results = []
    for path in sets:
        items = read_corpus([path], split)
        name = path.name if path.is_dir() else path.parent.name
        for task in (TASKS[t] for t in tasks):
            chosen = [item for item in items if reference(item, task)][
                :limit
            ]  # clips without speech are no test of words
            if not chosen:
                continue
            with progress_bar() as bar:
                line = bar.add_task(f"{name} {task.name}", total=len(chosen))
                answers = ask(chosen, task.wordings[0], model, lambda n: bar.advance(line, n))  # noqa: B023
            hypotheses = [answer["text"] for answer in answers]
            results.append(score(name, task, None, chosen, hypotheses))
            speakers = sorted({item.utterance.speaker or "" for item in chosen})
            for speaker in speakers if len(speakers) > 1 else ():
                own = [i for i, item in enumerate(chosen) if (item.utterance.speaker or "") == speaker]
                results.append(score(name, task, speaker, [chosen[i] for i in own], [hypotheses[i] for i in own]))
    return results


def main(
    sets: Annotated[list[Path], typer.Argument(help="manifest.jsonl files, or folders of recorded sets")],
    out: Annotated[Path, typer.Option(help="folder for results.json, results.md and results.png")],
    task: Annotated[list[str] | None, typer.Option(help="repeatable; by default every task")] = None,
    model: Annotated[Path, typer.Option(help="checkpoint folder")] = DEFAULT,
    split: Annotated[Split, typer.Option(help="which part of the sets")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="only the first clips of each set")] = None,
) -> None:
    """Score a checkpoint on held-out speech; writes JSON, Markdown and a plot."""
    try:
        for name in task or ():
            if name not in TASKS:
                raise InputError(f"--task {name}: unknown; known are {', '.join(TASKS)}")
        results = evaluate(sets, task or list(TASKS), model, split, limit)
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
