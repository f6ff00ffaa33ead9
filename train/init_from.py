"""Begin with somebody else's causal LM: its weights, its sizes, and its text tokenizer."""

from __future__ import annotations

from pathlib import Path

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from speechllm.codec.huggingface import is_hub_name
from speechllm.errors import InputError
from speechllm.model import LOADING_ERRORS, experts, load_model
from speechllm.text import HuggingFaceTokenizer, TextTokenizer

LENGTH = 4  # positions of each of two sequences that tell how an LM reads


def open_lm(source: str, ctc_layer: int) -> tuple[PreTrainedModel, TextTokenizer]:
    """The causal LM at ``source``, a folder or a name on the hub, in float32 and in training mode, and its tokenizer.

    Raises:
        InputError: files are missing or damaged, it is none that training here can use, or its tokenizer loses texts.
    """
    if not Path(source).is_dir() and not is_hub_name(source):
        raise InputError(f"init_from: {source}: no such folder, and no name on the hub (org/name)")
    try:
        cached_file(source, "config.json")
        lm = load_model(source)
    except LOADING_ERRORS as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(
            f"init_from: {source}: no causal LM can be had there ({reason}): give a whole folder with config.json and "
            "safetensors, or download one where there is a network (hf download NAME --local-dir DIR)"
        ) from error
    if problem := unfit(lm):
        raise InputError(f"init_from: {source}: {problem}: take another LM")
    if ctc_layer > (layers := lm.config.num_hidden_layers):
        raise InputError(f"ctc_layer = {ctc_layer} exceeds the {layers} layers of init_from: {source}: lower it")
    try:
        file = cached_file(source, HuggingFaceTokenizer.FILE)
        text = TextTokenizer.load(str(file))
    except OSError as error:
        raise InputError(
            f"init_from: {source}: holds no {HuggingFaceTokenizer.FILE}: write it with "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        ) from error
    except InputError as error:
        raise InputError(f"init_from: {error}") from error
    if text.size > lm.config.vocab_size:
        raise InputError(
            f"init_from: {source}: its tokenizer has {text.size} ids, its model {lm.config.vocab_size}: they do not "
            "belong together"
        )
    return lm.train(), text


@torch.inference_mode()
def unfit(lm: PreTrainedModel) -> str | None:
    """Why an LM in evaluation mode cannot be trained and asked as a SpeechLLM; None when it can."""
    for name in ("vocab_size", "max_position_embeddings", "num_hidden_layers", "hidden_size"):
        if not isinstance(getattr(lm.config, name, None), int):
            return f"its config has no {name}"
    positions = torch.arange(LENGTH)[None]
    ids = torch.arange(2 * LENGTH)[None] % lm.config.vocab_size
    first, second = ids.split(LENGTH, 1)
    router = {"output_router_logits": True} if experts(lm.config) else {}

    def read(ids: Tensor, positions: Tensor) -> Tensor:
        states: Tensor = lm.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        return states  # [1, seq, hidden]

    alone = read(first, positions)
    packed = read(ids, positions.repeat(1, 2))
    if not alike(alone[:, :-1], read(first[:, :-1], positions[:, :-1])):
        return "not causal, what it makes of a position depends on later ones"
    if not alike(packed[:, LENGTH:], read(second, positions)):
        return "sequences that are packed into one row see one another"
    if not alike(lm(input_ids=first, position_ids=positions).logits, lm.get_output_embeddings()(alone)):
        return "its logits are scaled or capped, which training would leave out"
    output = lm.base_model(input_ids=first, position_ids=positions, use_cache=False, **router)
    if router and not getattr(output, "router_logits", None):
        return "it does not give the logits of its router, so its experts cannot be balanced"
    return None


def alike(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding."""
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
