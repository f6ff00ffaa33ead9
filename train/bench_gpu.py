"""What the bigger configurations reach on one GPU: FlashAttention against SDPA, packed rows against padded ones."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

from speechllm.errors import InputError
from speechllm.model import FLASH, SDPA
from train.bench_runs import Ours, now
from train.footprint import model_sizes
from train.plan import GIB, Machine, Plan
from train.pretrain_config import Pretraining

ONE_GPU = {"grad_accum_steps": 1, "expert_parallel": 1, "bf16": True}
VARIANTS = {
    "FlashAttention, one row": {"attn_implementation": FLASH},
    "SDPA, packed": {"attn_implementation": SDPA},
    "SDPA, padded": {"attn_implementation": SDPA, "row_length": 1},
}
FULL = "out of memory: lower batch_tokens"


@dataclass(frozen=True)
class Reached:
    """ids_per_second: padding not counted. mfu: model FLOPs utilization; None where the GPU's peak is not known.
    problem: why there are none.
    """

    ids_per_second: float | None = None
    mfu: float | None = None
    padding: float | None = None
    problem: str = ""


def variants(config: Pretraining) -> dict[str, Pretraining]:
    """A configuration on one GPU, in each of VARIANTS."""
    values = config.model_dump(exclude_unset=True)
    return {name: Pretraining.model_validate(values | ONE_GPU | changes) for name, changes in VARIANTS.items()}


def reach(config: Pretraining, gpu_memory: float, steps: int) -> Reached:
    """Train for some steps on this GPU, of ``gpu_memory`` GiB, unless that is too little."""
    try:
        Plan(config, model_sizes(config), Machine(1, gpu_memory), hours=1).check()
        run = Ours(config)
    except InputError as error:
        return Reached(problem=str(error))
    except torch.cuda.OutOfMemoryError:
        return Reached(problem=FULL)
    try:
        run.lap(steps)  # kernels are chosen and compiled
        run.trainer.meter.read()
        lap = run.lap(steps)
        now()
        return Reached(lap.speed, run.trainer.meter.read().get("mfu"), lap.padding)
    except torch.cuda.OutOfMemoryError:
        return Reached(problem=FULL)
    finally:
        run.close()
        del run
        gc.collect()
        torch.cuda.empty_cache()


def measure_gpu(configs: dict[str, Pretraining], steps: int) -> dict[str, dict[str, Reached]]:
    """Configuration -> variant -> what it reached on this process's GPU."""
    memory = torch.cuda.get_device_properties(0).total_memory / GIB
    return {
        name: {variant: reach(changed, memory, steps) for variant, changed in variants(config).items()}
        for name, config in configs.items()
    }
