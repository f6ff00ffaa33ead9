"""Train a SpeechLLM: ``deepspeed train/pretrain.py --config train/configs/tiny.yaml``, or plainly with ``python``.

One process or many, CPU or GPU: DeepSpeed finds out. Everything a step sees follows from the seed, the step and the
rank, so a run that is resumed goes on exactly as if it had not been stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from random import Random

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
import deepspeed
import torch
from torch import distributed
from transformers import PreTrainedModel

from speechllm.checkpoint import save_checkpoint
from speechllm.codec import SpeechCodec, load_codec
from speechllm.data.encoded import read_encoded, row_facts
from speechllm.data.mixture import Mixture, TrainingBatch
from speechllm.data.sampling import LengthSampler, prefetch, short_first
from speechllm.errors import InputError
from speechllm.model import make_model, parameter_counts, set_embedding_rows
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train.config import read_config
from train.log import MetricLog, plot_metrics
from train.loop import cosine, progress_bar
from train.objective import Objective
from train.pretrain_config import Pretraining
from train.validate import Validation


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
        self.vocabulary = Vocabulary(self.text.size, config.n_q, codec.card, config.merge_repeats, config.times)
        train = read_encoded(config.corpora, "train", codec).filter(
            lambda row: row_facts(row).duration <= config.max_audio_seconds
        )
        self.mixture = Mixture(train, self.vocabulary, self.text, config.tasks, config.code_noise)
        if not self.mixture.rows:
            raise InputError(
                f"corpora: no utterance of up to max_audio_seconds = {config.max_audio_seconds} has an answer for "
                f"{', '.join(config.tasks)}"
            )
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.sampler = LengthSampler(self.mixture.lengths, config.batch_tokens, config.max_examples, config.seed)

        torch.manual_seed(config.seed)
        lm = make_model(config.model, self.vocabulary.size, self.vocabulary.pad, self.vocabulary.end)
        if isinstance(codec, SpeechCodec):  # codes that sound alike start out alike
            first = int(self.vocabulary.audio_ids(torch.zeros(config.n_q, 1, dtype=torch.int64))[0])
            set_embedding_rows(lm, first, codec.code_vectors(), config.seed)
        objective = Objective(lm, self.text.size, config.ctc_layer, config.ctc_weight, config.aux_weight)
        optimizer = torch.optim.AdamW(
            objective.parameters(), config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
        )
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=objective, optimizer=optimizer, config=config.deepspeed_config(self.world, torch.cuda.is_available())
        )
        self.step = 0
        if resume and (config.out / "state" / "latest").exists():
            _, client = self.engine.load_checkpoint(str(config.out / "state"))
            self.step = client["step"]
        self.validation = Validation(config, codec, self.vocabulary, self.text, self.rank, self.world)

    @property
    def lm(self) -> PreTrainedModel:
        """The language model inside the engine."""
        lm: PreTrainedModel = self.engine.module.lm
        return lm

    def batch(self, step: int) -> TrainingBatch:
        """This rank's part of ``step``; short utterances come first."""
        config = self.config
        number = step * self.world + self.rank
        indices = self.sampler(number, short_first(step, config.short_first))
        return self.mixture.batch(indices, Random(f"{config.seed} batch {number}"))

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
        self.engine.save_checkpoint(str(state), tag=tag, client_state={"step": self.step})
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
        sums: dict[str, float] = {}
        mark, tokens, count = time.monotonic(), 0, 0
        steps = range(self.step, config.steps)
        bar = progress_bar()
        bar.disable = self.rank != 0
        with bar:
            task = bar.add_task("pretrain", total=config.steps, completed=self.step)
            for step, batch in zip(steps, prefetch(self.batch, steps), strict=True):
                for name, value in self.train_step(step, batch).items():
                    sums[name] = sums.get(name, 0.0) + value
                tokens, count = tokens + int(batch.lm.attention_mask.sum()), count + 1
                self.step = step + 1
                last = self.step == config.steps
                if self.step % config.log_every == 0:
                    stop = self.any_rank(bool(stopping))
                    if log:
                        speed = self.world * tokens / (time.monotonic() - mark)
                        means = {name: value / count for name, value in sums.items()}  # fewer after a resume
                        log.write(self.step, tokens_per_second=speed, **means)
                    sums, mark, tokens, count = {}, time.monotonic(), 0, 0
                    if stop:
                        self.save()
                        return False
                if self.step % config.save_every == 0 or last:
                    self.save()
                if self.step % config.evaluate_every == 0 or last:
                    scores = self.validation.run(self.lm)
                    if log:
                        log.write(self.step, **scores)
                        shown = "  ".join(f"{name} {value:.2f}" for name, value in scores.items())
                        bar.console.print(f"step {self.step}: {shown}", highlight=False)
                bar.update(task, completed=self.step)
        if log:
            log.close()
            plot_metrics(log.path, self.validation.panels(), config.out / "training.png")
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
            print(
                f"{total / 1e6:.1f} M parameters, {active / 1e6:.1f} M active; {len(trainer.mixture.rows)} utterances"
            )
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
