"""The plan of a run, made before it is started: does it fit, how fast may it be, how many days does it take."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from speechllm.errors import InputError
from train.amounts import large_unit, shown_count
from train.engine import check_expert_parallel
from train.footprint import Memory, Sizes, activations, flops_per_id, memory, model_sizes, states, value_bytes
from train.pretrain_config import Pretraining

GIB = 2**30  # bytes
DAY = 86400  # seconds
USABLE = 0.9  # of a GPU's memory: CUDA and NCCL keep some, PyTorch's allocator leaves gaps


@dataclass(frozen=True)
class Machine:
    """GPUs, one for each of ``ranks``.

    gpu_memory: GiB of each. tflops: its peak, 10^12 FLOP/s in dense bf16. mfu: the share of the peak that training
    reaches (model FLOPs utilization, Chowdhery et al. 2022, appendix B).
    """

    ranks: int
    gpu_memory: float = 80.0
    tflops: float = 989.0
    mfu: float = 0.4

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise InputError(f"--{name.replace('_', '-')} must be above 0, not {value}")
        if self.mfu > 1:
            raise InputError(f"--mfu is a share of the peak: at most 1, not {self.mfu}")


@dataclass(frozen=True)
class Plan:
    """A run on a machine. hours: of audio that there are to train on."""

    config: Pretraining
    sizes: Sizes
    machine: Machine
    hours: float

    @property
    def memory(self) -> Memory:
        """Of each GPU."""
        return memory(self.config, self.sizes, self.machine.ranks)

    @property
    def flops(self) -> tuple[float, float]:
        """Of an id in the longest row: those of parameters, and those of attention."""
        longest = max(self.config.row_length, self.config.max_audio_seconds * self.sizes.ids_per_second)
        return flops_per_id(self.sizes.lm.config, self.sizes.active, longest)

    @property
    def ids_per_second(self) -> float:
        """That all ranks together train on."""
        machine = self.machine
        return machine.ranks * machine.tflops * 1e12 * machine.mfu / sum(self.flops)

    @property
    def loader_speed(self) -> float:
        """Ids a second that each process making batches must reach (``loader_tokens_per_second`` of a run)."""
        return self.ids_per_second / self.machine.ranks / max(1, self.config.loader_workers)

    @property
    def run_ids(self) -> float:
        """Of all steps."""
        return self.config.steps * self.config.grad_accum_steps * self.config.batch_tokens * self.machine.ranks

    @property
    def epoch_ids(self) -> float:
        """Of all the audio; its instructions and answers come on top."""
        return self.hours * 3600 * self.sizes.ids_per_second

    def check(self) -> None:
        """Raises InputError when the run does not fit, with a way out."""
        found, machine = self.memory, self.machine
        if not self._fits({}, machine.ranks):
            largest = max(asdict(found), key=asdict(found).__getitem__)
            raise InputError(
                f"{self.config.name} needs {found.total / GIB:.1f} GiB of each of {machine.ranks} GPUs, and "
                f"{USABLE * machine.gpu_memory:.1f} of {machine.gpu_memory:g} can be used (most of it: {largest}): "
                f"{self._way_out()}"
            )

    def _fits(self, changes: dict[str, object], ranks: int) -> bool:
        config = self.config.model_copy(update=changes)
        return memory(config, self.sizes, ranks).total <= USABLE * self.machine.gpu_memory * GIB

    def _way_out(self) -> str:
        """The first change that is enough."""
        config, ranks = self.config, self.machine.ranks
        changes: list[dict[str, object]] = [{"activation_checkpointing": True}]
        if ranks > 1:
            changes += [{"zero_stage": stage} for stage in range(config.zero_stage + 1, 4)]
        changes += [
            {"batch_tokens": round(config.batch_tokens / part), "grad_accum_steps": config.grad_accum_steps * part}
            for part in (2, 4, 8)
        ]
        if config.zero_stage:
            changes.append({"offload": True})
        for change in changes:
            if self._fits(change, ranks):
                return "set " + " and ".join(f"{name} to {str(value).lower()}" for name, value in change.items())
        for more in (ranks * 2**power for power in range(1, 8)):
            if self._fits({"zero_stage": 3, "activation_checkpointing": True}, more):
                return f"take {more} GPUs, with zero_stage = 3 and activation_checkpointing"
        return "make the model or batch_tokens smaller"

    def report(self) -> str:
        """A table for people."""
        config, machine, found, sizes = self.config, self.machine, self.memory, self.sizes
        kept, again = (
            activations(sizes.lm.config, config.batch_tokens, value_bytes(config), checkpointing) / GIB
            for checkpointing in (False, True)
        )
        parameters, attention = self.flops
        word, unit = large_unit(sizes.total)
        off_gpu = sum(states(config, sizes, machine.ranks)) - sum(astuple(found)[:3])
        lines = {
            "parameters": f"{sizes.total / unit:.2f} {word}, {sizes.active / unit:.2f} active",
            f"memory of each of {machine.ranks} GPUs": "",
            **{f"  {name}": f"{size / GIB:8.2f} GiB" for name, size in asdict(found).items()},
            "  in all": f"{found.total / GIB:8.2f} GiB of {machine.gpu_memory:g}, {USABLE:.0%} of them usable",
            "activations": f"{kept:.2f} GiB, {again:.2f} with activation_checkpointing",
            "memory of the host": f"{4 * (sizes.dense + sizes.in_experts) / GIB:.2f} GiB for each rank at the start"
            + (f", then {off_gpu / GIB:.2f}" if config.offload else ""),
            "FLOPs of an id": f"{parameters:.3g} of parameters, {attention:.3g} of attention",
            "ids in a step": f"{self.run_ids / config.steps:,.0f}",
            "speed": f"{self.ids_per_second:,.0f} ids a second at {machine.mfu:.0%} of {machine.tflops:g} TFLOP/s",
            "loaders": f"{self.loader_speed:,.0f} ids a second of each of {config.loader_workers} workers of a rank",
            "an epoch": f"{self.hours:,.0f} h of audio, {sizes.ids_per_second:.1f} ids a second: "
            f"{shown_count(self.epoch_ids)} ids, {self._days(self.epoch_ids)}",
            "the run": f"{config.steps:,} steps, {shown_count(self.run_ids)} ids, "
            f"{self.run_ids / self.epoch_ids:.2f} epochs: {self._days(self.run_ids)}",
        }
        return "\n".join(f"{name:28}{value}".rstrip() for name, value in lines.items())

    def _days(self, ids: float) -> str:
        return f"{ids / self.ids_per_second / DAY:.3g} days"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a dry run."""
    group = parser.add_argument_group("dry run")
    group.add_argument("--dry-run", action="store_true", help="print what the run would take, and start nothing")
    group.add_argument("--ranks", type=int, help="GPUs; else WORLD_SIZE, or as many as the config's '# ranks:' says")
    group.add_argument("--gpu-memory", type=float, default=Machine.gpu_memory, help="GiB of a GPU (80)")
    group.add_argument("--tflops", type=float, default=Machine.tflops, help="peak of a GPU in dense bf16 (989: H100)")
    group.add_argument("--mfu", type=float, default=Machine.mfu, help="share of the peak that is reached (0.4)")
    group.add_argument("--hours", type=float, default=100_000, help="audio of an epoch (100000)")


def named_ranks(path: Path) -> int:
    """Ranks that the comment ``# ranks: N`` of a config names, 1 where there is none."""
    found = re.search(r"^# ranks: (\d+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1]) if found else 1


def dry_run(config: Pretraining, arguments: argparse.Namespace) -> None:
    """Print the plan of a run.

    Raises:
        InputError: it cannot be started with so many ranks, or does not fit.
    """
    ranks = arguments.ranks
    if ranks is None:
        ranks = int(os.environ.get("WORLD_SIZE", 0)) or named_ranks(arguments.config)
    machine = Machine(ranks, arguments.gpu_memory, arguments.tflops, arguments.mfu)
    if not arguments.hours > 0:
        raise InputError(f"--hours must be above 0, not {arguments.hours}")
    plan = Plan(config, model_sizes(config), machine, arguments.hours)
    if config.expert_parallel > 1:
        check_expert_parallel(plan.sizes.lm, config.expert_parallel, ranks)
    if os.environ.get("RANK", "0") == "0":
        print(plan.report())
    plan.check()
