"""Train a SpeechLLM: ``deepspeed train/pretrain.py --config train/configs/tiny.yaml``, or plainly with ``python``.

One process or many, CPU or GPU: DeepSpeed finds out. Everything a step sees follows from the seed, the step and the
rank, so a run that is resumed goes on exactly as if it had not been stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
import torch
from safetensors import SafetensorError
from torch import Tensor, distributed
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from speechllm.checkpoint import save_checkpoint
from speechllm.codec import Codec, SpeechCodec, load_codec
from speechllm.data.encoded import read_encoded
from speechllm.data.mixture import CodeNoise, Mixture
from speechllm.data.schedule import Schedule
from speechllm.errors import InputError
from speechllm.model import extend_model, make_model, parameter_counts, set_embedding_rows
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train import plan
from train.balance import make_balance
from train.config import read_config
from train.engine import anywhere, start_engine, update, whole_state
from train.expert_load import ExpertLoad
from train.footprint import speed_of
from train.init_from import open_lm
from train.loader import BatchMaker, Meter, MeteredBatch, leave_signals_to_parent, micro_batches
from train.log import MetricLog
from train.loop import cosine, progress_bar
from train.objective import Objective
from train.pretrain_config import Pretraining
from train.report import plot_report
from train.state import Layout, RunState
from train.validate import Validation
from train.warm_start import start_from


def device_name() -> str:
    """Of the GPU of this process; empty on CPUs."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def single_process_environment() -> None:
    """What the launcher would have set, for a start with plain ``python``."""
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 0,  # any free one
    }.items():
        os.environ.setdefault(name, str(value))


