"""The backbone: a Hugging Face causal LM, a small Mixtral by default. Knows nothing of tokenizers, codecs or data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.utils import is_flash_attn_2_available

from speechllm.errors import InputError

# what transformers raises of files that are missing, damaged, or none of a causal LM
LOADING_ERRORS = (OSError, ValueError, RuntimeError, TypeError, ImportError, SafetensorError, StrictDataclassError)

Attention = Literal["flash_attention_2", "sdpa", "eager"]  # implementations, as transformers calls them
FLASH, SDPA, _ = get_args(Attention)


class ModelConfig(BaseModel):
    """Sizes of a Mixtral (Jiang et al. 2024): ``top_k`` of ``num_experts`` feed-forward networks see each position."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden_size: int = Field(256, ge=8)
    num_layers: int = Field(5, ge=1)
    num_heads: int = Field(4, ge=1)
    num_kv_heads: int = Field(2, ge=1)
    expert_size: int = Field(256, ge=8, description="inner size of one expert")
    num_experts: int = Field(8, ge=1)
    top_k: int = Field(2, ge=1)
    max_positions: int = Field(2048, ge=16)
    rope_theta: float = Field(10000.0, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError("num_heads must divide hidden_size, and num_kv_heads must divide num_heads")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k = {self.top_k} exceeds num_experts = {self.num_experts}")
        return self


def make_model(config: ModelConfig, vocabulary_size: int, pad_id: int, end_id: int) -> MixtralForCausalLM:
    """A new Mixtral with random weights and one table for input and output embeddings."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=vocabulary_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.expert_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            num_local_experts=config.num_experts,
            num_experts_per_tok=config.top_k,
            max_position_embeddings=config.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            pad_token_id=pad_id,
            bos_token_id=None,
            eos_token_id=end_id,
        )
    )


@torch.no_grad()
def extend_model(model: PreTrainedModel, size: int, pad_id: int, end_id: int, seed: int = 0) -> None:
    """Give a language model ids up to ``size``, ``pad_id`` and ``end_id`` among them; its own rows stay bit for bit.

    The new rows are drawn with mean and spread of its own ones, those of an output table that is not tied too; new
    biases of the output are the mean of the others.
    """
    own = len(_tables(model)[0])
    model.resize_token_embeddings(size, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    for table in _tables(model):
        mean, spread = _mean_and_spread(table[:own])
        table[own:] = mean + spread * torch.randn(size - own, table.shape[1], generator=generator)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        bias[own:] = bias[:own].mean()
    for settings in (model.config, model.generation_config):
        settings.pad_token_id, settings.bos_token_id, settings.eos_token_id = pad_id, None, end_id


@torch.no_grad()
def set_embedding_rows(model: PreTrainedModel, first: int, vectors: Tensor, seed: int = 0, own: int = 0) -> None:
    """Start the embeddings of ids ``first …`` from ``vectors [rows, dim]``, so that alike vectors have alike rows.

    A fixed random projection takes ``dim`` to the hidden size; mean and spread of the rows become those of the table:
    of its first ``own`` rows, or where there are none yet, of a new one. An output table that is not tied is set too.
    """
    centred = vectors.float() - vectors.float().mean(0)
    for table in _tables(model):
        generator = torch.Generator().manual_seed(seed)
        rows = centred @ torch.randn(vectors.shape[1], table.shape[1], generator=generator)
        mean, spread = _mean_and_spread(table[:own]) if own else (0.0, model.config.initializer_range)
        table[first : first + len(rows)] = (mean + rows / rows.std() * spread).to(table)


def _tables(model: PreTrainedModel) -> list[Tensor]:
    """The embeddings ``[ids, hidden]``, and the output's where they are not the same."""
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert isinstance(inputs, Tensor) and isinstance(outputs, Tensor)
    return [inputs] if outputs is inputs else [inputs, outputs]


def _mean_and_spread(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of each dimension, both ``[hidden]``."""
    return rows.mean(0), rows.std(0)


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> PreTrainedModel:
    """Any Hugging Face causal LM saved in ``folder``, in evaluation mode; float32 on CPUs, else as it was saved.

    Its attention is the best there is for this, see :func:`choose_attention`.

    Raises:
        LOADING_ERRORS: a file is missing or damaged, or a weight is not in the files.
    """
    dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=SDPA,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    lm, report = loaded
    if report["missing_keys"]:  # transformers fills them with random numbers
        raise ValueError(f"no weights for {', '.join(sorted(report['missing_keys']))}")
    lm.to(device).eval()
    assert isinstance(lm, PreTrainedModel)
    lm.set_attn_implementation(choose_attention(lm, lm.device, lm.dtype))
    return lm


def choose_attention(
    lm: PreTrainedModel,
    device: torch.device,
    dtype: torch.dtype,
    wanted: Attention | None = None,
    flash_attn: bool | None = None,
) -> Attention:
    """The implementation of attention for an LM that computes in ``dtype`` on ``device``: ``wanted``, else the best.

    That is FlashAttention (Dao 2023) where the package flash-attn is installed and the LM computes in half precision
    on a GPU. An LM whose attention is not the one that most of transformers share does not get it: it might not be
    told which sequences share a row.

    flash_attn: whether that package can be used; looked up when None.

    Raises:
        InputError: FlashAttention is wanted and cannot be had.
    """
    installed = is_flash_attn_2_available() if flash_attn is None else flash_attn
    lacks = {
        "the package flash-attn (pip install --no-build-isolation -e '.[gpu]')": installed,
        "a GPU": device.type == "cuda",
        "bf16": dtype in (torch.bfloat16, torch.float16),
        f"another LM than {lm.config.model_type}": lm._supports_flash_attn and lm._supports_attention_backend,
    }
    missing = [what for what, there in lacks.items() if not there]
    if wanted == FLASH and missing:
        raise InputError(f"attn_implementation: {FLASH} needs {' and '.join(missing)}: or leave the setting out")
    return wanted or (SDPA if missing else FLASH)


def keep_apart(lm: PreTrainedModel, position_ids: Tensor, several_ends: bool = False) -> dict[str, Any]:
    """What ``lm`` must be called with, beside ``position_ids [B, seq]``, for the sequences of a row not to see others.

    FlashAttention is told by positions in a batch of one row alone, and reads them anew in each layer; where sequences
    begin is right for any number of rows. Padding (0) is then a sequence of each position. For other implementations
    positions that begin anew are enough.

    several_ends: of one sequence, see :class:`speechllm.prompt.Batch`; only PyTorch's own attention can do that, told
    by a mask.
    """
    if several_ends:
        assert lm.config._attn_implementation == SDPA, "several ends of a sequence need a mask"
        return {"attention_mask": seen(position_ids)}
    if lm.config._attn_implementation != FLASH:
        return {}
    (begins, _), (longest, _) = prepare_fa_kwargs_from_position_ids(position_ids)
    most = int(longest)
    return {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": most, "max_length_k": most}


def seen(position_ids: Tensor) -> Tensor:
    """Which positions each of ``position_ids [B, seq]`` attends to, bool [B, 1, seq, seq]; see
    :class:`speechllm.prompt.Batch`.
    """
    places = torch.arange(position_ids.shape[1], device=position_ids.device)
    anew = F.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0), value=True)
    end = torch.where(anew, places, 0).cummax(1).values  # where its end of the sequence begins
    start = torch.where(position_ids == 0, places, 0).cummax(1).values  # and the sequence
    shared = position_ids.gather(1, end)
    start, end, shared = (value[..., None] for value in (start, end, shared))
    own = (places >= end) & (places <= places[:, None])
    return (own | ((places >= start) & (places < start + shared)))[:, None]


def experts(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Feed-forward networks in a layer, and how many of them see each position (``top_k``); None for a dense model."""
    number = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    top_k = getattr(config, "num_experts_per_tok", None)
    return (number, top_k) if number and top_k else None


def parameter_counts(model: PreTrainedModel) -> tuple[int, int]:
    """Parameters in all, and those that one position uses (``top_k`` of the experts)."""
    total = sum(p.numel() for p in model.parameters())
    in_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    number, top_k = experts(model.config) or (1, 1)
    return total, total - in_experts + in_experts * top_k // number
