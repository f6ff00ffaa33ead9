"""Making a corpus of numbered utterances: in parallel, resumable, and refused when the settings have changed.

What makes utterance `index` of a corpus must follow from its plan and the index alone: an interrupted run then goes on
where it stopped and gives the same corpus.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import soundfile
import torch
import typer
from rich.console import Console

from speechllm.data.manifest import Split, Utterance, append, read_manifest
from speechllm.errors import InputError
from train.loop import progress_bar
from train.output import output_folder, write_whole
from train.workers import worker_pool

REPORTED_FAILURES = 5


class Plan(Protocol):
    """What every utterance of a corpus follows from; it travels to the worker processes."""

    @property
    def name(self) -> str:
        """Of the corpus: ids begin with it."""

    @property
    def out(self) -> Path:
        """Folder of audio/, manifest.jsonl and settings.json."""

    @property
    def split(self) -> Split: ...

    def settings(self) -> dict[str, Any]:
        """What the utterances depend on, as JSON holds it."""


AnyPlan = TypeVar("AnyPlan", bound=Plan)


@dataclass(frozen=True)
class Outcome:
    """One utterance made, or why it was not."""

    utterance: Utterance | None
    failure: str = ""


def write_utterance(plan: Plan, index: int, wav: np.ndarray, sample_rate: int, **known: Any) -> Utterance:
    """Write the audio [samples] as 16-bit flac and say what is known about it."""
    audio = f"audio/{index // 1000:03d}/{index:07d}.flac"
    path = plan.out / audio
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav, sample_rate, subtype="PCM_16")
    duration = round(len(wav) / sample_rate, 4)
    return Utterance(
        id=f"{plan.name}/{index}", audio=audio, duration=duration, split=plan.split, source=plan.name, **known
    )


_make: Callable[[int], Outcome] | None = None  # of this worker process


def _start_worker(make: Callable[[AnyPlan, int], Outcome], plan: AnyPlan) -> None:
    global _make
    torch.set_num_threads(1)
    _make = partial(make, plan)


def _work(index: int) -> Outcome:
    assert _make is not None
    return _make(index)


def indices_done(manifest: Path) -> set[int]:
    """Indices in a manifest of an earlier run; a last line cut short by a kill is removed from the file."""
    if not manifest.exists():
        return set()
    content = manifest.read_bytes()
    if content and not content.endswith(b"\n"):
        manifest.write_bytes(content[: content.rfind(b"\n") + 1])
    return {int(utterance.id.rpartition("/")[2]) for utterance in read_manifest(manifest)}


def keep_settings(plan: Plan) -> None:
    """Write what the corpus follows from beside it; InputError when the folder holds a corpus of other settings."""
    path, manifest = plan.out / "settings.json", plan.out / "manifest.jsonl"
    settings = json.dumps(plan.settings(), indent=1) + "\n"
    if path.is_file():
        if path.read_text(encoding="utf-8") != settings:
            raise InputError(f"{path}: a corpus made with other settings is here: give another --out, or remove it")
        return
    if manifest.exists():
        raise InputError(f"{manifest}: of a corpus that was not made by this command: give another --out")
    write_whole(path, settings)


def make_corpus(
    plan: AnyPlan, make: Callable[[AnyPlan, int], Outcome], count: int, jobs: int, console: Console
) -> Counter[str]:
    """Make what is missing of utterances 0 ... count - 1, in order; counts of 'made', 'kept' and 'failed'.

    'beyond' counts those kept from before that are beyond ``count``: they stay in the manifest.
    """
    with output_folder(plan.out):
        keep_settings(plan)
        manifest = plan.out / "manifest.jsonl"
        done = indices_done(manifest)
        missing = [index for index in range(count) if index not in done]
        tally = Counter(kept=len(done), beyond=len(done) + len(missing) - count, made=0, failed=0)
        if not missing:  # processes take seconds to start
            return tally
        with (
            progress_bar(console) as progress,
            worker_pool(min(jobs, len(missing)), _start_worker, (make, plan)) as pool,
        ):
            task = progress.add_task(plan.name, total=count, completed=count - len(missing))
            for outcome in pool.imap(_work, missing, chunksize=4):
                if outcome.utterance is None:
                    tally["failed"] += 1
                    if tally["failed"] <= REPORTED_FAILURES:
                        console.print(f"failed: {outcome.failure}", markup=False)
                else:
                    append(manifest, outcome.utterance)
                    tally["made"] += 1
                progress.advance(task)
        return tally


def report(out: Path, tally: Counter[str]) -> None:
    """The last line of the command; exit code 1 when utterances are missing."""
    summary = f"{out}: {tally['made']} made, {tally['kept']} kept from before, {tally['failed']} failed"
    if tally["beyond"]:
        summary += f"; {tally['beyond']} are beyond --count, and stay in the manifest"
    typer.echo(summary, err=bool(tally["failed"]))
    if tally["failed"]:
        raise typer.Exit(1)
