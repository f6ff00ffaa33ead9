"""What a pretraining is made of: the LM and what its ids mean, the mixture of tasks, and the order of its examples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
import torch
from transformers import PreTrainedModel

from speechllm.codec import Codec, SpeechCodec, load_codec
from speechllm.data.encoded import read_encoded
from speechllm.data.episodes import ROOM
from speechllm.data.mixture import CodeNoise, Mixture
from speechllm.data.schedule import Schedule
from speechllm.errors import InputError
from speechllm.model import extend_model, make_model, set_embedding_rows
from speechllm.tasks import FEW_SHOT
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train.init_from import open_lm
from train.pretrain_config import Pretraining
from train.warm_start import start_from

SLACK = 1.5  # most ids of an example with shots, as a multiple of what is planned


@dataclass(frozen=True, eq=False)
class Start:
    """What a training begins with: a language model in training mode, and what its ids mean."""

    lm: PreTrainedModel
    codec: Codec
    text: TextTokenizer
    vocabulary: Vocabulary


def make_start(config: Pretraining, resumed: bool) -> Start:
    """A new LM, or the one of ``init_from`` with ids for audio. ``resumed``: its weights will be those of a saved run.

    Raises:
        InputError: a file that the settings name is missing or does not fit, or sequences are longer than positions.
    """
    base: PreTrainedModel | None = None
    if config.init_from:
        base, text = open_lm(config.init_from, config.listened_layer)
    else:
        text = TextTokenizer.load(config.text_model)
    text_size = base.config.vocab_size if base else text.size
    codec = load_codec(config.codec)
    vocabulary = config.vocabulary(text_size, codec)
    if base:
        most = base.config.max_position_embeddings
        limit = f"init_from: {config.init_from} has {most} positions: take another LM"
    else:
        most = config.model.max_positions
        limit = f"model.max_positions = {most}: raise it"
    check_positions(config, codec, vocabulary, most, limit)

    torch.manual_seed(config.seed)
    sizes = (vocabulary.size, vocabulary.pad, vocabulary.end)
    if base:
        extend_model(base, *sizes, config.seed)
    lm = base or make_model(config.model, *sizes)
    if isinstance(codec, SpeechCodec):  # codes that sound alike start out alike
        first = int(vocabulary.audio_ids(torch.zeros(config.n_q, 1, dtype=torch.int64))[0])
        set_embedding_rows(lm, first, codec.code_vectors(), config.seed, own=text_size if base else 0)
    if config.start_from and not resumed:
        start_from(config.start_from, lm, vocabulary, text, codec)
    return Start(lm, codec, text, vocabulary)


def check_positions(config: Pretraining, codec: Codec, vocabulary: Vocabulary, most: int, limit: str) -> None:
    """Raises InputError when the longest sequence has more ids than ``most``, the positions the LM has.

    limit: what sets them, and the way out, for the message.
    """
    frames = math.ceil(config.max_audio_seconds * codec.frame_rate)
    heard = len(vocabulary.audio_ids(torch.arange(frames).expand(vocabulary.n_q, frames) % codec.card))
    longest = heard + 2 * config.max_answer_tokens
    if longest > most:
        raise InputError(
            f"max_audio_seconds = {config.max_audio_seconds} and max_answer_tokens make sequences of {longest} ids; "
            f"{limit}, or shorten them"
        )
    episode = round(ROOM * SLACK)
    if config.tasks.keys() & FEW_SHOT.keys() and episode > most:
        raise InputError(f"tasks: examples with shots are sequences of up to {episode} ids; {limit}, or leave them out")


def make_mixture(config: Pretraining, start: Start) -> Mixture:
    """The corpora as examples of the tasks. Raises InputError when one of them is none."""
    return Mixture(
        {str(folder): read_encoded([folder], "train", start.codec) for folder in config.corpora},
        start.vocabulary,
        start.text,
        list(config.tasks),
        config.max_audio_seconds,
        CodeNoise(config.code_noise, config.code_masking),
        {task: [*map(str, named)] for task, named in config.task_corpora.items()},
    )


def make_schedule(config: Pretraining, mixture: Mixture, world: int) -> Schedule:
    """Which examples each of ``world`` ranks sees when. Raises InputError when nothing has an answer for a task."""
    if missing := config.tasks.keys() - mixture.pools.keys():
        raise InputError(
            f"corpora: no utterance of up to max_audio_seconds = {config.max_audio_seconds} has an answer for "
            f"{', '.join(sorted(missing))}: leave it out of tasks, or add corpora"
        )
    own = {task: {str(f): weight for f, weight in named.items()} for task, named in config.task_corpora.items()}
    for task, named in own.items():
        if idle := named.keys() - mixture.pools[task].keys():
            raise InputError(f"task_corpora: {', '.join(sorted(idle))}: no answers for {task}: leave it out there")
    return Schedule(
        mixture.pools,
        config.tasks,
        config.batch_tokens,
        config.seed,
        world * config.grad_accum_steps,
        config.temperature,
        {str(folder): weight for folder, weight in config.corpora.items()},
        own,
        config.curriculum,
        config.short_first,
        config.questions,
    )