class Trainer:
    """Model, data and DeepSpeed engine of one run."""

    def __init__(self, config: Pretraining, resume: bool):
        self.config = config
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.state = RunState(config.out / "state", Layout(self.world, config.zero_stage, config.expert_parallel))
        if self.state.folder.exists() and not resume:
            raise InputError(f"{config.out}: holds a run already: add --resume to go on, or set another 'out'")
        base: PreTrainedModel | None = None
        if config.init_from:
            base, self.text = open_lm(config.init_from, config.ctc_layer if config.ctc_weight else 0)
        else:
            self.text = TextTokenizer.load(config.text_model)
        text_size = base.config.vocab_size if base else self.text.size
        codec = load_codec(config.codec)
        self.vocabulary = Vocabulary(
            text_size, config.n_q, codec.card, config.merge_repeats, config.times, config.acoustic_stride
        )
        self._check_positions(codec, base.config.max_position_embeddings if base else config.model.max_positions)
        self.mixture = Mixture(
            {str(folder): read_encoded([folder], "train", codec) for folder in config.corpora},
            self.vocabulary,
            self.text,
            list(config.tasks),
            config.max_audio_seconds,
            CodeNoise(config.code_noise, config.code_masking),
        )
        if missing := config.tasks.keys() - self.mixture.pools.keys():
            raise InputError(
                f"corpora: no utterance of up to max_audio_seconds = {config.max_audio_seconds} has an answer for "
                f"{', '.join(sorted(missing))}: leave it out of tasks, or add corpora"
            )
        self.schedule = Schedule(
            self.mixture.pools,
            config.tasks,
            config.batch_tokens,
            config.seed,
            self.world * config.grad_accum_steps,
            config.temperature,
            {str(folder): weight for folder, weight in config.corpora.items()},
            config.curriculum,
            config.short_first,
        )

        torch.manual_seed(config.seed)
        sizes = (self.vocabulary.size, self.vocabulary.pad, self.vocabulary.end)
        if base:
            extend_model(base, *sizes, config.seed)
        lm = base or make_model(config.model, *sizes)
        if isinstance(codec, SpeechCodec):  # codes that sound alike start out alike
            first = int(self.vocabulary.audio_ids(torch.zeros(config.n_q, 1, dtype=torch.int64))[0])
            set_embedding_rows(lm, first, codec.code_vectors(), config.seed, own=text_size if base else 0)
        if config.start_from and not self.state.tag:
            start_from(config.start_from, lm, self.vocabulary, self.text, codec)
        self.balance = make_balance(config.balance, list(config.tasks), config.seed, config.grad_accum_steps)
        objective = Objective(
            lm,
            self.vocabulary,
            self.balance,
            config.ctc_layer,
            config.ctc_weight,
            config.aux_weight,
            config.audio_weight,
            config.router_z_weight,
            config.trait_weight,
        )
        self.parameters = parameter_counts(lm)  # in all, active: once the engine is started ranks may hold parts
        self.engine = start_engine(objective, lm, config, self.state)
        self.step = 0
        flops = speed_of(lm.config, self.parameters[1], device_name())
        self.meter = Meter(self.schedule, self.world, ExpertLoad(list(config.tasks)), flops)
        if self.state.tag:
            client = self.state.load(self.engine)
            self.step = client["step"]
            self.schedule.restore(client["schedule"])
            self.meter.restore(client["meter"])
            self.balance.restore(client["balance"])
        self.validation = Validation(config, codec, self.vocabulary, self.text, self.rank, self.world)

    @property
    def lm(self) -> PreTrainedModel:
        """The language model inside the engine."""
        lm: PreTrainedModel = self.engine.module.lm
        return lm

    def _check_positions(self, codec: Codec, most: int) -> None:
        """Raises InputError when the longest sequence has more ids than ``most``, the positions the model has."""
        frames = math.ceil(self.config.max_audio_seconds * codec.frame_rate)
        heard = len(self.vocabulary.audio_ids(torch.arange(frames).expand(self.config.n_q, frames) % codec.card))
        longest = heard + 2 * self.config.max_answer_tokens
        if longest > most:
            limit = f"model.max_positions = {most}: raise it"
            if self.config.init_from:
                limit = f"init_from: {self.config.init_from} has {most} positions: take another LM"
            raise InputError(
                f"max_audio_seconds = {self.config.max_audio_seconds} and max_answer_tokens make sequences of "
                f"{longest} ids; {limit}, or shorten them"
            )

    def batches(self) -> Iterator[list[MeteredBatch]]:
        """This rank's micro batches of each step from the present one on, made in worker processes."""
        steps, accumulated = range(self.step, self.config.steps), self.config.grad_accum_steps
        lanes = range(self.rank * accumulated, (self.rank + 1) * accumulated)
        workers = self.config.loader_workers
        batches = iter(
            DataLoader(
                BatchMaker(self.mixture, self.config.row_length, self.config.seed),
                batch_size=None,
                sampler=micro_batches(self.schedule, steps, lanes),
                num_workers=workers,
                worker_init_fn=leave_signals_to_parent if workers else None,
            )
        )
        return (list(islice(batches, accumulated)) for _ in steps)

    def train_step(self, step: int, batches: Sequence[MeteredBatch]) -> None:
        """One update from this rank's micro batches.

        Raises:
            InputError: a loss or the gradient is not a number; what was saved before is what to go on from.
        """
        rate = self.config.learning_rate * cosine(step, self.config.warmup, self.config.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        for batch in batches:
            losses = self.engine(batch.to(self.engine.device))
            self._check_loss(losses["loss"], step, batch)
            self.engine.backward(losses["loss"])
            norm = update(self.engine)
            choices, tasks = losses.pop("choices", None), self.balance.observe(losses.pop("tasks"))
            scalars = {name: value.item() for name, value in losses.items()} | tasks | {"learning_rate": rate}
            if choices is not None:
                self.meter.experts.add(step, choices)
            if norm is not None:
                scalars["gradient_norm"] = norm
                if not math.isfinite(norm):
                    raise InputError(
                        f"step {step}: the gradient is not finite, though the losses are: lower learning_rate, then go "
                        f"on from {self.state.tag or 'the start'} with --resume"
                    )
            self.meter.add(step, batch, scalars)

    def _check_loss(self, loss: Tensor, step: int, batch: MeteredBatch) -> None:
        """Raises InputError on all ranks when the loss of one is not finite, naming what it was made from."""
        bad = not bool(loss.isfinite())
        if anywhere(bad):
            of = self.mixture.named(batch.draws) if bad else "another rank"
            raise InputError(
                f"step {step}: the loss of {of} is not finite: look at what they are, or lower learning_rate, then go "
                f"on from {self.state.tag or 'the start'} with --resume"
            )

    def save(self) -> None:
        """State to resume from, a checkpoint that can be served, the experts' load; all ranks must call it."""
        client = {
            "step": self.step,
            "schedule": self.schedule.state(self.step),
            "meter": self.meter.state(),
            "balance": self.balance.state(),
        }
        try:
            self._save_checkpoint()  # first: who is killed before the state counts comes by here again
            self.state.save(self.engine, self.step, client)
            self.meter.experts.write(self.config.out, self.step)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save tells of a full disk by a RuntimeError
            kept = f"the state of {self.state.tag} is kept" if self.state.tag else "there is no earlier one"
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self.config.out}: step {self.step} cannot be saved ({reason}); {kept}: make room, then go on with "
                "--resume"
            ) from error

    def _save_checkpoint(self) -> None:
        weights = whole_state(self.lm)
        if self.rank == 0:
            save_checkpoint(
                self.config.out / "checkpoint",
                self.lm,
                self.config.codec,
                self.text,
                self.vocabulary,
                name=self.config.name,
                max_audio_seconds=self.config.max_audio_seconds,
                max_answer_tokens=self.config.max_answer_tokens,
                tasks=list(self.config.tasks),
                weights=weights,
                dtype=torch.bfloat16,
            )

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
            task = bar.add_task("pretrain", total=config.steps, completed=self.step)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="YAML file; see train/configs/tiny.yaml")
    parser.add_argument("--resume", action="store_true", help="go on from the last saved state")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    plan.add_arguments(parser)
    arguments = parser.parse_args()
    try:
        config = read_config(arguments.config, Pretraining)
        if arguments.dry_run:
            plan.dry_run(config, arguments)
            return
        single_process_environment()
        trainer = Trainer(config, arguments.resume)
        if trainer.rank == 0:
            total, active = trainer.parameters
            rows = len(trainer.mixture.rows)
            print(f"{total / 1e6:.1f} M parameters, {active / 1e6:.1f} M active; {rows} utterances")
        if not trainer.run():
            sys.exit(f"stopped after step {trainer.step}; go on with --resume")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    main()
