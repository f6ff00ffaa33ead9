"""What a model takes: parameters, bytes of a GPU, FLOPs. Formulas, with their sources.

The model is made on PyTorch's meta device, so nothing of its size is allocated, and no corpus is opened. Memory is a
sum, not a peak: activations are gone when the optimizer steps, which leaves room for what is not counted (gradients of
activations, work space of kernels).
"""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from speechllm.codec import load_codec
from speechllm.errors import InputError
from speechllm.model import experts, make_model, parameter_counts
from speechllm.text import TextTokenizer
from train.balance import make_balance
from train.engine import on_machine
from train.objective import Objective
from train.pretrain_config import Pretraining

# 10^12 FLOP/s in dense bf16, from the makers' data sheets, by words of a device's name; the first that fits counts
PEAKS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A40": 150.0,
    "A10": 125.0,
    "MI300X": 1307.0,
}


@dataclass(frozen=True, eq=False)
class Sizes:
    """What the plan needs to know of a model.

    lm: without weights. total, active: its parameters. dense, in_experts: trained parameters outside of the experts,
    with the CTC head, and in them. outputs: what a position is scored on, ids and text pieces of the CTC head.
    ids_per_second: of audio; with merge_repeats at most so many.
    """

    lm: PreTrainedModel
    total: int
    active: int
    dense: int
    in_experts: int
    outputs: int
    ids_per_second: float


@dataclass(frozen=True)
class Speed:
    """What model FLOPs utilization is measured by (Chowdhery et al. 2022, appendix B).

    parameters: FLOPs of an id. attention: FLOPs of an id for each id of its sequence. peak: FLOP/s of the device.
    """

    parameters: float
    attention: float
    peak: float

    def least_seconds(self, lengths: Tensor) -> float:
        """That the device needs for training on sequences of ``lengths [sequences]`` ids, at its peak."""
        ids, pairs = int(lengths.sum()), int(lengths.square().sum())
        return (self.parameters * ids + self.attention * pairs) / self.peak


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU. communication: a bucket of gradients, and the weights that ZeRO 3 gathers."""

    weights: float
    gradients: float
    optimizer: float
    communication: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """Bytes of all of it."""
        return float(sum(astuple(self)))


def model_sizes(config: Pretraining) -> Sizes:
    """Make the model of ``config`` without weights.

    Raises:
        InputError: text model, codec, or the config of ``init_from`` cannot be read.
    """
    base = _lm_config(config.init_from) if config.init_from else None
    text_size = base.vocab_size if base else TextTokenizer.load(config.text_model).size
    codec = load_codec(config.codec)
    vocabulary = config.vocabulary(text_size, codec)
    with torch.device("meta"):
        if base:
            base.vocab_size = vocabulary.size
            lm: PreTrainedModel = AutoModelForCausalLM.from_config(base)
        else:
            lm = make_model(config.model, vocabulary.size, vocabulary.pad, vocabulary.end)
        balance = make_balance(config.balance, list(config.tasks), config.seed)
        objective = Objective(lm, vocabulary, balance, config.ctc_layer, config.ctc_weight, config.aux_weight)
    in_experts = sum(p.numel() for name, p in objective.named_parameters() if ".experts." in name)
    total, active = parameter_counts(lm)
    return Sizes(
        lm=lm,
        total=total,
        active=active,
        dense=sum(p.numel() for p in objective.parameters()) - in_experts,
        in_experts=in_experts,
        outputs=vocabulary.size + (text_size + 1 if config.ctc_weight else 0),
        ids_per_second=vocabulary.ids_per_second(codec.frame_rate),
    )


def _lm_config(source: str) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(f"init_from: {source}: no config of a causal LM can be had there ({reason})") from error
    return config


def value_bytes(config: Pretraining) -> int:
    """Of a weight, a gradient, an activation; a run on GPUs is in bf16 unless it is told not to be."""
    return 4 if config.bf16 is False else 2


def states(config: Pretraining, sizes: Sizes, ranks: int) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer that a rank holds, on its GPU or on the host.

    Rajbhandari et al. 2020 (ZeRO, section 3.1): 2 bytes a parameter for weights in bf16, 12 for Adam (weights, mean and
    variance in float32). Gradients are added up in float32, 4 bytes; DeepSpeed copies them when it steps, but not those
    of bf16 in stages 1 and 2. Stages 1, 2 and 3 divide optimizer, gradients and weights by the ranks that hold the same
    parameters: by all of them, of the experts by one in ``expert_parallel``.
    """
    config = on_machine(config, gpu=True)
    width = value_bytes(config)
    adam = 12 if config.bf16 and config.zero_stage < 3 else 16
    if not config.zero_stage:  # nor has float32 without ZeRO second weights
        adam = 8

    def held(stage: int) -> float:
        """Parameters of a rank when ZeRO divides from ``stage`` on."""
        copies, expert_copies = (ranks, ranks / config.expert_parallel) if config.zero_stage >= stage else (1, 1)
        return sizes.dense / copies + sizes.in_experts / config.expert_parallel / expert_copies

    return width * held(3), 4 * held(2), adam * held(1)


