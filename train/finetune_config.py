"""The settings of a fine-tuning run, and those of the training they come to with what the checkpoint brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from speechllm.checkpoint import CODEC
from speechllm.checkpoint_settings import DEFAULT, CheckpointSettings
from speechllm.errors import InputError, first_problem
from speechllm.tasks import TRAINABLE
from speechllm.vocabulary import Vocabulary
from train.config import Settings
from train.pretrain_config import Pretraining
from train.training_config import Tasks, Training, Weights, known_tasks


class Lora(Settings):
    """Low-rank adaptation (Hu et al. 2021): W + alpha / rank · B A, of which A and B alone are trained.

    The projections of attention are adapted, as in that paper. Experts are left as they are: of few recordings each
    sees but a share, top_k of num_experts, and its A and B would learn little from it. They are also dear: transformers
    5 holds the experts of a layer as one tensor [experts, out, in], which PEFT adapts as one of ``target_parameters``
    (mlp.experts.gate_up_proj and mlp.experts.down_proj), and for which it computes all of W + B A in each pass.
    """

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the inputs of A that are hidden in training")
    target_modules: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1, description="ends of names of linear layers"
    )
    target_parameters: list[str] = Field([], description="ends of names of parameters in no linear layer, as experts")

    @model_validator(mode="after")
    def _dropout_fits(self) -> Lora:
        if self.dropout and self.target_parameters:
            raise ValueError("dropout: PEFT has none for target_parameters: set it to 0")
        return self


class Replay(Settings):
    """What the checkpoint was trained on before, some of it once more, against forgetting."""

    share: float = Field(0.25, ge=0, lt=1, description="of all examples; 0: dev_corpora are scored, no more")
    corpora: Weights = Field({}, description="as those of one's own; not read with a share of 0")
    dev_corpora: list[Path] = Field([])
    tasks: Tasks | None = Field(
        None, min_length=1, description="all that the checkpoint was trained on and corpora answer, unless given"
    )

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: Tasks | None) -> Tasks | None:
        return tasks and known_tasks(tasks)

    @model_validator(mode="after")
    def _has_corpora(self) -> Replay:
        if self.share and not self.corpora:
            raise ValueError("corpora: there are none to take examples from: name some, or set share to 0")
        return self


class Finetuning(Training):
    """The YAML file of ``train/finetune.py``. Codec, text model, vocabulary and limits are those of the checkpoint."""

    name: str = "finetuned"
    model: Path = Field(DEFAULT, description="checkpoint to go on from")
    corpora: Weights = Field(
        min_length=1,
        description="folders written by train.encode, or manifests, which are encoded: weight within each task",
    )
    dev_corpora: list[Path] | None = Field(None, description="whose dev rows are scored; all corpora unless given")
    leave_out_longer: bool = Field(
        False, description="leave out clips that are longer than those of the checkpoint, rather than refuse them"
    )
    replay: Replay | None = None
    lora: Lora | None = Field(None, description="train an adapter; all weights are trained unless given")

    learning_rate: float = Field(5e-4, gt=0)
    warmup: int = Field(30, ge=1)
    evaluate_every: int = Field(100, ge=1)
    save_every: int = Field(100, ge=1)

    @field_validator("lora", "replay", mode="before")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value is None:  # a key without a value, which YAML reads so
            raise ValueError("nothing is given: leave it out, or write {} for the defaults")
        return value

    @model_validator(mode="after")
    def _experts_are_held(self) -> Finetuning:
        if self.lora and self.expert_parallel > 1:
            raise ValueError("lora: DeepSpeed spreads only experts that are trained: set expert_parallel to 1")
        return self

    def replayed_tasks(self, checkpoint: CheckpointSettings) -> Tasks:
        """Those of the replay, with their weights; none without one."""
        if not self.replay:
            return {}
        return self.replay.tasks or {name: 1.0 for name in checkpoint.tasks if name in TRAINABLE}

    def replayed(self) -> Weights:
        """Corpora of the replay that examples are taken from, with their weights."""
        return self.replay.corpora if self.replay and self.replay.share else {}

    def scored(self) -> list[Path]:
        """The corpora of one's own whose dev rows are scored."""
        return list(self.corpora) if self.dev_corpora is None else self.dev_corpora

    def check(self, checkpoint: CheckpointSettings) -> None:
        """Raises InputError for a task that the checkpoint has no ids for."""
        for setting, tasks in (("tasks", self.tasks), ("replay.tasks", self.replayed_tasks(checkpoint))):
            timed = [name for name in tasks if TRAINABLE[name].marks]
            if timed and not checkpoint.vocabulary.get("times"):
                raise InputError(
                    f"{setting}: {', '.join(timed)}: the vocabulary of {self.model} has no marks of times: leave such "
                    "tasks out, or name another checkpoint as model"
                )

    def pretraining(self, checkpoint: CheckpointSettings) -> Pretraining:
        """The same as the settings of a pretraining, all corpora being encoded.

        Raises:
            InputError: two dev corpora have the same name, or what a pretraining needs is not so.
        """
        replay = self.replay
        dev_corpora = [*self.scored(), *(replay.dev_corpora if replay else ())]
        shared = {name: getattr(self, name) for name in Training.model_fields}
        brought: dict[str, Any] = {
            name: checkpoint.vocabulary[name] for name in ("n_q", "acoustic_stride", "merge_repeats")
        }
        brought["time_marks"] = checkpoint.vocabulary.get("mark_steps", 0) * Vocabulary.TIME_STEP
        own = {
            "name": self.name,
            "text_model": self.model,
            "codec": self.model / CODEC,
            "max_audio_seconds": checkpoint.max_audio_seconds,
            "max_answer_tokens": checkpoint.max_answer_tokens,
            "corpora": self.corpora | self.replayed(),
            "dev_corpora": dev_corpora,
            "tasks": self.replayed_tasks(checkpoint) | self.tasks,
            "short_first": 0,
            "ctc_weight": 0,  # a model that was trained listens already
        }
        try:
            return Pretraining.model_validate(shared | brought | own)
        except ValidationError as error:
            raise InputError(first_problem(error)) from error
