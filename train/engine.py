"""DeepSpeed as a run uses it: its settings, experts spread over ranks, and the weights in one piece."""

from __future__ import annotations

from typing import Any

import speechllm._torchaudio  # noqa: F401  # before transformers, whose models import torchaudio

# isort: split
import deepspeed
import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.module_inject.auto_ep_presets.registry import available_preset_names, get_preset
from deepspeed.runtime.zero import GatheredParameters
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel
from transformers.utils import output_capturing

from speechllm.errors import InputError
from speechllm.model import choose_attention, experts
from train.pretrain_config import Pretraining
from train.ranks import forget_shared_memory
from train.state import RunState


def on_machine(config: Pretraining, gpu: bool) -> Pretraining:
    """The settings with what is left to the machine: ``bf16``, and with it ZeRO 1 at least.

    Without ZeRO DeepSpeed adds up the gradients of micro batches in bf16, and starts Adam with a step on zeros.
    """
    bf16 = gpu if config.bf16 is None else config.bf16
    return config.model_copy(update={"bf16": bf16, "zero_stage": max(config.zero_stage, int(bf16))})


def deepspeed_settings(config: Pretraining, gpu: bool, universal: bool) -> dict[str, Any]:
    """The dictionary DeepSpeed takes. Batches are measured in tokens, so its own batch size is nominal.

    config: of :func:`on_machine`.
    universal: what is resumed was saved by another number of ranks, and made universal.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if config.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    torch_adam = not (gpu and config.offload)  # DeepSpeed's own Adam for CPUs is compiled for minutes
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.grad_accum_steps,
        "gradient_clipping": 1.0,
        "optimizer": {  # made by DeepSpeed, which knows by then which parameters are experts of this rank alone
            "type": "AdamW",
            "params": {
                "lr": config.learning_rate,
                "betas": [0.9, 0.98],
                "weight_decay": config.weight_decay,
                "torch_adam": torch_adam,
                **({"fused": True} if torch_adam else {}),  # one pass over the weights: a fifth of the time on CPUs
            },
        },
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": gpu,
        "bf16": {"enabled": config.bf16, "immediate_grad_update": True},  # not held in bf16 beside their sums
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "checkpoint": {"load_universal": universal},
        "steps_per_print": 10**9,
    }


def start_engine(
    objective: nn.Module, lm: PreTrainedModel, config: Pretraining, state: RunState
) -> deepspeed.DeepSpeedEngine:
    """Wrap ``objective``, which holds ``lm``, so that ``state`` can be loaded.

    Raises:
        InputError: the experts cannot be spread over ``expert_parallel`` ranks, or ``state`` does not allow it; or
            ``attn_implementation`` cannot be had.
    """
    gpu = torch.cuda.is_available()
    settings = deepspeed_settings(config, gpu, state.universal)
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    device = torch.device("cuda" if gpu else "cpu")
    lm.set_attn_implementation(choose_attention(lm, device, dtype, config.attention))
    if state.spread:
        check_expert_parallel(lm, config.expert_parallel, state.layout.world)
        kind, name = lm.config.model_type, next(name for name, module in objective.named_modules() if module is lm)
        settings["expert_parallel"] = {
            "enabled": True,
            "autoep_size": config.expert_parallel,
            "preset_model": kind,
            "moe_layer_pattern": rf"{name}\.{get_preset(kind).moe_layer_pattern}",  # matched from the start
        }
        # other modules hold the registry itself, so it changes its class
        output_capturing._CAN_RECORD_REGISTRY.__class__ = _Registry
    if config.activation_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [p for p in objective.parameters() if p.requires_grad]
    engine: deepspeed.DeepSpeedEngine = deepspeed.initialize(
        model=objective, model_parameters=parameters, config=settings
    )[0]
    forget_shared_memory()
    layers = [layer for layer in lm.modules() if isinstance(layer, AutoEPMoELayer)]
    if any(layer.shared_experts is not None for layer in layers):  # which whole_state does not gather
        raise InputError(f"expert_parallel: {lm.config.model_type} has experts that see every position: set it to 1")
    return engine


def check_expert_parallel(lm: PreTrainedModel, size: int, world: int) -> None:
    """Raises InputError when the LM's experts cannot be spread over groups of ``size`` out of ``world`` ranks."""
    number = experts(lm.config)
    if lm.config.model_type not in available_preset_names() or number is None:
        known = ", ".join(available_preset_names())
        raise InputError(f"expert_parallel: DeepSpeed spreads experts of {known}, not of {lm.config.model_type}: set 1")
    if world % size or number[0] % size:
        raise InputError(
            f"expert_parallel = {size} must divide the number of ranks ({world}) and of experts ({number[0]})"
        )


