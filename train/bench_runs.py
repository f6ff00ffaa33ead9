"""Two ways to train the same model on the same examples, timed lap by lap: ours, and the plain one."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
import torch
import transformers
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from speechllm.data.mixture import Mixture
from speechllm.data.schedule import WINDOW
from speechllm.prompt import Rendered, collate
from train.pretrain_config import Pretraining
from train.setup import make_schedule, make_start
from train.trainer import Trainer

WARMUP = 1  # steps of a lap that are not timed: caches are cold after the other's lap
BETAS = (0.9, 0.98)  # of Adam, in both
PARTS = ("loader", "forward", "losses", "backward", "optimizer", "rest")


@dataclass(frozen=True)
class Lap:
    """Some timed steps. ids: without padding. positions: with it."""

    ids: int
    positions: int
    seconds: float

    @property
    def speed(self) -> float:
        """Ids a second, padding not counted."""
        return self.ids / self.seconds

    @property
    def padding(self) -> float:
        """Its share of the positions."""
        return 1 - self.ids / self.positions


class Run(Protocol):
    """A training that goes on lap by lap."""

    def lap(self, steps: int) -> Lap:
        """Train for some steps, after WARMUP others."""


def now() -> float:
    """Seconds, once the GPU has done what it was asked to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Ours:
    """The trainer of ``train/pretrain.py``, with its loader, losses and engine."""

    def __init__(self, config: Pretraining):
        self.trainer = Trainer(config, resume=False)
        self._batches: Any = self.trainer.batches()

    def lap(self, steps: int) -> Lap:
        ids = positions = 0
        begun = 0.0
        for number in range(WARMUP + steps):
            if number == WARMUP:
                begun = now()
            batches = next(self._batches)
            self.trainer.train_step(self.trainer.step, batches)
            self.trainer.step += 1
            if number >= WARMUP:
                ids += sum(int(batch.lm.attention_mask.sum()) for batch in batches)
                positions += sum(batch.lm.attention_mask.numel() for batch in batches)
        return Lap(ids, positions, now() - begun)

    def parts(self, steps: int) -> dict[str, float]:
        """Seconds of a step that go into each of PARTS."""
        self.lap(0)
        engine, clock = self.trainer.engine, Clock()
        with (
            clock.around(self.trainer.lm.base_model, "forward", "forward"),
            clock.around(engine.module, "forward", "losses"),
            clock.around(engine, "backward", "backward"),
            clock.around(engine, "step", "optimizer"),
        ):
            begun = now()
            for _ in range(steps):
                waited = now()
                batches = next(self._batches)
                clock.seconds["loader"] += now() - waited
                self.trainer.train_step(self.trainer.step, batches)
                self.trainer.step += 1
            whole = now() - begun
        seconds = clock.seconds
        seconds["losses"] -= seconds["forward"]  # they lie around it
        seconds["rest"] = whole - sum(seconds.values())
        return {part: seconds[part] / steps for part in PARTS}

    def close(self) -> None:
        """End the loaders, and give back the engine's memory."""
        self._batches.close()
        self.trainer.engine.destroy()


class Clock:
    """Seconds spent in methods."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def around(self, holder: Any, method: str, part: str) -> Iterator[None]:
        """Count the time of ``holder.method`` as ``part``."""
        inner: Callable = getattr(holder, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = now()
            result = inner(*args, **kwargs)
            self.seconds[part] += now() - begun
            return result

        setattr(holder, method, timed)
        try:
            yield
        finally:
            delattr(holder, method)  # that of its class is there again


class Plain:
    """Hugging Face's Trainer: examples in random order, padded to the longest of a batch, everything else its default.

    Logits of all positions, the LM's own loss, AdamW (fused). Examples are made beforehand. They are those of our first
    WINDOW steps, and a batch has as many as ours on average.
    """

    def __init__(self, config: Pretraining, mixture: Mixture):
        self.config, self.pad = config, mixture.vocabulary.pad
        self.lm = make_start(config, resumed=False).lm
        rng = Random(config.seed)
        plan = make_schedule(config, mixture, 1).steps(range(WINDOW), range(1))
        self.examples = [mixture.sequence(draw, rng) for lanes in plan for draw in lanes[0]]
        rng.shuffle(self.examples)
        self.batch = max(1, round(len(self.examples) / WINDOW))
        self._place = 0
        self._sizes: list[tuple[int, int]] = []

    def lap(self, steps: int) -> Lap:
        count = (WARMUP + steps) * self.batch
        own = [self.examples[(self._place + n) % len(self.examples)] for n in range(count)]
        self._place += count
        self._sizes.clear()
        clock = _StepClock()
        gpu = torch.cuda.is_available()
        with without_launcher():
            arguments = TrainingArguments(
                str(self.config.out),
                per_device_train_batch_size=self.batch,
                max_steps=WARMUP + steps,
                learning_rate=self.config.learning_rate,
                weight_decay=self.config.weight_decay,
                adam_beta1=BETAS[0],
                adam_beta2=BETAS[1],
                bf16=gpu if self.config.bf16 is None else self.config.bf16,
                use_cpu=not gpu,
                disable_tqdm=True,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                seed=self.config.seed,
            )
            trainer = transformers.Trainer(self.lm, arguments, self._collate, own, callbacks=[clock])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        ids, positions = (sum(sizes) for sizes in zip(*self._sizes[WARMUP : WARMUP + steps], strict=True))
        return Lap(ids, positions, clock.ends[-1] - clock.ends[WARMUP - 1])

    def _collate(self, examples: Sequence[Rendered]) -> dict[str, Tensor]:
        batch = collate([[example] for example in examples], self.pad)
        self._sizes.append((int(batch.attention_mask.sum()), batch.attention_mask.numel()))
        return {"input_ids": batch.input_ids, "labels": batch.labels, "attention_mask": batch.attention_mask}


class _StepClock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(now())


@contextmanager
def without_launcher() -> Iterator[None]:
    """Without the variables of a launcher, by which Hugging Face's Trainer would take itself for one of several."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
