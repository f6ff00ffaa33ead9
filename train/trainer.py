"""A training run: from micro batches to updates, logged, validated and saved.

Everything a step sees follows from the seed, the step and the rank, so a run that is resumed goes on exactly as if it
had not been stopped.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from random import Random
from typing import Any

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from speechllm.checkpoint import save_checkpoint
from speechllm.data.mixture import TrainingBatch
from speechllm.data.schedule import Schedule
from speechllm.errors import InputError
from speechllm.model import FLASH, parameter_counts
from train.balance import make_balance
from train.engine import device_name, on_machine, start_engine, update, whole_state
from train.expert_load import ExpertLoad
from train.footprint import speed_of
from train.loader import BatchMaker, Meter, leave_signals_to_parent, micro_batches
from train.log import MetricLog
from train.loop import cosine, progress_bar
from train.objective import Objective
from train.pretrain_config import Pretraining
from train.ranks import SavingError, anywhere, nothing, write_together
from train.report import plot_report
from train.setup import Start, make_mixture, make_schedule, make_start
from train.state import STATE, Layout, RunState, check_begun
from train.step_losses import StepLosses
from train.validate import Validation


class Trainer:
    """Model, data and DeepSpeed engine of one run."""

    def __init__(self, config: Pretraining, resume: bool):
        self.config = config = on_machine(config, torch.cuda.is_available())
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        check_begun(config.out, resume)
        self.state = RunState(config.out / STATE, Layout(self.world, config.zero_stage, config.expert_parallel))
        start = self.start()
        self.text, self.vocabulary = start.text, start.vocabulary
        self.mixture = make_mixture(config, start)
        self.schedule = self.make_schedule()
        self.balance = make_balance(config.balance, list(config.tasks), config.seed)
        objective = Objective(
            start.lm,
            self.vocabulary,
            self.balance,
            config.ctc_layer,
            config.ctc_weight,
            config.aux_weight,
            config.audio_weight,
            config.router_z_weight,
            config.trait_weight,
        )
        self.parameters = parameter_counts(start.lm)  # in all, active: once the engine is started ranks may hold parts
        self.engine = start_engine(objective, start.lm, config, self.state)
        self.step = 0
        flops = speed_of(start.lm.config, self.parameters[1], device_name())
        self.meter = Meter(self.schedule, ExpertLoad(list(config.tasks)), flops)
        if self.state.tag:
            self.restore(self.state.load(self.engine))
        self.validation = Validation(config, start.codec, self.vocabulary, self.text, self.rank, self.world)

    def start(self) -> Start:
        """What training begins with; :attr:`state` knows whether it is taken up."""
        return make_start(self.config, resumed=self.state.tag is not None)

    def make_schedule(self) -> Schedule:
        """Which examples each rank sees when."""
        return make_schedule(self.config, self.mixture, self.world)

    @property
    def lm(self) -> PreTrainedModel:
        """The language model inside the engine."""
        lm: PreTrainedModel = self.engine.module.lm
        return lm

    def batches(self) -> Iterator[list[TrainingBatch]]:
        """This rank's micro batches of each step from the present one on, made in worker processes."""
        steps, accumulated = range(self.step, self.config.steps), self.config.grad_accum_steps
        lanes = range(self.rank * accumulated, (self.rank + 1) * accumulated)
        workers = self.config.loader_workers
        # FlashAttention looks at no pair of two sequences: a long row costs no more, and a single one has no padding
        row_length = sys.maxsize if self.lm.config._attn_implementation == FLASH else self.config.row_length
        batches = iter(
            DataLoader(
                BatchMaker(self.mixture, row_length, self.config.seed),
                batch_size=None,
                sampler=micro_batches(self.schedule, steps, lanes),
                num_workers=workers,
                multiprocessing_context="fork" if workers else None,  # they share the corpora that are read
                worker_init_fn=leave_signals_to_parent if workers else None,
            )
        )
        return (list(islice(batches, accumulated)) for _ in steps)

    def train_step(self, step: int, batches: Sequence[TrainingBatch]) -> None:
        """One update from this rank's micro batches.

        Raises:
            InputError: a loss or the gradient is not a number; what was saved before is what to go on from.
        """
        rate = self.config.learning_rate * cosine(step, self.config.warmup, self.config.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        # what dropout drops follows from these, too
        torch.manual_seed(Random(f"{self.config.seed} step {step} rank {self.rank}").getrandbits(63))
        losses: list[dict[str, Tensor]] = []
        for batch in batches:
            if losses:
                self.engine.step()  # counts the micro batch before this one, which changes nothing
            found = self.engine(batch.to(self.engine.device))
            self.engine.backward(found["loss"])
            if (choices := found.pop("choices", None)) is not None:
                self.meter.experts.add(step, choices)
            losses.append({name: value.detach() for name, value in found.items()})
        fetched = StepLosses.fetch(losses)
        self._check_losses(fetched, step, batches)
        norm = update(self.engine)
        self._check(math.isfinite(norm), step, "the gradient is not finite, though the losses are: lower learning_rate")
        self.balance.observe(fetched.everywhere)
        for batch, scalars, tasks in zip(batches, fetched.scalars, fetched.tasks, strict=True):
            own = scalars | self.balance.logged(tasks) | {"learning_rate": rate}
            if batch is batches[-1]:
                own["gradient_norm"] = norm
            self.meter.add(step, batch, own)

    def _check_losses(self, losses: StepLosses, step: int, batches: Sequence[TrainingBatch]) -> None:
        """Raises InputError on all ranks when a loss of one is not finite, naming what it was made from."""
        pairs = zip(batches, losses.scalars, strict=True)
        bad = [self.mixture.named(batch.draws) for batch, scalars in pairs if not math.isfinite(scalars["loss"])]
        of = ", ".join(bad) or "another rank"
        self._check(
            losses.finite, step, f"the loss of {of} is not finite: look at what they are, or lower learning_rate"
        )

    def _check(self, fine: bool, step: int, problem: str) -> None:
        """Raises InputError with a problem of ``step`` when it is not ``fine``."""
        if not fine:
            start = self.state.tag or "the start"
            raise InputError(f"step {step}: {problem}, then go on from {start} with --resume")

    def client(self) -> dict[str, Any]:
        """What :meth:`restore` needs beside the state of the engine; all ranks must call it."""
        return {
            "step": self.step,
            "schedule": self.schedule.state(self.step),
            "meter": self.meter.state(),
            "balance": self.balance.state(),
        }

    def restore(self, client: dict[str, Any]) -> None:
        """Go on where the run that gave ``client`` was. Raises InputError when it is beyond the last step already."""
        self.step = client["step"]
        if self.step > self.config.steps:
            raise InputError(f"steps = {self.config.steps}: the run is at step {self.step} already: raise it to go on")
        self.schedule.restore(client["schedule"])
        self.meter.restore(client["meter"])
        self.balance.restore(client["balance"])

    def save(self) -> None:
        """State to resume from, a checkpoint that can be served, the experts' load; all ranks must call it.

        Raises:
            InputError: on all ranks, when a file cannot be written on one.
        """
        client = self.client()
        try:
            self.save_checkpoint()  # first: who is killed before the state counts comes by here again
            self.state.save(self.engine, self.step, client)
            write_together(lambda: self.meter.experts.write(self.config.out, self.step))
        except SavingError as error:
            kept = f"the state of {self.state.tag} is kept" if self.state.tag else "there is no earlier one"
            raise InputError(
                f"{self.config.out}: step {self.step} cannot be saved ({error}); {kept}: make room, then go on with "
                "--resume"
            ) from error

    def save_checkpoint(self) -> None:
        """The LM and its parts as one folder; all ranks must call it."""
        weights = whole_state(self.lm)
        write_together((lambda: self.write_checkpoint(weights)) if self.rank == 0 else nothing)

    def write_checkpoint(self, weights: dict[str, Tensor]) -> None:
        """On rank 0, with the LM's weights in one piece."""
        save_checkpoint(
            self.config.out / "checkpoint",
            self.lm,
            self.config.codec,
            self.text,
            self.vocabulary,
            name=self.config.name,
            max_audio_seconds=self.config.max_audio_seconds,
            max_answer_tokens=self.config.max_answer_tokens,
            tasks=self.known_tasks(),
            weights=weights,
            dtype=torch.bfloat16,
        )

    def known_tasks(self) -> Sequence[str]:
        """What the LM has been trained on."""
        return list(self.config.tasks)

    def run(self) -> bool:
        """Train to the end; False when stopped early (Ctrl-C, SIGTERM) with the state saved."""
        config, stopping = self.config, []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopping.append(True))
        log = MetricLog(config.out) if self.rank == 0 else None
        steps = range(self.step, config.steps)
        bar = progress_bar()
        bar.disable = self.rank != 0
        with bar:
            task = bar.add_task(config.name, total=config.steps, completed=self.step)
            for step, batches in zip(steps, self.meter.timed(self.batches()), strict=True):
                self.train_step(step, batches)
                self.step = step + 1
                last = self.step == config.steps
                if self.step % config.log_every == 0:
                    stop = anywhere(bool(stopping))  # so that all stop after the same step
                    means = self.meter.read()
                    if log:
                        log.write(self.step, **means)
                    if stop:
                        self.save()
                        self.meter.experts.plot(config.out)
                        return False
                if self.step % config.save_every == 0 or last:
                    with self.meter.paused():
                        self.save()
                if self.step % config.evaluate_every == 0 or last:
                    with self.meter.paused():
                        scores = self.validation.run(self.lm)
                    if log:
                        log.write(self.step, **scores)
                        shown = "  ".join(f"{name} {value:.2f}" for name, value in scores.items())
                        bar.console.print(f"step {self.step}: {shown}", highlight=False)
                bar.update(task, completed=self.step)
        if log:
            log.close()
            plot_report(log.path, self.validation.corpora(), config.out / "training.png")
        self.meter.plot(config.out)
        return True
