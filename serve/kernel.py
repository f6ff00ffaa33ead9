"""The compiled decoding step of a Mixtral on a CPU, ``kernel.cpp``: built once a machine, its weights laid out here."""

from __future__ import annotations

import copy
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

SOURCE = Path(__file__).with_name("kernel.cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")
LANES = 16  # numbers worked on at once: sizes divide by it

Quantization = Literal["int8"]


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("scale", ctypes.c_void_p),
        ("rows", ctypes.c_int32), ("columns", ctypes.c_int32), ("type", ctypes.c_int32),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (
        ("attention_norm", ctypes.c_void_p), ("expert_norm", ctypes.c_void_p),
        ("qkv", _Matrix), ("output", _Matrix), ("router", _Matrix),
        ("gate_up", ctypes.POINTER(_Matrix)), ("down", ctypes.POINTER(_Matrix)),
        ("keys", ctypes.c_void_p), ("values", ctypes.c_void_p),
    )  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("embeddings", ctypes.c_void_p), ("norm", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p), ("sines", ctypes.c_void_p),
        ("head", _Matrix),
        ("num_layers", ctypes.c_int32), ("hidden", ctypes.c_int32), ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32), ("head_dim", ctypes.c_int32), ("experts", ctypes.c_int32),
        ("top_k", ctypes.c_int32), ("positions", ctypes.c_int32), ("epsilon", ctypes.c_float),
    )  # fmt: skip


def fits(lm: PreTrainedModel) -> bool:
    """Whether the kernel computes what this LM does: a Mixtral in float32 on a CPU, and a compiler is there."""
    config = lm.config
    if config.model_type != "mixtral" or lm.device.type != "cpu" or lm.dtype != torch.float32:
        return False
    sizes = (config.hidden_size, config.intermediate_size, head_dim(lm))
    whole = getattr(config, "partial_rotary_factor", None) in (None, 1.0)
    plain = whole and config.hidden_act == "silu" and not any(size % LANES for size in sizes)
    return plain and config.rope_parameters["rope_type"] == "default" and build() is not None


def head_dim(lm: PreTrainedModel) -> int:
    """Size of one attention head."""
    return getattr(lm.config, "head_dim", None) or lm.config.hidden_size // lm.config.num_attention_heads


