"""The settings of a pretraining run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from speechllm.data.schedule import WINDOW
from speechllm.model import ModelConfig
from speechllm.tasks import TASKS
from speechllm.vocabulary import Vocabulary
from train.balance import BalanceSettings, FixedSettings, PlainSettings
from train.config import Settings


class Pretraining(Settings):
    """The YAML file of ``train/pretrain.py``."""

    name: str = "tiny"
    out: Path
    seed: int = Field(0, ge=0)
    text_model: Path = Path("tokenizers/text.model")
    codec: Path = Path("tokenizers/codec")
    corpora: dict[Path, Annotated[float, Field(gt=0)]] = Field(
        min_length=1, description="folders written by train.encode: weight within each task"
    )
    dev_corpora: list[Path]
    tasks: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(
        min_length=1, description="task name: weight in the mixture"
    )
    curriculum: dict[str, int] = Field({}, description="task name: step from which it is trained, if not the first")
    temperature: float = Field(5.0, ge=1, description="T: a task or corpus of n recordings counts n^(1/T)")
    init_from: str | None = Field(
        None, min_length=1, description="causal LM of transformers, a folder or a name on the hub; brings its tokenizer"
    )
    start_from: Path | None = Field(None, description="checkpoint whose weights are taken as far as they fit")
    model: ModelConfig = ModelConfig()
    n_q: int = Field(1, ge=1, description="codebooks the LM sees")
    acoustic_stride: int = Field(1, ge=1, description="frames of which one has the codebooks after the first")
    merge_repeats: bool = Field(True, description="write a run of equal codes as one id")
    max_audio_seconds: float = Field(12.0, gt=0)
    max_answer_tokens: int = Field(96, gt=0)

    steps: int = Field(gt=0)
    learning_rate: float = Field(2e-3, gt=0)
    warmup: int = Field(300, ge=1)
    weight_decay: float = Field(0.05, ge=0)
    batch_tokens: float = Field(2000, gt=0, description="per process and micro batch")
    row_length: int = Field(512, ge=1, description="ids of a row into which several sequences are packed")
    loader_workers: int = Field(1, ge=0, le=64, description="processes that make batches; 0: made while training waits")
    short_first: int = Field(1000, ge=0, description="steps over which utterances of growing length come in")
    code_noise: float = Field(0.03, ge=0, lt=1, description="share of frames whose codes are replaced by random ones")
    code_masking: float = Field(0.0, ge=0, lt=1, description="share of frames hidden in spans")
    balance: BalanceSettings = Field(PlainSettings(), description="how the losses of the tasks are weighed")
    audio_weight: float = Field(0.0, ge=0, description="of the loss on the audio ids")
    ctc_weight: float = Field(
        0.3, ge=0, description="its head has an output for each text id: dear where they are many"
    )
    trait_weight: float = Field(0.0, ge=0, description="of the loss on what is known of the speaker")
    ctc_layer: int = Field(
        3, ge=1, description="layer whose states the heads of CTC and traits read; at most num_layers"
    )
    aux_weight: float = Field(0.01, ge=0, description="of the experts' load-balancing loss")
    router_z_weight: float = Field(0.0, ge=0, description="of the loss that keeps the router's logits small")

    grad_accum_steps: int = Field(1, ge=1, description="micro batches of a process in each step")
    zero_stage: int = Field(
        0, ge=0, le=3, description="ZeRO: what ranks share; 1 optimizer, 2 gradients, 3 weights too"
    )
    offload: bool = Field(False, description="keep what ZeRO shares in the memory of the host, not of the GPUs")
    expert_parallel: int = Field(1, ge=1, description="ranks that the experts of a layer are spread over")
    bf16: bool | None = Field(None, description="train in bfloat16; on GPUs alone unless given")
    activation_checkpointing: bool = Field(False, description="compute activations twice rather than keep them")
    log_every: int = Field(20, ge=1)
    evaluate_every: int = Field(500, ge=1)
    save_every: int = Field(500, ge=1)
    decode_examples: int = Field(40, ge=1, description="clips scored for each task and dev corpus")

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: dict[str, float]) -> dict[str, float]:
        for name, share in tasks.items():
            if name not in TASKS:
                raise ValueError(f"unknown task {name!r}: known are {', '.join(TASKS)}")
            if share <= 0:
                raise ValueError(f"the share of {name} must be above 0; leave the task out instead")
        return tasks

    @model_validator(mode="after")
    def _curriculum_fits(self) -> Pretraining:
        for name, step in self.curriculum.items():
            if not step >= 0 or -(-step // WINDOW) * WINDOW >= self.steps:  # tasks enter with a window
                raise ValueError(f"curriculum: {name} enters at step {step} of {self.steps}: too late to be trained")
        if unknown := self.curriculum.keys() - self.tasks.keys():
            raise ValueError(f"curriculum: {', '.join(sorted(unknown))} not among the tasks")
        if self.curriculum.keys() == self.tasks.keys() and min(self.curriculum.values()) > 0:
            raise ValueError("curriculum: no task to begin with: leave one out of it")
        return self

    @model_validator(mode="after")
    def _balance_fits(self) -> Pretraining:
        if isinstance(self.balance, FixedSettings) and (unknown := self.balance.weights.keys() - self.tasks.keys()):
            raise ValueError(f"balance.weights: {', '.join(sorted(unknown))} not among the tasks")
        if self.balance.method == "pcgrad" and (self.zero_stage >= 2 or self.expert_parallel > 1):
            raise ValueError(
                "balance: pcgrad holds whole gradients of each task on each rank: it needs zero_stage 0 or 1, not "
                f"{self.zero_stage}, and expert_parallel = 1, not {self.expert_parallel}; or choose another method"
            )
        return self

    @model_validator(mode="after")
    def _one_start(self) -> Pretraining:
        for name in ("model", "text_model", "start_from") if self.init_from else ():
            if name in self.model_fields_set and getattr(self, name) is not None:
                raise ValueError(f"init_from brings its own weights, sizes and text tokenizer: leave out {name}")
        return self

    @model_validator(mode="after")
    def _ctc_layer_exists(self) -> Pretraining:
        # an LM that is started from has layers of its own, which are known once it is opened
        if self.ctc_weight and self.ctc_layer > self.model.num_layers and not self.init_from:
            raise ValueError(f"ctc_layer = {self.ctc_layer} exceeds model.num_layers = {self.model.num_layers}")
        return self

    @model_validator(mode="after")
    def _parallelism_fits(self) -> Pretraining:
        if self.offload and not self.zero_stage:
            raise ValueError("offload: there is nothing that ZeRO shares with zero_stage = 0: set it to 1, 2 or 3")
        if self.expert_parallel > 1 and not self.zero_stage:
            raise ValueError(
                "expert_parallel: DeepSpeed clips by another norm on each rank with zero_stage = 0: set it to 1"
            )
        return self

    @property
    def times(self) -> int:
        """Marks of times in the vocabulary: enough for the longest clip when a task needs them."""
        if not any(TASKS[name].marks for name in self.tasks):
            return 0
        return math.ceil(self.max_audio_seconds / Vocabulary.TIME_STEP) + 1

    @model_validator(mode="after")
    def _times_are_heard(self) -> Pretraining:
        if self.times and self.merge_repeats:
            raise ValueError("merge_repeats loses when things are said: set it to false, or leave out tasks with times")
        return self
