"""Begin with the weights of an earlier checkpoint: more tasks, more codebooks, more experts, or another corpus."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from speechllm.checkpoint import load_checkpoint
from speechllm.codec import Codec
from speechllm.errors import InputError
from speechllm.model import experts
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary

HEADS = ("num_attention_heads", "num_key_value_heads")  # the weights' shapes do not tell


@torch.no_grad()
def start_from(folder: Path, lm: PreTrainedModel, vocabulary: Vocabulary, text: TextTokenizer, codec: Codec) -> None:
    """Copy into ``lm`` the weights of the checkpoint in ``folder``; ids that it does not have stay as they are.

    Where that has one feed-forward network in each layer, all experts begin as it (sparse upcycling, Komatsuzaki et al.
    2023): since an id's shares of its experts add up to 1, the model answers as the dense one at first, and the new
    router, whose weights stay as they are, makes them differ.

    Raises:
        InputError: the folder is not a checkpoint, or its model, text model or codebooks are others.
    """
    try:
        older = load_checkpoint(folder)
    except InputError as error:
        raise InputError(f"start_from: {error}") from error
    n_q = min(vocabulary.n_q, older.vocabulary.n_q)
    if older.text.model_bytes != text.model_bytes:
        raise InputError(f"start_from: {folder} was trained with another text model: name it as text_model")
    if older.vocabulary.card != vocabulary.card or older.codec.fingerprint(n_q) != codec.fingerprint(n_q):
        raise InputError(f"start_from: {folder} was trained with another codec: name its codec/ as codec")
    mine, theirs = lm.state_dict(), older.lm.state_dict()
    tables = {name for name in mine if name.endswith(("embed_tokens.weight", "lm_head.weight"))}
    bodies = {name: tensor for name, tensor in theirs.items() if name not in tables}
    if (experts(older.lm.config) or (0,))[0] == 1:
        bodies = {name: upcycled(name, tensor, mine.get(name, tensor)) for name, tensor in bodies.items()}
    shapes = {name: tensor.shape for name, tensor in mine.items() if name not in tables}
    if shapes != {name: tensor.shape for name, tensor in bodies.items()} or any(
        getattr(lm.config, name) != getattr(older.lm.config, name) for name in HEADS
    ):
        raise InputError(f"start_from: {folder} holds a model of another size: give it the settings of model:")
    lm.load_state_dict(bodies, strict=False)
    here, there = vocabulary.shared_ids(older.vocabulary)
    for name in tables:
        mine[name][here] = theirs[name][there].to(mine[name])


def upcycled(name: str, dense: Tensor, own: Tensor) -> Tensor:
    """A layer's weights of a model with one expert as those of one with as many as ``own``, if it is of experts."""
    if name.endswith(".gate.weight"):
        return own
    return dense.expand(len(own), *dense.shape[1:]) if ".experts." in name else dense
