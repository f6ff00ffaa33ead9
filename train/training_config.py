"""The settings that every training of a language model has, whatever it begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from speechllm.model import Attention
from speechllm.tasks import TRAINABLE
from train.config import Settings

Weights = dict[Path, Annotated[float, Field(gt=0)]]
Tasks = dict[str, Annotated[float, Field(allow_inf_nan=False)]]


def known_tasks(tasks: Tasks) -> Tasks:
    """The same. Raises ValueError for a task that there is not, or a weight of 0 or less."""
    for name, share in tasks.items():
        if name not in TRAINABLE:
            raise ValueError(f"unknown task {name!r}: known are {', '.join(TRAINABLE)}")
        if share <= 0:
            raise ValueError(f"the share of {name} must be above 0; leave the task out instead")
    return tasks


class Training(Settings):
    """What is trained on, for how long, and on which ranks."""

    out: Path
    seed: int = Field(0, ge=0)
    tasks: Tasks = Field(min_length=1, description="task name: weight in the mixture")
    temperature: float = Field(5.0, ge=1, description="T: a task or corpus of n recordings counts n^(1/T)")

    steps: int = Field(gt=0)
    learning_rate: float = Field(2e-3, gt=0)
    warmup: int = Field(300, ge=1)
    weight_decay: float = Field(0.05, ge=0)
    batch_tokens: float = Field(2000, gt=0, description="per process and micro batch")
    row_length: int = Field(512, ge=1, description="ids of a row into which several sequences are packed")
    loader_workers: int = Field(1, ge=0, le=64, description="processes that make batches; 0: made while training waits")
    code_noise: float = Field(0.03, ge=0, lt=1, description="share of frames whose codes are replaced by random ones")
    code_masking: float = Field(0.0, ge=0, lt=1, description="share of frames hidden in spans")
    aux_weight: float = Field(0.01, ge=0, description="of the experts' load-balancing loss")

    grad_accum_steps: int = Field(1, ge=1, description="micro batches of a process in each step")
    zero_stage: int = Field(
        0, ge=0, le=3, description="ZeRO: what ranks share; 1 optimizer, 2 gradients, 3 weights too"
    )
    offload: bool = Field(False, description="keep what ZeRO shares in the memory of the host, not of the GPUs")
    expert_parallel: int = Field(1, ge=1, description="ranks that the experts of a layer are spread over")
    bf16: bool | None = Field(None, description="train in bfloat16; on GPUs alone unless given")
    attn_implementation: Attention | None = Field(
        None, description="of attention; unless given FlashAttention where it can be had, and else PyTorch's own (sdpa)"
    )
    activation_checkpointing: bool = Field(False, description="compute activations twice rather than keep them")
    log_every: int = Field(20, ge=1)
    evaluate_every: int = Field(500, ge=1)
    save_every: int = Field(500, ge=1)
    decode_examples: int = Field(40, ge=1, description="clips scored for each task and dev corpus")

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: Tasks) -> Tasks:
        return known_tasks(tasks)

    @model_validator(mode="after")
    def _parallelism_fits(self) -> Training:
        if self.offload and not self.zero_stage:
            raise ValueError("offload: there is nothing that ZeRO shares with zero_stage = 0: set it to 1, 2 or 3")
        if self.expert_parallel > 1 and not self.zero_stage:
            raise ValueError(
                "expert_parallel: DeepSpeed clips by another norm on each rank with zero_stage = 0: set it to 1"
            )
        return self
