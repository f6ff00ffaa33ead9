"""Score a checkpoint on held-out speech: ``python -m train.evaluate --model DIR --suite YAML --out DIR``.

Questions go to a real server (``speechllm serve``), those of baselines to the baselines. With sets in place of a suite
(``python -m train.evaluate SET … --out DIR``) every task is asked of every set that holds its answers. Parts that are
finished are kept in ``rows.jsonl`` of the out folder: an interrupted evaluation goes on where it was.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from speechllm.adapter import AdapterSettings, find_adapter, read_adapter
from speechllm.checkpoint_settings import DEFAULT, read_settings
from speechllm.data.corpus import read_corpus
from speechllm.data.manifest import Split
from speechllm.errors import InputError
from speechllm.options import Options
from speechllm.tasks import TASKS
from train.asking import Server
from train.baseline_system import System
from train.baselines import make_baseline
from train.commands import plain_errors
from train.evaluate_compare import compare
from train.evaluate_report import report, write_report
from train.evaluate_rows import CASCADE, Found, Part, fingerprint, measure, parts_of_row, read_found
from train.kept import Kept, weights_fingerprint
from train.loop import progress_bar
from train.output import output_folder
from train.questions import pose
from train.results import OURS, Evaluation, read_results
from train.suite import Suite, make_suite, read_suite

KEPT = "rows.jsonl"


def evaluate(
    model: Path,
    adapter: str | None,
    suite: Suite,
    known: Sequence[str],
    split: Split,
    limit: int | None,
    out: Path,
    beams: int = 1,
) -> Evaluation:
    """Ask what is not kept in ``out`` yet. known: tasks that the checkpoint was trained on; no others are asked.

    limit: clips of each set, at most. beams: hypotheses kept for each answer.

    Raises InputError, before anything is asked where a set is missing.
    """
    settings = read_settings(model)
    asked = {}
    for row in suite.rows:
        if row.task in known:
            asked[row.key] = parts_of_row(row, suite, split, limit)
            if CASCADE in row.baselines and not {"transcribe", row.task.replace("_", "_text_", 1)} <= set(known):
                asked[row.key] = [part for part in asked[row.key] if part.system != CASCADE]
                typer.echo(f"{row.key}: no {CASCADE}, the checkpoint was not trained to translate text", err=True)
    weights, kept = weights_fingerprint(model, settings, adapter), Kept(out / KEPT, read_found)
    how = weights if beams == 1 else f"{weights} {beams} beams"
    prints = {part.key: fingerprint(part, suite, how) for parts in asked.values() for part in parts}
    found = {key: kept.found(key, own) for key, own in prints.items()}
    with progress_bar() as bar, Server(model, adapter, beams) as ours:
        missing = [part for parts in asked.values() for part in parts if found[part.key] is None]
        # made before anything is asked: one of them may be unknown
        systems = [ours if part.system == OURS else baseline(part, suite, ours) for part in missing]
        for part, system in zip(missing, systems, strict=True):
            line = bar.add_task(part.key, total=part.total)
            done = measure(part, system, lambda n: bar.advance(line, n), time.monotonic)  # noqa: B023
            bar.update(line, completed=part.total)
            found[part.key] = done
            kept.keep(part.key, prints[part.key], done)
    command = f"python -m train.evaluate {shlex.join(sys.argv[1:])}"
    name = settings.name if adapter is None else f"{settings.name} + {adapter_settings(model, adapter).name}"
    return together(name, weights, command, suite, asked, {key: own for key, own in found.items() if own is not None})


def baseline(part: Part, suite: Suite, ours: Server) -> System:
    """Raises InputError for one that is not known, or not installed."""
    return make_baseline(part.system, suite.manifests(part.row)[0], ours, ours.ask_text)


def together(
    name: str,
    weights: str,
    command: str,
    suite: Suite,
    asked: dict[str, list[Part]],
    found: dict[str, Found],
) -> Evaluation:
    """What was found of the parts ``asked`` of each row."""
    confusions, targets = {}, []
    for row in suite.rows:
        parts = asked.get(row.key, [])
        if parts:
            plain = found[parts[0].key]
            targets.append(row.target([result.metric for result in plain.results]))
            if plain.confusion is not None:
                confusions[row.key] = plain.confusion
        else:
            targets.append(row.target((), trained=False))
    return Evaluation(
        checkpoint=name,
        fingerprint=weights,
        command=command,
        results=tuple(result for own in found.values() for result in own.results),
        confusions=confusions,
        seconds={key: round(own.seconds, 2) for key, own in found.items()},
        targets=tuple(targets),
    )


def suite_of(sets: Sequence[Path], tasks: Sequence[str], split: Split) -> Suite:
    """Every task on every set that holds its answers, also by speaker. Raises InputError where there is none."""
    rows = []
    for path in sets:
        items = read_corpus([path], split)
        able = [name for name in tasks if pose(items, TASKS[name])]
        rows += [{"set": str(path), "task": name, "groups": ["speaker"]} for name in able]
    if not rows:
        raise InputError("none of the sets holds an answer to any of the tasks")
    return make_suite(rows)


def adapter_settings(model: Path, adapter: str) -> AdapterSettings:
    """Raises InputError where there is no such adapter."""
    return read_adapter(find_adapter(model, adapter))


def main(
    out: Annotated[Path, typer.Option(help="folder for results.json, results.md, pictures and rows.jsonl")],
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[SET]...", help="manifest.jsonl files, or folders of sets, in place of a suite"),
    ] = None,
    suite: Annotated[Path | None, typer.Option(help="YAML as train/configs/suite-release.yaml")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="of sets; repeatable; by default those the model was trained on")
    ] = None,
    model: Annotated[Path, typer.Option(help="checkpoint folder")] = DEFAULT,
    adapter: Annotated[str | None, typer.Option(help="of the checkpoint, by its name or folder")] = None,
    split: Annotated[Split, typer.Option(help="which part of the sets")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="so many clips of each set, from all over it")] = None,
    beams: Annotated[int, typer.Option(min=1, max=Options.MAX_BEAMS, help="hypotheses kept for each answer")] = 1,
    compares: Annotated[
        bool, typer.Option("--compare", help="nothing is asked: the paths are results.json of several runs")
    ] = False,
    axis: Annotated[
        list[str] | None, typer.Option(help='with --compare: "SET TASK" of the plot; twice; by default the first two')
    ] = None,
) -> None:
    """Score a checkpoint on held-out speech; writes JSON, Markdown and pictures."""
    with plain_errors("stopped: finished parts are kept; run the same command to go on"):
        paths = paths or []
        for name in task or ():
            if name not in TASKS or not TASKS[name].listens:
                listening = ", ".join(known for known, one in TASKS.items() if one.listens)
                raise InputError(f"--task {name}: no task on audio; known are {listening}")
        if bool(paths) == (suite is not None) or (compares and not paths):
            raise InputError("give either sets, or --suite; or --compare and the results.json of runs")
        if suite is not None and task:
            raise InputError("--task: a suite says which tasks are asked; leave one of them out")
        if axis and not compares:
            raise InputError("--axis: of the plot that --compare draws; leave it out")
        asking = {"--task": task, "--adapter": adapter, "--limit": limit, "--model": model != DEFAULT,
                  "--split": split != "test", "--beams": beams > 1}  # fmt: skip
        if compares and any(asking.values()):
            unused = " and ".join(name for name, given in asking.items() if given)
            raise InputError(f"{unused}: --compare asks nothing; leave it out")
        with output_folder(out):
            if compares:
                typer.echo(compare([(str(path), read_results(path)) for path in paths], axis or [], out))
                return
            known = (read_settings(model) if adapter is None else adapter_settings(model, adapter)).tasks
            if suite is not None:
                chosen = read_suite(suite)
            else:
                known = tuple(task or [name for name in known if name in TASKS and TASKS[name].listens])
                chosen = suite_of(paths, known, split)
            evaluation = evaluate(model, adapter, chosen, known, split, limit, out, beams)
            write_report(evaluation, out)
            typer.echo(report(evaluation))


if __name__ == "__main__":
    typer.run(main)
