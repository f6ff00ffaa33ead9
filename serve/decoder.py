"""A language model with a static key-value cache of many sequences: prefill one, or decode one more id of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from serve.kernel import Kernel, Quantization, dequantized, fits, head_dim
from speechllm.errors import InputError
from speechllm.model import SDPA

MAX_POSITIONS = 8192  # of a sequence, where a model has more: each slot takes memory for all of its positions
SHORT = 64  # ids that the kernel takes in sooner than the model's own forward pass


class Decoder:
    """Slots hold sequences: ``lengths[slot]`` positions each, 0 to begin with.

    A Mixtral on a CPU is decoded by the compiled kernel, anything else by its own forward pass. Prompts always are.
    ``quantization`` rounds the weights for both: prompt and answer see the same model.

    Raises:
        InputError: the model's attention is not over all positions, or it cannot be quantized here.
    """

    def __init__(self, lm: PreTrainedModel, slots: int, quantization: Quantization | None = None):
        config = lm.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
            raise InputError(f"a {config.model_type} with windows of attention cannot be served: use one without")
        lm.set_attn_implementation(SDPA)  # others take no bool mask, or none at all
        self.positions = min(config.max_position_embeddings, MAX_POSITIONS)
        self.lengths = [0] * slots
        # transformers' generate of a Mixtral fails where it returns these
        self._options = {"output_router_logits": False} if hasattr(config, "output_router_logits") else {}
        compiled = fits(lm)
        if quantization and not compiled:
            raise InputError(
                f"--quantize {quantization}: only for a Mixtral on a CPU, with a C++ compiler (apt-get install g++)"
            )
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        shape = (config.num_hidden_layers, slots, heads, self.positions, head_dim(lm))
        self.keys, self.values = (_zeros(shape, lm) for _ in range(2))
        self._cache = _SlotCache(self.keys, self.values)
        self._lm = dequantized(lm) if quantization else lm
        self._kernel = Kernel(self._lm, self.keys, self.values, quantization) if compiled else None

    @property
    def compiled(self) -> bool:
        """Whether the kernel decodes."""
        return self._kernel is not None

    @torch.inference_mode()
    def prefill(self, slot: int, ids: Tensor) -> Tensor:
        """Append ``ids`` int64 ``[seq]`` to the sequence in a slot: logits ``[vocabulary]`` of the next one."""
        start = self.lengths[slot]
        end = start + len(ids)
        assert len(ids) > 0 and end <= self.positions
        if self._kernel is not None and len(ids) <= SHORT:
            self.lengths[slot] = end
            return self._kernel.step(ids.tolist(), [slot] * len(ids), range(start, end), last=True)[0]
        self._cache.slots, self._cache.starts, self._cache.end = [slot], [start], end
        mask = torch.ones(len(ids), end, dtype=torch.bool).tril(start)
        logits = self._forward(ids[None], torch.arange(start, end)[None], mask[None, None])
        self.lengths[slot] = end
        return logits[0]

    @torch.inference_mode()
    def step(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        """Append one id to the sequence in each slot: logits ``[slots, vocabulary]`` of the next ones."""
        lengths = [self.lengths[slot] for slot in slots]
        assert max(lengths) < self.positions
        if self._kernel is not None:
            logits = self._kernel.step(ids, slots, lengths)
        else:
            end = max(lengths) + 1
            self._cache.slots, self._cache.starts, self._cache.end = list(slots), lengths, end
            positions = torch.tensor(lengths)[:, None]
            mask = torch.arange(end) <= positions
            logits = self._forward(torch.tensor(ids)[:, None], positions, mask[:, None, None])
        for slot in slots:
            self.lengths[slot] += 1
        return logits

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Make the sequence in ``target`` the first ``length`` positions of that in ``source``, by default all."""
        length = self.lengths[source] if length is None else length
        assert length <= self.lengths[source]
        for cache in (self.keys, self.values):
            cache[:, target, :, :length] = cache[:, source, :, :length]
        self.lengths[target] = length

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        device = self._lm.device
        output: Any = self._lm(
            input_ids=ids.to(device),
            position_ids=positions.to(device),
            attention_mask=mask.to(device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **self._options,
        )
        return output.logits[:, -1].float()


def _zeros(shape: tuple[int, ...], lm: PreTrainedModel) -> Tensor:
    """In the LM's type, where it is. NumPy leaves to the system what is not written to: empty slots take no memory."""
    if lm.device.type == "cpu" and lm.dtype == torch.float32:
        return torch.from_numpy(np.zeros(shape, np.float32))
    return torch.zeros(shape, dtype=lm.dtype, device=lm.device)


class _SlotCache(Cache):
    """The slots that a forward pass is about, as transformers' models write and read them.

    ``slots`` and ``starts`` have an entry for each row of the batch: where it lies, and how many positions it holds;
    ``end`` is the length of the longest once the new ids are in. Rows of several slots have one new id each.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__(layers=[])  # its own are replaced by the slots
        self._keys, self._values = keys, values  # [layers, slots, heads, positions, head_dim]
        self.slots: list[int] = []
        self.starts: list[int] = []
        self.end = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions so far, ``[batch, heads, end, head_dim]``."""
        return (
            self._write(self._keys[layer_idx], key_states),
            self._write(self._values[layer_idx], value_states),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.end

    def _write(self, cache: Tensor, states: Tensor) -> Tensor:
        if len(self.slots) == 1:
            slot, start = self.slots[0], self.starts[0]
            cache[slot, :, start : self.end] = states[0]
            return cache[slot : slot + 1, :, : self.end]
        cache[self.slots, :, self.starts] = states[:, :, 0]
        return cache[self.slots, :, : self.end]