def activations(lm: PreTrainedConfig, tokens: float, width: int, checkpointing: bool) -> float:
    """Bytes kept for the backward pass of ``tokens`` ids, values being of ``width`` bytes.

    After Korthikanti et al. 2022 (Reducing Activation Recomputation, section 4), for what transformers' Mixtral keeps
    of a layer: the inputs of both norms in float32; what norms, attention and the layer give, and the norms' result
    before it is scaled; q, k, v; and of each of ``top_k`` experts its input, its output and four vectors of its inner
    size. Attention keeps nothing else, it is computed anew (Dao et al. 2022, FlashAttention). With checkpointing the
    input of each layer is kept, and one layer at a time is computed again.
    """
    hidden, head = lm.hidden_size, _head_size(lm)
    keys = (getattr(lm, "num_key_value_heads", None) or lm.num_attention_heads) * head
    inner = getattr(lm, "moe_intermediate_size", None) or getattr(lm, "intermediate_size", None) or 4 * hidden
    _, top_k = experts(lm) or (1, 1)
    attention = 2 * (lm.num_attention_heads * head + keys)
    layer = tokens * (2 * hidden * 4 + width * (5 * hidden + attention + top_k * (2 * hidden + 4 * inner)))
    if checkpointing:
        return float(lm.num_hidden_layers * tokens * hidden * width + layer)
    return float(lm.num_hidden_layers * layer)


def _head_size(lm: PreTrainedConfig) -> int:
    return int(getattr(lm, "head_dim", None) or lm.hidden_size // lm.num_attention_heads)


def memory(config: Pretraining, sizes: Sizes, ranks: int) -> Memory:
    """Memory of each of ``ranks`` GPUs; what ZeRO divides lies on the host with ``offload``."""
    config = on_machine(config, gpu=True)
    width, zero = value_bytes(config), DeepSpeedZeroConfig()
    here = sizes.dense + sizes.in_experts / config.expert_parallel
    bucket = zero.reduce_bucket_size if config.zero_stage else min(here, zero.reduce_bucket_size)
    gathered = min(here, zero.max_live_parameters) if config.zero_stage == 3 else 0
    weights, gradients, optimizer = (
        0.0 if config.offload and config.zero_stage >= stage else size
        for size, stage in zip(states(config, sizes, ranks), (3, 2, 1), strict=True)
    )
    bucket_bytes = width + 4 if config.bf16 and config.zero_stage > 1 else 4  # what is sent is float32, too
    return Memory(
        weights,
        gradients,
        optimizer,
        communication=bucket_bytes * bucket + width * gathered,
        activations=activations(sizes.lm.config, config.batch_tokens, width, config.activation_checkpointing),
        # log-probabilities, their gradient and that of the logits, in float32, were all positions scored
        logits=12 * sizes.outputs * config.batch_tokens,
    )


def flops_per_id(lm: PreTrainedConfig, active: int, row: float) -> tuple[float, float]:
    """FLOPs of training on one id of a row of ``row`` ids: those of parameters, and those of attention.

    6 for each active parameter: 2 forward, 4 backward (Kaplan et al. 2020, section 2.1; Hoffmann et al. 2022 use the
    same 6 N D). Attention: three times the 2 · layers · row · width of Kaplan's table 1.
    """
    width = lm.num_attention_heads * _head_size(lm)
    return 6.0 * active, 6.0 * lm.num_hidden_layers * row * width


def speed_of(lm: PreTrainedConfig, active: int, device: str) -> Speed | None:
    """Of a model with ``active`` parameters for each id, on a device of that name; None where its peak is not known."""
    words = set(re.findall(r"\w+", device))
    if "MIG" in words:  # a part of a GPU
        return None
    for name, tflops in PEAKS.items():
        if words.issuperset(name.split()):
            return Speed(*flops_per_id(lm, active, 1), tflops * 1e12)
    return None
