"""Train a SpeechLLM: ``deepspeed train/pretrain.py --config train/configs/tiny.yaml``, or plainly with ``python``.

One process or many, CPU or GPU: DeepSpeed finds out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from train import plan
from train.config import read_config
from train.launch import command, prepare_environment, share_cores, train
from train.pretrain_config import Pretraining
from train.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="YAML file; see train/configs/tiny.yaml")
    parser.add_argument("--resume", action="store_true", help="go on from the last saved state")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    plan.add_arguments(parser)
    arguments = parser.parse_args()
    with command():
        config = read_config(arguments.config, Pretraining)
        if arguments.dry_run:
            plan.dry_run(config, arguments)
            return
        prepare_environment()
        share_cores()
        train(Trainer(config, arguments.resume))


if __name__ == "__main__":
    main()
