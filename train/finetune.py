"""Go on from a checkpoint with recordings of one's own: ``deepspeed train/finetune.py --config my.yaml``.

Or plainly with ``python``. All weights are trained, or those of a LoRA adapter beside them; older examples among the
new ones keep the model from forgetting. ``train/configs/finetune.yaml`` explains the settings.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from speechllm.adapter import AdapterSettings, lm_fingerprint, save_adapter
from speechllm.checkpoint import LM, load_checkpoint
from speechllm.checkpoint_settings import read_settings
from speechllm.data.replay import ReplaySchedule
from speechllm.data.schedule import Schedule
from speechllm.errors import InputError
from train.config import read_config
from train.engine import whole_state
from train.finetune_config import Finetuning, Lora
from train.launch import command, prepare_environment, share_cores, train
from train.log import MetricLog
from train.own_data import OwnData
from train.ranks import by_first, nothing, write_together
from train.setup import Start
from train.state import check_begun
from train.trainer import Trainer
from train.training_config import Tasks, Weights


class FineTrainer(Trainer):
    """A training that begins with a checkpoint."""

    def __init__(self, config: Finetuning, resume: bool):
        self.checkpoint = read_settings(config.model)
        config.check(self.checkpoint)
        check_begun(config.out, resume)
        self.opened = open_start(config)  # before corpora are encoded, for hours perhaps: it may be refused
        if int(os.environ["WORLD_SIZE"]) > 1:
            get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
            deepspeed.init_distributed()
        # read once: other weights may lie there by the time that an adapter is saved
        self.base = by_first(
            lambda: {"vocabulary": self.checkpoint.fingerprint, "lm": lm_fingerprint(config.model / LM)}
        )
        self.own = OwnData(config, self.checkpoint, int(os.environ["RANK"])).ready()
        super().__init__(self.own.pretraining(self.checkpoint), resume)

    def start(self) -> Start:
        """The checkpoint's parts, its LM with the adapter that is to be trained."""
        return self.opened

    def make_schedule(self) -> Schedule:
        """One's own examples, and those of the replay among them."""
        own, replay = self.part("tasks", self.own.tasks, self.own.corpora), self.own.replay
        if not replay or not replay.share:
            return own
        known = self.own.replayed_tasks(self.checkpoint)
        older = self.part("replay.tasks", known, self.own.replayed(), all_needed=replay.tasks is not None)
        return ReplaySchedule(own, older, replay.share)

    def part(self, setting: str, tasks: Tasks, corpora: Weights, all_needed: bool = True) -> Schedule:
        """Examples of ``tasks`` from ``corpora``.

        Raises InputError for a task that they have no answer for; or, if they need not answer all, for all.
        """
        weights = {str(folder): weight for folder, weight in corpora.items()}
        pools = {
            task: {name: pool for name, pool in self.mixture.pools.get(task, {}).items() if name in weights}
            for task in tasks
        }
        if missing := [task for task, found in pools.items() if not found]:
            message = f"{setting}: no utterance of {', '.join(weights)} has an answer for {', '.join(missing)}"
            if all_needed or len(missing) == len(pools):
                raise InputError(f"{message}: name the tasks that have one")
            if self.rank == 0:
                print(f"{message}: left out", flush=True)
            pools = {task: found for task, found in pools.items() if found}
        config = self.own
        lanes = self.world * config.grad_accum_steps
        return Schedule(pools, tasks, config.batch_tokens, config.seed, lanes, config.temperature, weights)

    def known_tasks(self) -> Sequence[str]:
        """Those of the checkpoint, and new ones."""
        return list(dict.fromkeys([*self.checkpoint.tasks, *self.own.tasks]))

    def save_checkpoint(self) -> None:
        """A whole checkpoint, or the adapter alone; all ranks must call it."""
        weights = whole_state(self.lm, trained_only=self.own.lora is not None)
        write_together((lambda: self.write_checkpoint(weights)) if self.rank == 0 else nothing)

    def write_checkpoint(self, weights: dict[str, Tensor]) -> None:
        """On rank 0, with the weights that were trained in one piece."""
        if self.own.lora:
            save_adapter(self.own.out / "adapter", self.lm, weights, self.adapter())
        else:
            super().write_checkpoint(weights)

    def adapter(self) -> AdapterSettings:
        """What is told about the adapter."""
        return AdapterSettings(
            name=self.own.name,
            checkpoint=self.checkpoint.name,
            fingerprint=self.base["vocabulary"],
            lm_fingerprint=self.base["lm"],
            tasks=tuple(self.own.tasks),
        )

    def client(self) -> dict[str, Any]:
        """Beside the rest, the fingerprints of what the run began with."""
        return super().client() | {"base": self.base}

    def restore(self, client: dict[str, Any]) -> None:
        """Raises InputError when the run began with another checkpoint."""
        if client.get("base") != self.base:
            raise InputError(
                f"model: {self.own.model} does not hold the weights and vocabulary that {self.own.out} began with: put "
                "them back, or set another 'out'"
            )
        super().restore(client)

    def run(self) -> bool:
        """Train to the end, from scores of the checkpoint as it is; False when stopped early."""
        if not self.step:
            with self.meter.paused():
                scores = self.validation.run(self.lm)
            if self.rank == 0:
                log = MetricLog(self.config.out)
                log.write(0, **scores)
                log.close()
                print("step 0: " + "  ".join(f"{name} {value:.2f}" for name, value in scores.items()))
        return super().run()


def open_start(config: Finetuning) -> Start:
    """What training begins with. Raises InputError when the checkpoint is damaged, or has no place for the adapter."""
    checkpoint = load_checkpoint(config.model)
    torch.manual_seed(config.seed)
    lm = checkpoint.lm.train()
    if config.lora:
        add_lora(lm, config.lora)
    return Start(lm, checkpoint.codec, checkpoint.text, checkpoint.vocabulary)


def add_lora(lm: PreTrainedModel, lora: Lora) -> None:
    """Freeze ``lm`` and put an adapter into it, which changes nothing yet: B is 0.

    Raises:
        InputError: there is no layer or parameter of such a name, or none that PEFT can adapt.
    """
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        target_parameters=lora.target_parameters,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what PEFT and transformers will rename
            get_peft_model(lm, config)
    except ValueError as error:
        raise InputError(f"lora: {str(error).partition(chr(10))[0]}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="YAML file; see train/configs/finetune.yaml")
    parser.add_argument("--resume", action="store_true", help="go on from the last saved state")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    arguments = parser.parse_args()
    with command():
        config = read_config(arguments.config, Finetuning)
        prepare_environment()
        share_cores()
        try:
            trainer = FineTrainer(config, arguments.resume)
        except KeyboardInterrupt:
            sys.exit("stopped; start it again to go on")
        train(trainer)


if __name__ == "__main__":
    main()
