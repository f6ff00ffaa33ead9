"""The settings of a pretraining run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from speechllm.codec import Codec
from speechllm.data.schedule import WINDOW
from speechllm.errors import InputError
from speechllm.model import SDPA, Attention, ModelConfig
from speechllm.tasks import TRAINABLE
from speechllm.vocabulary import Vocabulary
from train.balance import BalanceSettings, FixedSettings, PlainSettings
from train.training_config import Training, Weights


class Pretraining(Training):
    """The YAML file of ``train/pretrain.py``."""

    name: str = "tiny"
    text_model: Path = Path("tokenizers/text.model")
    codec: Path = Path("tokenizers/codec")
    corpora: Weights = Field(min_length=1, description="folders written by train.encode: weight within each task")
    dev_corpora: list[Path] | dict[Path, list[str]] = Field(
        description="folders; and the tasks that are scored on each, all that it has answers for unless given"
    )
    task_corpora: dict[str, Annotated[Weights, Field(min_length=1)]] = Field(
        {}, description="task name: the folders among corpora that teach it, and their weight, if not all"
    )
    curriculum: dict[str, int] = Field({}, description="task name: step from which it is trained, if not the first")
    init_from: str | None = Field(
        None, min_length=1, description="causal LM of transformers, a folder or a name on the hub; brings its tokenizer"
    )
    start_from: Path | None = Field(None, description="checkpoint whose weights are taken as far as they fit")
    model: ModelConfig = ModelConfig()
    n_q: int = Field(1, ge=1, description="codebooks the LM sees")
    acoustic_stride: int = Field(1, ge=1, description="frames of which one has the codebooks after the first")
    merge_repeats: bool = Field(True, description="write a run of equal codes as one id")
    time_marks: float = Field(0.0, ge=0, description="seconds between marks of the time among the codes; 0 for none")
    max_audio_seconds: float = Field(12.0, gt=0)
    max_answer_tokens: int = Field(96, gt=0)

    questions: int = Field(1, ge=1, description="about a recording that is heard once for all, on average at most")
    short_first: int = Field(1000, ge=0, description="steps over which utterances of growing length come in")
    balance: BalanceSettings = Field(PlainSettings(), description="how the losses of the tasks are weighed")
    audio_weight: float = Field(0.0, ge=0, description="of the loss on the audio ids")
    ctc_weight: float = Field(
        0.3, ge=0, description="its head has an output for each text id: dear where they are many"
    )
    trait_weight: float = Field(0.0, ge=0, description="of the loss on what is known of the speaker")
    ctc_layer: int = Field(
        3, ge=1, description="layer whose states the heads of CTC and traits read; at most num_layers"
    )
    router_z_weight: float = Field(0.0, ge=0, description="of the loss that keeps the router's logits small")

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
    def _task_corpora_are_there(self) -> Pretraining:
        if unknown := self.task_corpora.keys() - self.tasks.keys():
            raise ValueError(f"task_corpora: {', '.join(sorted(unknown))} not among the tasks")
        for task, weights in self.task_corpora.items():
            if missing := weights.keys() - self.corpora.keys():
                raise ValueError(f"task_corpora: {task}: {', '.join(map(str, sorted(missing)))} not among the corpora")
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
    def _attention_takes_a_mask(self) -> Pretraining:
        if self.questions > 1 and self.attention != SDPA:
            raise ValueError(
                f"questions: {self.questions} about one recording need attn_implementation: {SDPA}, not "
                f"{self.attention}; or ask 1"
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
        if self.listened_layer > self.model.num_layers and not self.init_from:
            raise ValueError(f"ctc_layer = {self.ctc_layer} exceeds model.num_layers = {self.model.num_layers}")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Pretraining:
        names = [folder.name for folder in self.dev_corpora]
        for folder in self.dev_corpora:
            if names.count(folder.name) > 1:  # scores are told apart by them
                raise ValueError(f"{folder}: another dev corpus is called {folder.name} too: rename the folder of one")
        return self

    @model_validator(mode="after")
    def _scored_is_trained(self) -> Pretraining:
        for folder in self.dev_corpora:
            if unknown := set(self.scored_on(folder)) - self.tasks.keys():
                raise ValueError(f"dev_corpora: {folder}: {', '.join(sorted(unknown))} not among the tasks")
        return self

    @property
    def listened_layer(self) -> int:
        """Whose states CTC and traits are read from; 0 without either."""
        return self.ctc_layer if self.ctc_weight or self.trait_weight else 0

    @property
    def attention(self) -> Attention | None:
        """The implementation that is wanted, None for the best there is."""
        return self.attn_implementation or (SDPA if self.questions > 1 else None)

    def scored_on(self, folder: Path) -> list[str]:
        """The tasks that are scored on a dev corpus, where it has answers for them."""
        named = self.dev_corpora
        return named[folder] if isinstance(named, dict) else list(self.tasks)

    @property
    def times(self) -> int:
        """Marks of times in the vocabulary: enough for the longest clip when a task tells them, or audio has them."""
        if not self.time_marks and not any(TRAINABLE[name].marks for name in self.tasks):
            return 0
        return math.ceil(self.max_audio_seconds / Vocabulary.TIME_STEP) + 1

    def vocabulary(self, text_size: int, codec: Codec) -> Vocabulary:
        """The layout of ids. Raises InputError where time_marks does not fall on frames of the codec and on times."""
        frames, steps = (round(self.time_marks * rate, 6) for rate in (codec.frame_rate, 1 / Vocabulary.TIME_STEP))
        if not (frames.is_integer() and steps.is_integer()):
            raise InputError(
                f"time_marks = {self.time_marks:g} is no multiple of both {Vocabulary.TIME_STEP} s and a frame of the "
                f"codec ({1 / codec.frame_rate:.4g} s): set another, or 0"
            )
        return Vocabulary(
            text_size,
            n_q=self.n_q,
            card=codec.card,
            merge_repeats=self.merge_repeats,
            times=self.times,
            acoustic_stride=self.acoustic_stride,
            mark_frames=int(frames),
            mark_steps=int(steps),
        )

    @model_validator(mode="after")
    def _times_are_heard(self) -> Pretraining:
        if self.times and self.merge_repeats:
            raise ValueError(
                "merge_repeats loses when things are said: set it to false, or leave out time_marks and timed tasks"
            )
        return self