class Kernel:
    """One Mixtral's weights as the kernel reads them, and its key-value cache.

    Weights that bfloat16 holds exactly, as those of a checkpoint trained in it, are stored in it: same answers, half
    the reading. ``quantization="int8"`` stores each row as int8 with a scale; the router and the norms stay.

    keys, values: float32 ``[layers, slots, kv_heads, positions, head_dim]``, written by :meth:`step` and by prefill.
    """

    def __init__(self, lm: PreTrainedModel, keys: Tensor, values: Tensor, quantization: Quantization | None = None):
        config = lm.config
        model: Any = lm.base_model
        self._held: list[Any] = [keys, values]  # what the structs point to
        self._quantization = quantization
        library = build()
        assert library is not None
        self._step = library.step
        self._vocabulary = config.vocab_size
        positions = torch.arange(keys.shape[3])[None]
        cosines, sines = model.rotary_emb(model.embed_tokens.weight, positions)
        layers = [self._layer(layer, keys[number], values[number]) for number, layer in enumerate(model.layers)]
        array = (_Layer * len(layers))(*layers)
        self._held.append(array)
        self._model = _Model(
            layers=array,
            embeddings=self._pointer(model.embed_tokens.weight),
            norm=self._pointer(model.norm.weight),
            cosines=self._pointer(cosines[0]),
            sines=self._pointer(sines[0]),
            head=self._matrix(_head(lm)),
            num_layers=len(layers),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim(lm),
            experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            positions=keys.shape[3],
            epsilon=config.rms_norm_eps,
        )

    def step(self, ids: Sequence[int], slots: Sequence[int], lengths: Sequence[int], last: bool = False) -> Tensor:
        """Append an id to the sequence in each slot, which holds so many positions before; a slot may come again.

        Logits ``[ids, vocabulary]`` of what follows each; of the ``last`` alone ``[1, vocabulary]``.
        """
        count, wanted = len(ids), 1 if last else len(ids)
        logits = torch.empty(wanted, self._vocabulary)
        self._step(
            ctypes.byref(self._model),
            count,
            (ctypes.c_int64 * count)(*ids),
            (ctypes.c_int32 * count)(*slots),
            (ctypes.c_int32 * count)(*lengths),
            wanted,
            ctypes.c_void_p(logits.data_ptr()),
        )
        return logits

    def _layer(self, layer: Any, keys: Tensor, values: Tensor) -> _Layer:
        attention, experts = layer.self_attn, layer.mlp.experts
        qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        return _Layer(
            attention_norm=self._pointer(layer.input_layernorm.weight),
            expert_norm=self._pointer(layer.post_attention_layernorm.weight),
            qkv=self._matrix(qkv),
            output=self._matrix(attention.o_proj.weight),
            router=self._matrix(layer.mlp.gate.weight, exact=True),
            gate_up=self._matrices(experts.gate_up_proj),
            down=self._matrices(experts.down_proj),
            keys=self._pointer(keys),
            values=self._pointer(values),
        )

    def _matrices(self, weights: Tensor) -> Any:
        array = (_Matrix * len(weights))(*(self._matrix(weight) for weight in weights))
        self._held.append(array)
        return array

    def _matrix(self, weight: Tensor, exact: bool = False) -> _Matrix:
        rows, columns = weight.shape
        weight = weight.detach()
        if self._quantization == "int8" and not exact:
            whole, scale = quantize(weight)
            return _Matrix(self._pointer(whole), self._pointer(scale), rows, columns, 2)
        halves = weight.to(torch.bfloat16)
        if torch.equal(halves.float(), weight):
            return _Matrix(self._pointer(halves), None, rows, columns, 1)
        return _Matrix(self._pointer(weight), None, rows, columns, 0)

    def _pointer(self, tensor: Tensor) -> int:
        self._held.append(tensor.detach().contiguous())
        return self._held[-1].data_ptr()


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights ``[rows, columns]`` as int8 and a scale for each row, symmetric: ``whole * scale[:, None]``."""
    scale = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def _head(lm: PreTrainedModel) -> Tensor:
    """The output's table, ``[vocabulary, hidden]``."""
    table = lm.get_output_embeddings().weight
    assert isinstance(table, Tensor)
    return table


def dequantized(lm: PreTrainedModel) -> PreTrainedModel:
    """A copy of the LM with its weights rounded to what :func:`quantize` keeps of them; the norms and router stay."""
    lm = copy.deepcopy(lm)
    model: Any = lm.base_model
    tables = [_head(lm)]
    for layer in model.layers:
        attention, experts = layer.self_attn, layer.mlp.experts
        tables += [getattr(attention, f"{name}_proj").weight for name in "qkvo"]
        tables += [*experts.gate_up_proj, *experts.down_proj]
    with torch.no_grad():
        for table in tables:
            whole, scale = quantize(table)
            table.copy_(whole * scale[:, None])
    return lm


@cache
def build() -> ctypes.CDLL | None:
    """The kernel, compiled for this machine at the first call and kept under the user's cache; None where it cannot be.

    The file's name holds a hash of the source, the flags and the processor, so that none is used for another.
    """
    key = hashlib.sha256(SOURCE.read_bytes() + repr((FLAGS, _processor())).encode()).hexdigest()[:16]
    failures = (OSError, RuntimeError, subprocess.CalledProcessError)  # RuntimeError: there is no home
    with suppress(*failures):
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return _compiled(home / "speechllm" / f"kernel-{key}.so")
    # a home that cannot be written to: for this process alone
    with suppress(*failures), tempfile.TemporaryDirectory(prefix="speechllm-") as folder:
        return _compiled(Path(folder) / "kernel.so")
    return None


def _compiled(path: Path) -> ctypes.CDLL:
    """The kernel from a file, compiled where it is not there yet. Others may do the same at the same time."""
    if not path.exists():
        compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
        if compiler is None:
            raise FileNotFoundError("no C++ compiler")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            new = Path(folder) / path.name
            subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(new)], check=True, capture_output=True)
            new.replace(path)
    return ctypes.CDLL(str(path))


def _processor() -> str:
    """What the instructions depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
