"""A checkpoint is one folder that needs nothing outside itself.

lm/                   the Hugging Face causal LM (config.json, sharded safetensors)
codec/                the codec (config.json, model.safetensors)
text.model            the SentencePiece model; or tokenizer.json, where the LM brought a tokenizer of its own
speechllm.json        vocabulary, limits, and the fingerprint that ties the parts together
README.md             the model card
adapters/NAME/        adapters of the LM, if there are any, each in a folder of its own: see speechllm.adapter
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
import torch
from torch import Tensor
from transformers import PreTrainedModel

from speechllm.adapter import FOLDER as ADAPTERS
from speechllm.adapter import find_adapter, merge_adapter
from speechllm.checkpoint_settings import DEFAULT, SETTINGS, CheckpointSettings, read_settings
from speechllm.codec import Codec, copy_codec, load_codec
from speechllm.errors import InputError
from speechllm.folders import replaced
from speechllm.model import LOADING_ERRORS, load_model
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary

LM, CODEC, CARD = "lm", "codec", "README.md"
MAX_SHARD = "15MB"


@dataclass(frozen=True)
class Checkpoint:
    """Everything an answer needs, loaded and known to belong together."""

    lm: PreTrainedModel
    codec: Codec
    text: TextTokenizer
    vocabulary: Vocabulary
    settings: CheckpointSettings
    folder: Path

    def encode(self, wav: Tensor) -> Tensor:
        """``wav [1, samples]`` at ``codec.sample_rate`` to the codes the LM sees, ``[vocabulary.n_q, frames]``."""
        return self.codec.encode(wav, n_q=self.vocabulary.n_q)


def save_checkpoint(
    folder: Path,
    lm: PreTrainedModel,
    codec: str | Path,
    text: TextTokenizer,
    vocabulary: Vocabulary,
    *,
    name: str,
    max_audio_seconds: float,
    max_answer_tokens: int,
    tasks: Sequence[str],
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write all parts to ``folder``: the LM's weights as ``dtype``, in files of at most 15 MB; the codec as it is.

    The folder is replaced as a whole when all is written; a model card and adapters in it are kept. ``codec`` is what
    :func:`speechllm.codec.load_codec` opens; its weights become part of the checkpoint. ``weights`` are the LM's, where
    it does not hold them all itself (ZeRO 3, expert parallelism).
    """
    with replaced(folder) as new:
        given = lm.state_dict() if weights is None else weights
        tied = lm.get_expanded_tied_weights_keys(all_submodels=True)  # other names of a table: it is stored once
        state = {key: value.detach().to("cpu", dtype) for key, value in given.items() if key not in tied}
        lm.save_pretrained(new / LM, state_dict=state, max_shard_size=MAX_SHARD)
        config = new / LM / "config.json"  # which has the type of the weights in memory
        told = json.loads(config.read_text(encoding="utf-8")) | {"dtype": str(dtype).removeprefix("torch.")}
        config.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        codec_fingerprint = copy_codec(codec, new / CODEC).fingerprint(vocabulary.n_q)
        text.save(new / text.FILE)
        settings = CheckpointSettings(
            name=name,
            vocabulary=vocabulary.to_dict(),
            fingerprint=vocabulary.fingerprint(text.model_bytes),
            codec_fingerprint=codec_fingerprint,
            max_audio_seconds=max_audio_seconds,
            max_answer_tokens=max_answer_tokens,
            tasks=tuple(tasks),
        )
        (new / SETTINGS).write_text(settings.model_dump_json(indent=1) + "\n", encoding="utf-8")
        for file in (new / LM).iterdir():  # safetensors makes files that nobody else may read
            file.chmod((new / SETTINGS).stat().st_mode)
        if (folder / CARD).exists():
            shutil.copy(folder / CARD, new / CARD)
        if (folder / ADAPTERS).exists():  # refused until they are trained anew, but somebody's own
            shutil.copytree(folder / ADAPTERS, new / ADAPTERS)


def load_checkpoint(
    folder: str | Path = DEFAULT, device: str | torch.device = "cpu", adapter: str | Path | None = None
) -> Checkpoint:
    """Read a checkpoint and check that its parts belong together.

    adapter: one to merge into the weights, a name in the checkpoint's ``adapters/`` or a folder; its tasks are added
    to the settings.

    Raises:
        InputError: the folder is not a checkpoint, a file is missing or damaged, or the parts do not fit, the adapter
            among them.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    try:
        vocabulary = Vocabulary.from_dict(settings.vocabulary)
    except InputError as error:
        raise InputError(f"{folder / SETTINGS}: {error}") from error
    text = TextTokenizer.load(folder)
    codec = load_codec(folder / CODEC)
    if not (folder / LM / "config.json").is_file():  # transformers would take the path for a name on the hub
        raise InputError(f"{folder / LM}: holds no language model (no config.json)")
    try:
        lm = load_model(folder / LM, device)
    except LOADING_ERRORS as error:
        raise InputError(f"{folder / LM}: the language model cannot be loaded: {str(error).splitlines()[0]}") from error
    for fits, message in (
        (
            settings.fingerprint == vocabulary.fingerprint(text.model_bytes),
            f"{text.FILE} is not the one it was trained with",
        ),
        (
            text.size <= vocabulary.text_size,  # fewer where the LM's table has rows to spare
            f"{text.FILE} has {text.size} pieces, the vocabulary {vocabulary.text_size}",
        ),
        (codec.card == vocabulary.card, f"the codec has {codec.card} codes, the vocabulary {vocabulary.card}"),
        (codec.n_q >= vocabulary.n_q, f"the codec has {codec.n_q} codebooks, the vocabulary {vocabulary.n_q}"),
        (
            lm.config.vocab_size == vocabulary.size,
            f"the language model has {lm.config.vocab_size} ids, the vocabulary {vocabulary.size}",
        ),
        (
            settings.codec_fingerprint == codec.fingerprint(vocabulary.n_q),
            f"{CODEC} is not the codec whose codes it was trained on",
        ),
    ):
        if not fits:
            raise InputError(f"{folder}: its parts do not belong together: {message}")
    if adapter is not None:
        added = merge_adapter(lm, folder / LM, settings.fingerprint, find_adapter(folder, adapter))
        tasks = tuple(dict.fromkeys(settings.tasks + added.tasks))
        settings = settings.model_copy(update={"name": f"{settings.name} + {added.name}", "tasks": tasks})
    return Checkpoint(lm, codec, text, vocabulary, settings, folder)