class _Registry(output_capturing._CanRecordRegistry):
    """What transformers records of a model: asked by model, as transformers does, or by name, as AutoEP 0.19 does."""

    @staticmethod
    def key(model: Any) -> str:
        return model if isinstance(model, str) else str(model.__class__)

    def __setitem__(self, model: Any, recorded: dict | None) -> None:
        dict.__setitem__(self, self.key(model), recorded)

    def get(self, model: Any, default: Any = None) -> Any:
        return dict.get(self, self.key(model)) or ({} if default is None else default)


def device_name() -> str:
    """Of the GPU of this process; empty on CPUs."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def update(engine: deepspeed.DeepSpeedEngine) -> float:
    """Complete a step by ``engine.step()``. Returns the norm of its gradient before clipping, over all ranks.

    Weights may be spoilt when it is not finite.
    """
    assert engine.is_gradient_accumulation_boundary()
    if engine.zero_optimization():  # ZeRO's optimizers keep the norm, a plain one does not
        engine.step()
        return float(engine.get_global_grad_norm())
    norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    return float(norm)


@torch.no_grad()
def whole_state(lm: PreTrainedModel, trained_only: bool = False) -> dict[str, Tensor]:
    """The LM's state in one piece, on the CPU of rank 0 under the names of its own class; nothing on other ranks.

    trained_only: without the parameters that are frozen.

    All ranks must call it: with ZeRO 3 and expert parallelism each holds a part. One module is gathered at a time.
    """
    state: dict[str, Tensor] = {}
    first = not distributed.is_initialized() or distributed.get_rank() == 0

    def keep(name: str, tensor: Tensor) -> None:
        if first:
            state[name] = tensor.detach().to("cpu", copy=True)

    def visit(module: nn.Module, prefix: str) -> None:
        parameters = module.named_parameters(recurse=False)
        own = {name: p for name, p in parameters if p.requires_grad or not trained_only}
        with GatheredParameters(list(own.values()), enabled=any(hasattr(p, "ds_id") for p in own.values())):
            for name, parameter in own.items():
                keep(prefix + name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                keep(prefix + name, buffer)
        for name, child in module.named_children():
            if isinstance(child, AutoEPMoELayer):
                for part, tensor in whole_experts(child).items():
                    keep(f"{prefix}{name}.{part}", tensor)
            else:
                visit(child, f"{prefix}{name}.")

    visit(lm, "")
    return state


def whole_experts(layer: AutoEPMoELayer) -> dict[str, Tensor]:
    """Router and experts of a layer that AutoEP has spread over ranks, as transformers stores them."""
    with GatheredParameters([layer.router.gate.weight], enabled=hasattr(layer.router.gate.weight, "ds_id")):
        gate = layer.router.gate.weight.detach().clone()
    local = [layer.experts.w1, layer.experts.w2, layer.experts.w3]  # [experts of this rank, out, in]
    with GatheredParameters(local, enabled=any(hasattr(p, "ds_id") for p in local)):
        w1, w2, w3 = (_over_ranks(weight, layer) for weight in local)
    return {"gate.weight": gate, "experts.gate_up_proj": torch.cat([w1, w3], dim=1), "experts.down_proj": w2}


def _over_ranks(weight: Tensor, layer: AutoEPMoELayer) -> Tensor:
    if layer.ep_size == 1:
        return weight.detach().clone()
    parts = [torch.empty_like(weight) for _ in range(layer.ep_size)]
    distributed.all_gather(parts, weight.detach().contiguous(), group=layer.ep_group)
    return torch.cat(parts)
