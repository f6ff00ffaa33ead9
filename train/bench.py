"""How fast training is on this machine: ``python -m train.bench``.

The same model is trained on the same examples in two ways that take turns: by our trainer, with the losses of the other
way alone and with all of a config's, and by Hugging Face's Trainer as it comes. What counts is ids a second without
padding. Ratios carry over to other machines; seconds do not. On a GPU bigger configs are measured too.
"""

from __future__ import annotations

import os
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
import datasets
import torch
import transformers
import typer
from pydantic import ValidationError
from rich.progress import Progress

from speechllm.codec import load_codec
from speechllm.errors import InputError, first_problem
from train.bench_corpus import make_corpus
from train.bench_gpu import measure_gpu
from train.bench_report import ALL, PLAIN, SAME, summary, write_report
from train.bench_runs import Ours, Plain, Run
from train.config import read_config
from train.engine import device_name
from train.launch import command, prepare_environment
from train.loop import progress_bar
from train.pretrain_config import Pretraining

CONFIGS = Path(__file__).parent / "configs"
ROWS = {"captions": (1500, 1.0), "talks": (400, 3.0)}  # how many, and their weight within a task
# the mixture as it is once everything has come in; speed does not depend on what is known already
STEADY: dict[str, Any] = {"dev_corpora": [], "start_from": None, "short_first": 0, "curriculum": {}, "task_corpora": {}}
# the loss of the plain way
SAME_LOSS: dict[str, Any] = {
    **dict.fromkeys(("ctc_weight", "trait_weight", "aux_weight", "audio_weight", "router_z_weight"), 0.0),
    "balance": {"method": "none"},
}


def prepared(path: Path, folder: Path) -> Pretraining:
    """A config as it is measured: on made-up corpora under ``folder``.

    Raises:
        InputError: it cannot be read, begins with somebody else's model, or does not fit these corpora.
    """
    config = read_config(path, Pretraining)
    if config.init_from:
        raise InputError(f"{path}: init_from is not measured: give a config of a new model")
    corpora = folder / "corpora" / path.stem
    codec = load_codec(config.codec)
    made = {make_corpus(corpora, name, codec, rows): weight for name, (rows, weight) in ROWS.items()}
    return changed(config, STEADY | {"corpora": made, "out": folder / "runs"})


def changed(config: Pretraining, values: dict[str, Any]) -> Pretraining:
    """The config with other values. Raises InputError where they do not go together."""
    try:
        return Pretraining.model_validate(config.model_dump(exclude_unset=True) | values)
    except ValidationError as error:
        raise InputError(f"{config.name}, as it is measured: {first_problem(error)}") from error


def measure(name: str, config: Pretraining, steps: int, repeats: int, bar: Progress) -> dict[str, Any]:
    """Speeds of the three, see :func:`summary`, and the parts of a step of ours."""
    weights = "bf16" if config.bf16 else "fp32"
    task = bar.add_task(f"{name}, {weights}", total=3 * repeats + 1)
    ours, same = Ours(config), Ours(changed(config, SAME_LOSS))
    runs: dict[str, Run] = {PLAIN: Plain(config, same.trainer.mixture), SAME: same, ALL: ours}
    laps: dict[str, list] = {way: [] for way in runs}
    for _ in range(repeats):
        for way, run in runs.items():
            laps[way].append(run.lap(steps))
            bar.advance(task)
    parts = ours.parts(steps)
    bar.advance(task)
    for run in (ours, same):
        run.close()
    return {"config": name, "weights": weights, "speeds": summary(laps), "parts": parts}


def main(
    config: Annotated[
        list[Path] | None, typer.Option(help="measured with float32 and bfloat16; tiny.yaml and all-tasks.yaml")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="timed steps of a lap")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="laps of each; their median counts")] = 3,
    out: Annotated[Path, typer.Option(help="folder for bench.md, bench.json and bench.png")] = Path("runs/bench-train"),
) -> None:
    """Time training against Hugging Face's Trainer, and see where the time of a step goes."""
    prepare_environment()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    paths = config or [CONFIGS / "tiny.yaml", CONFIGS / "all-tasks.yaml"]
    with command(), tempfile.TemporaryDirectory() as folder:
        configs = {path.stem: prepared(path, Path(folder)) for path in paths}
        with progress_bar() as bar:
            runs = [
                measure(name, changed(one, {"bf16": bf16}), steps, repeats, bar)
                for name, one in configs.items()
                for bf16 in (False, True)
            ]
        gpu = {}
        if torch.cuda.is_available():
            bigger = {name: prepared(CONFIGS / f"{name}.yaml", Path(folder)) for name in ("small", "base")}
            gpu = measure_gpu(bigger, steps)
        result = {
            "device": device_name() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "steps": steps,
            "repeats": repeats,
            "runs": runs,
            "gpu": {name: {variant: asdict(r) for variant, r in of.items()} for name, of in gpu.items()},
        }
        out.mkdir(parents=True, exist_ok=True)
        print(write_report(out, result))


if __name__ == "__main__":
    typer.run(main)
