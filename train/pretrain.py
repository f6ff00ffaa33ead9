"""Train a SpeechLLM: ``deepspeed train/pretrain.py --config train/configs/tiny.yaml``, or plainly with ``python``.

One process or many, CPU or GPU: DeepSpeed finds out. Everything a step sees follows from the seed, the step and the
rank, so a run that is resumed goes on exactly as if it had not been stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
import deepspeed
import torch
from torch import distributed
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from speechllm.checkpoint import save_checkpoint
from speechllm.codec import Codec, SpeechCodec, load_codec
from speechllm.data.encoded import read_encoded
from speechllm.data.mixture import CodeNoise, Mixture, TrainingBatch
from speechllm.data.schedule import Schedule
from speechllm.errors import InputError
from speechllm.model import make_model, parameter_counts, set_embedding_rows
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train.config import read_config
from train.loader import BatchMaker, Meter, leave_signals_to_parent
from train.log import MetricLog, plot_metrics
from train.loop import cosine, progress_bar
from train.objective import Objective
from train.pretrain_config import Pretraining
from train.validate import Validation
from train.warm_start import start_from


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
        if (config.out / "state").exists() and not resume:
            raise InputError(f"{config.out}: holds a run already: add --resume to go on, or set another 'out'")
        self.text = TextTokenizer.load(config.text_model)
        codec = load_codec(config.codec)
        self.vocabulary = Vocabulary(
            self.text.size, config.n_q, codec.card, config.merge_repeats, config.times, config.acoustic_stride
        )
        self._check_positions(codec)
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
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.schedule = Schedule(
            self.mixture.pools,
            config.tasks,
            config.batch_tokens,
            config.seed,
            self.world,
            config.temperature,
            {str(folder): weight for folder, weight in config.corpora.items()},
            config.curriculum,
            config.short_first,
        )

        torch.manual_seed(config.seed)
        lm = make_model(config.model, self.vocabulary.size, self.vocabulary.pad, self.vocabulary.end)
        if isinstance(codec, SpeechCodec):  # codes that sound alike start out alike
            first = int(self.vocabulary.audio_ids(torch.zeros(config.n_q, 1, dtype=torch.int64))[0])
            set_embedding_rows(lm, first, codec.code_vectors(), config.seed)
        resuming = resume and (config.out / "state" / "latest").exists()
        if config.start_from and not resuming:
            start_from(config.start_from, lm, self.vocabulary, self.text, codec)
        objective = Objective(lm, self.text.size, config.ctc_layer, config.ctc_weight, config.aux_weight)
        optimizer = torch.optim.AdamW(
            objective.parameters(), config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
        )
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=objective, optimizer=optimizer, config=config.deepspeed_config(self.world, torch.cuda.is_available())
        )
        self.step = 0
        self.meter = Meter(self.schedule, self.world)
        if resuming:
            _, client = self.engine.load_checkpoint(str(config.out / "state"))
            if "meter" not in client:
                raise InputError(f"{config.out}/state: saved by an older version: start anew with another 'out'")
            self.step = client["step"]
            self.schedule.restore(client["schedule"])
            self.meter.restore(client["meter"])
        self.validation = Validation(config, codec, self.vocabulary, self.text, self.rank, self.world)

    @property
    def lm(self) -> PreTrainedModel:
        """The language model inside the engine."""
        lm: PreTrainedModel = self.engine.module.lm
        return lm

    def _check_positions(self, codec: Codec) -> None:
        """Raises InputError when the longest sequence there may be has more ids than the model has positions."""
        frames = math.ceil(self.config.max_audio_seconds * codec.frame_rate)
        heard = len(self.vocabulary.audio_ids(torch.arange(frames).expand(self.config.n_q, frames) % codec.card))
        longest, most = heard + 2 * self.config.max_answer_tokens, self.config.model.max_positions
        if longest > most:
            raise InputError(
                f"max_audio_seconds = {self.config.max_audio_seconds} and max_answer_tokens make sequences of "
                f"{longest} ids; model.max_positions = {most}: raise it, or shorten them"
            )

    def batches(self) -> Iterator[TrainingBatch]:
        """This rank's batches from the present step on, made in worker processes."""
        steps = range(self.step, self.config.steps)
        plans = zip(steps, self.schedule.steps(steps, self.rank), strict=True)
        workers = self.config.loader_workers
        return iter(
            DataLoader(
                BatchMaker(self.mixture, self.config.row_length, f"{self.config.seed} rank {self.rank}"),
                batch_size=None,
                sampler=plans,
                num_workers=workers,
                worker_init_fn=leave_signals_to_parent if workers else None,
            )
        )

    def train_step(self, step: int, batch: TrainingBatch) -> dict[str, float]:
        """One update; returns this rank's losses."""
        rate = self.config.learning_rate * cosine(step, self.config.warmup, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = self.engine(batch.to(self.engine.device))
        self.engine.backward(losses["loss"])
        self.engine.step()
        load = losses.pop("load", None)
        scalars = {name: value.item() for name, value in losses.items()} | {"learning_rate": rate}
        if load is not None:
            scalars["busiest_expert"], scalars["idlest_expert"] = load.max().item(), load.min().item()
        return scalars

    def save(self) -> None:
        """State to resume from (all ranks), and a checkpoint that can be served (rank 0)."""
        state, tag = self.config.out / "state", f"step-{self.step}"
        client = {"step": self.step, "schedule": self.schedule.state(self.step), "meter": self.meter.state()}
        self.engine.save_checkpoint(str(state), tag=tag, client_state=client)
        if self.rank == 0:
            for older in state.glob("step-*"):  # kept until now: an interrupted save leaves the one before it whole
                if older.name != tag:
                    shutil.rmtree(older)
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
                dtype=torch.bfloat16,
            )

    def any_rank(self, value: bool) -> bool:
        """True everywhere if true anywhere, so that all ranks stop after the same step."""
        flag = torch.tensor(float(value), device=self.engine.device)
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)

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
            for step, batch in zip(steps, self.meter.timed(self.batches()), strict=True):
                self.meter.add(step, batch, self.train_step(step, batch))
                self.step = step + 1
                last = self.step == config.steps
                if self.step % config.log_every == 0:
                    stop = self.any_rank(bool(stopping))
                    if log:
                        log.write(self.step, **self.meter.read())
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
            plot_metrics(log.path, self.validation.panels(), config.out / "training.png")
            self.meter.plot(config.out)
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="YAML file; see train/configs/tiny.yaml")
    parser.add_argument("--resume", action="store_true", help="go on from the last saved state")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    arguments = parser.parse_args()
    try:
        config = read_config(arguments.config, Pretraining)
        single_process_environment()
        trainer = Trainer(config, arguments.resume)
        total, active = parameter_counts(trainer.lm)
        if trainer.rank == 0:
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
