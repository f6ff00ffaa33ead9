"""Train variants of one configuration and set their validations side by side.

    python -m train.compare --config train/configs/compare-balance.yaml

Writes ``comparison.md``, ``comparison.json`` and ``comparison.png`` under ``out``. What was stopped is taken up again,
and what is finished is not run again.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import matplotlib
import typer
import yaml
from pydantic import Field, ValidationError

from speechllm.errors import InputError, first_problem
from speechllm.tasks import TRAINABLE
from train.commands import plain_errors
from train.config import Settings, read_config
from train.log import read_metrics
from train.loop import progress_bar
from train.pretrain_config import Pretraining
from train.scoring import LOWER_IS_BETTER, SCORES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SCRIPT = Path(__file__).parent / "pretrain.py"
LOSS = "loss"


class Comparison(Settings):
    """The YAML file of ``train.compare``."""

    base: Path = Field(description="configuration of train/pretrain.py that all variants start from")
    out: Path
    settings: dict[str, Any] = Field({}, description="what is changed in all variants, whole settings of the base")
    variants: dict[str, dict[str, Any]] = Field(
        min_length=2, description="name: what is changed in it; the first is what the others are compared with"
    )
    seeds: list[int] = Field([1], min_length=1, description="each variant is run with each of them")


@dataclass(frozen=True)
class Run:
    """One variant with one seed."""

    variant: str
    seed: int
    config: Pretraining
    file: Path

    @property
    def metrics(self) -> Path:
        return self.config.out / "metrics.jsonl"

    def scores(self) -> dict[tuple[str, str], float] | None:
        """Mean over the dev corpora after the last step, by task and ``loss`` or the score that counts; None before."""
        records = read_metrics(self.metrics) if self.metrics.exists() else []
        last = {name: value for r in records if r["step"] == self.config.steps for name, value in r.items()}
        found = {}
        for task in self.config.tasks:
            for name in (LOSS, SCORES[TRAINABLE[task].metric][0]):
                values = [last.get(f"{name}_{task}_{folder.name}") for folder in self.config.dev_corpora]
                if known := [value for value in values if value is not None]:
                    found[task, name] = fmean(known)
        return found or None


def plan_runs(comparison: Comparison) -> list[Run]:
    """Every variant with every seed, their files written.

    Raises:
        InputError: the base cannot be read, or a variant is no configuration.
    """
    base = read_config(comparison.base, Pretraining).model_dump(mode="json", exclude_unset=True)
    if not {**base, **comparison.settings}["dev_corpora"]:
        raise InputError(f"{comparison.base}: no dev_corpora, by which its variants are compared: name some")
    runs = []
    for seed in comparison.seeds:
        for variant, changes in comparison.variants.items():
            folder = comparison.out / f"{variant}-{seed}"
            values = {**base, **comparison.settings, **changes, "out": str(folder), "seed": seed}
            try:
                config = Pretraining.model_validate(values)
            except ValidationError as error:
                raise InputError(f"variants: {variant}: {first_problem(error)}") from error
            file = comparison.out / f"{variant}-{seed}.yaml"
            written = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
            if folder.exists() and file.exists() and file.read_text(encoding="utf-8") != written:
                raise InputError(f"{folder}: holds a run with other settings: remove it, or set another 'out'")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(written, encoding="utf-8")
            runs.append(Run(variant, seed, config, file))
    return runs


def train(run: Run, launcher: str) -> None:
    """Run it to its end, from where it was stopped. Raises InputError when it fails."""
    command = [*shlex.split(launcher), str(SCRIPT), "--config", str(run.file)]
    if (run.config.out / "state").exists():
        command.append("--resume")
    with (run.config.out.with_suffix(".log")).open("a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if code:
        raise InputError(f"{run.variant} with seed {run.seed} stopped with exit code {code}: see {log.name}")


class Table:
    """Scores of the variants, by task; each a list over the seeds."""

    def __init__(self, runs: list[Run]):
        self.variants = list(dict.fromkeys(run.variant for run in runs))
        self.values: dict[tuple[str, str], dict[str, list[float]]] = {}  # task, name of the score -> variant -> values
        for run in runs:
            for key, value in (run.scores() or {}).items():
                self.values.setdefault(key, {}).setdefault(run.variant, []).append(value)

    def of(self, names_loss: bool) -> dict[tuple[str, str], dict[str, list[float]]]:
        """The losses, or the scores, that every variant has."""
        return {
            key: of_variant
            for key, of_variant in self.values.items()
            if (key[1] == LOSS) == names_loss and len(of_variant) == len(self.variants)
        }

    def gains(self, names_loss: bool) -> dict[str, dict[str, float]]:
        """Task -> variant -> how much better than the first: percent of its loss, or points of its score."""
        gains: dict[str, dict[str, float]] = {}
        for (task, name), of_variant in self.of(names_loss).items():
            first = fmean(of_variant[self.variants[0]])
            sign = -1 if name == LOSS or name in LOWER_IS_BETTER else 1
            gains[task] = {
                variant: sign * (fmean(values) - first) * (100 / first if names_loss else 1)
                for variant, values in of_variant.items()
            }
        return gains

    def markdown(self) -> str:
        """Losses and scores, each with the mean gain over the tasks."""
        parts = []
        for names_loss, title, unit in (
            (True, "Loss on dev, nats per answer id", "%"),
            (False, "Score on dev", "points"),
        ):
            rows = [["task", *self.variants], ["---"] + ["---:"] * len(self.variants)]
            for (task, name), of_variant in self.of(names_loss).items():
                label = task if names_loss else f"{task}: {name} {'↓' if name in LOWER_IS_BETTER else '↑'}"
                digits = 3 if names_loss else 1
                rows.append([label, *(spread(of_variant[variant], digits) for variant in self.variants)])
            gains = self.gains(names_loss).values()
            means = [fmean(gain[variant] for gain in gains) for variant in self.variants]
            better = [sum(gain[variant] > 0 for gain in gains) for variant in self.variants]
            rows.append(["**mean gain**", *(f"{mean:+.1f} {unit}" for mean in means)])
            rows.append(["better on", *(f"{n} of {len(gains)}" for n in better)])
            for row in rows[-2:]:
                row[1] = "–"  # the one the others are compared with
            parts.append(f"{title}:\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows))
        return "\n\n".join(parts) + "\n"

    def plot(self, path: Path) -> None:
        """Gain of each variant over the first, task by task; right is better."""
        figure, axes = plt.subplots(
            1, 2, figsize=(11, 1.2 + 0.27 * len(self.of(True))), sharey=True, layout="constrained"
        )
        for axis, names_loss, title in zip(axes, (True, False), ("loss: % lower", "score: points better"), strict=True):
            gains = self.gains(names_loss)
            tasks = list(gains)[::-1]
            for number, variant in enumerate(self.variants[1:]):
                axis.plot([gains[t][variant] for t in tasks], tasks, "o", color=f"C{number}", ms=5, label=variant)
            axis.axvline(0, color="0.4", lw=1)
            axis.set_title(f"{title} than {self.variants[0]}", fontsize=10)
            axis.grid(alpha=0.3)
        axes[1].legend(fontsize=8)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def spread(values: list[float], digits: int) -> str:
    """Mean, and where there are several values their standard deviation."""
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {stdev(values):.{digits}f}"


def report(runs: list[Run], out: Path) -> Table:
    """Write what the runs that are finished came to."""
    table = Table(runs)
    (out / "comparison.md").write_text(table.markdown(), encoding="utf-8")
    values = [{"task": task, "score": name, **of_variant} for (task, name), of_variant in table.values.items()]
    (out / "comparison.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    table.plot(out / "comparison.png")
    return table


def main(
    config: Annotated[Path, typer.Option(help="YAML file; see train/configs/compare-balance.yaml")],
    launcher: Annotated[str, typer.Option(help="What starts a run: 'deepspeed --num_accelerators 2'")] = shlex.quote(
        sys.executable
    ),
) -> None:
    """Train variants of one configuration and set their validations side by side."""
    with plain_errors(f"stopped; the same command goes on from {config}"):
        comparison = read_config(config, Comparison)
        runs = plan_runs(comparison)
        with progress_bar() as bar:
            task = bar.add_task("compare", total=len(runs))
            for run in runs:
                bar.update(task, description=f"{run.variant}, seed {run.seed}")
                if run.scores() is None:
                    train(run, launcher)
                bar.advance(task)
        typer.echo(report(runs, comparison.out).markdown())


if __name__ == "__main__":
    typer.run(main)
