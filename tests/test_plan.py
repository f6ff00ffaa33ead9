"""The plan of a run: parameters, memory and FLOPs against real models and sums by hand; the shipped configs; errors."""

import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TEXT_MODEL
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from speechllm.codec import load_codec
from speechllm.errors import InputError
from speechllm.model import ModelConfig, extend_model, make_model, parameter_counts
from speechllm.tasks import TASKS
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train import pretrain
from train.balance import make_balance
from train.config import read_config
from train.footprint import Sizes, activations, flops_per_id, memory, model_sizes, speed_of, states
from train.objective import Objective
from train.plan import GIB, Machine, Plan, named_ranks
from train.pretrain_config import Pretraining

CONFIGS = ROOT / "train" / "configs"
RANKS = {"small": 8, "base": 8, "large": 64}
TINY = ModelConfig(hidden_size=32, num_layers=2, expert_size=48, num_experts=4, top_k=2, max_positions=512)


def settings(**changes: Any) -> Pretraining:
    """A tiny run whose corpora are nowhere."""
    return Pretraining.model_validate(
        {
            "out": "nowhere",
            "corpora": {"nowhere": 1},
            "dev_corpora": [],
            "tasks": {"transcribe": 1},
            "text_model": TEXT_MODEL,
            "codec": ROOT / "tokenizers" / "codec",
            "model": TINY,
            "ctc_layer": 1,
            "steps": 10,
        }
        | changes
    )


@pytest.fixture(scope="module")
def tiny() -> Sizes:
    return model_sizes(settings())


@pytest.fixture(scope="module")
def round_sizes(tiny: Sizes) -> Sizes:
    """1000 parameters outside of experts and 8000 in them."""
    return replace(tiny, dense=1000, in_experts=8000)


def test_parameters_are_those_of_the_model_that_is_trained(tiny: Sizes) -> None:
    text, codec = TextTokenizer.load(TEXT_MODEL), load_codec(ROOT / "tokenizers" / "codec")
    vocabulary = Vocabulary(text.size, 1, codec.card, merge_repeats=True)
    lm = make_model(TINY, vocabulary.size, vocabulary.pad, vocabulary.end)
    objective = Objective(lm, vocabulary, make_balance(settings().balance, ["transcribe"], 0), 1, 0.3, 0.01)
    assert (tiny.total, tiny.active) == parameter_counts(lm)
    assert tiny.active < tiny.total
    assert tiny.dense + tiny.in_experts == sum(p.numel() for p in objective.parameters())
    assert tiny.in_experts == 2 * 4 * 3 * 32 * 48  # layers, experts, matrices
    assert tiny.outputs == vocabulary.size + text.size + 1
    assert model_sizes(settings(ctc_weight=0)).outputs == vocabulary.size
    assert all(p.is_meta for p in tiny.lm.parameters())


def test_parameters_of_an_lm_that_is_extended(tmp_path: Path) -> None:
    """Only its config is there."""
    config = Qwen3MoeConfig(
        vocab_size=90, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(tmp_path)
    plain = {name: value for name, value in settings().model_dump().items() if name not in ("model", "text_model")}
    sizes = model_sizes(Pretraining.model_validate(plain | {"init_from": str(tmp_path)}))
    vocabulary = Vocabulary(90, 1, 512, merge_repeats=True)
    built = Qwen3MoeForCausalLM(config)
    extend_model(built, vocabulary.size, vocabulary.pad, vocabulary.end)
    assert (sizes.total, sizes.active) == parameter_counts(built)
    assert sizes.in_experts == 2 * 4 * 3 * 32 * 16
    with pytest.raises(InputError, match=r"init_from: .*gone: no config of a causal LM can be had there"):
        model_sizes(Pretraining.model_validate(plain | {"init_from": str(tmp_path / "gone")}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"zero_stage": 0}, (2 * 9000, 4 * 9000, 12 * 1125)),  # bf16 takes stage 1 at least
        ({"zero_stage": 1}, (2 * 9000, 4 * 9000, 12 * 1125)),  # 9000 / 8
        ({"zero_stage": 2}, (2 * 9000, 4 * 1125, 12 * 1125)),
        ({"zero_stage": 3}, (2 * 1125, 4 * 1125, 16 * 1125)),
        # of the experts 8000 / 4, which two ranks hold
        ({"zero_stage": 1, "expert_parallel": 4}, (2 * 3000, 4 * 3000, 12 * (125 + 1000))),
        ({"zero_stage": 2, "expert_parallel": 8}, (2 * 2000, 4 * (125 + 1000), 12 * (125 + 1000))),
        ({"bf16": False}, (4 * 9000, 4 * 9000, 8 * 9000)),
        ({"bf16": False, "zero_stage": 2}, (4 * 9000, 4 * 1125, 16 * 1125)),
    ],
)
def test_states_of_each_rank(changes: dict[str, Any], expected: tuple[int, ...], round_sizes: Sizes) -> None:
    config = settings(**changes)
    assert states(config, round_sizes, ranks=8) == expected
    held = memory(config, round_sizes, ranks=8)
    assert (held.weights, held.gradients, held.optimizer) == expected
    if config.zero_stage:
        on_host = memory(config.model_copy(update={"offload": True}), round_sizes, ranks=8)
        stays = {1: expected[:2], 2: expected[:1], 3: ()}[config.zero_stage]
        assert astuple(on_host)[:3] == (*stays, *[0.0] * (3 - len(stays)))
        assert astuple(on_host)[3:] == astuple(held)[3:]


def test_communication(round_sizes: Sizes) -> None:
    """Buckets of DeepSpeed's defaults: 500 million gradients, and a billion weights that ZeRO 3 may gather."""
    big = replace(round_sizes, dense=10**9, in_experts=8 * 10**9)
    for bf16, stage, small, large in (
        (False, 0, 4 * 9000, 4 * 5e8),
        (False, 2, 4 * 5e8, 4 * 5e8),
        (True, 1, 4 * 5e8, 4 * 5e8),
        (True, 2, 6 * 5e8, 6 * 5e8),  # gradients in bf16, and in float32 as they are sent
        (True, 3, 6 * 5e8 + 2 * 9000, 6 * 5e8 + 2 * 1e9),
    ):
        config = settings(zero_stage=stage, bf16=bf16)
        assert memory(config, round_sizes, 8).communication == small
        assert memory(config, big, 8).communication == large
    spread = settings(zero_stage=3, expert_parallel=8)
    assert memory(spread, replace(big, dense=10**8, in_experts=8 * 10**8), 8).communication == 6 * 5e8 + 2 * 2e8


def test_states_are_those_that_deepspeed_estimates(round_sizes: Sizes) -> None:
    total = 9000
    _, on_gpu = estimate_zero2_model_states_mem_needs(total, num_gpus_per_node=8, cpu_offload=False)
    # DeepSpeed's has gradients in bf16 beside those in float32, into which ZeRO 2 adds them up
    assert sum(states(settings(zero_stage=2), round_sizes, 8)) == on_gpu - 2 * total / 8
    _, on_gpu, _ = estimate_zero3_model_states_mem_needs(total, 0, num_gpus_per_node=8, cpu_offload=False)
    # DeepSpeed's leaves out the sums of gradients that its stage 3 holds (grad_partitions_flat_buffer)
    assert sum(states(settings(zero_stage=3), round_sizes, 8)) == on_gpu + 4 * total / 8
    _, on_gpu = estimate_zero2_model_states_mem_needs(total, num_gpus_per_node=8, cpu_offload=True)
    assert sum(astuple(memory(settings(zero_stage=2, offload=True), round_sizes, 8))[:3]) == on_gpu


def kept_by_autograd(layers: int, tokens: int) -> int:
    """Bytes of the tensors that a Mixtral in bf16 keeps for its backward pass, weights left out."""
    config = ModelConfig(hidden_size=256, num_layers=layers, num_heads=8, num_kv_heads=2, expert_size=192, top_k=3)
    lm = make_model(config, 50, 0, 1).to(torch.bfloat16).train()
    own = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    kept: dict[int, Tensor] = {}  # by their storage, which several may share

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = lm.base_model(torch.arange(tokens)[None] % 50, use_cache=False, output_hidden_states=True)
    for tensor in output.hidden_states:
        keep(tensor)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


def test_activations_are_those_that_autograd_keeps() -> None:
    """Of one layer more: routing, a few numbers a position, is not counted."""
    config = ModelConfig(hidden_size=256, num_layers=1, num_heads=8, num_kv_heads=2, expert_size=192, top_k=3)
    lm = make_model(config, 50, 0, 1).config
    measured = kept_by_autograd(3, 128) - kept_by_autograd(2, 128)
    counted = activations(lm, 128, 2, checkpointing=False)
    assert counted == 128 * (2 * 256 * 4 + 2 * (5 * 256 + 2 * 256 + 2 * 64 + 3 * (2 * 256 + 4 * 192)))
    assert 0.96 * measured < counted < measured


def test_activations_with_checkpointing(tiny: Sizes) -> None:
    lm = tiny.lm.config
    both = activations(lm, 100, 2, checkpointing=False)
    assert activations(lm, 100, 2, checkpointing=True) == both / 2 + 2 * 100 * 32 * 2  # layers, ids, width, bytes
    config = settings(batch_tokens=100)
    assert memory(config, tiny, 1).activations == both
    assert memory(config, tiny, 1).logits == 12 * 100 * tiny.outputs


def test_flops(tiny: Sizes) -> None:
    assert flops_per_id(tiny.lm.config, tiny.active, row=500) == (6 * tiny.active, 6 * 2 * 500 * 32)


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40", None),
        ("Tesla V100-SXM2-16GB", None),
        ("", None),
    ],
)
def test_what_mfu_is_measured_by(tiny: Sizes, device: str, tflops: float | None) -> None:
    """Two sequences, by hand: what each id costs, and what it costs to look at each id of its own sequence."""
    speed = speed_of(tiny.lm.config, tiny.active, device)
    if tflops is None:
        assert speed is None
        return
    assert speed is not None
    flops = 6 * tiny.active * (500 + 40) + 6 * 2 * 32 * (500 * 500 + 40 * 40)
    assert speed.least_seconds(torch.tensor([500, 40])) == pytest.approx(flops / (tflops * 1e12))


def test_speed_and_days(tiny: Sizes) -> None:
    config = settings(batch_tokens=1000, grad_accum_steps=3, steps=10, row_length=1, max_audio_seconds=20)
    plan = Plan(config, tiny, Machine(ranks=4, tflops=100, mfu=0.5), hours=1)
    assert plan.epoch_ids == 3600 * 25
    assert plan.run_ids == 4 * 1000 * 3 * 10
    speed = 4 * 100e12 * 0.5 / (6 * tiny.active + 6 * 2 * 500 * 32)  # the longest clip has 20 s of 25 ids
    assert plan.ids_per_second == speed
    assert plan.loader_speed == speed / 4
    assert f"{3600 * 25 / speed / 86400:.3g} days" in plan.report()


@pytest.mark.parametrize(("n_q", "stride", "marks"), [(1, 1, 0.0), (2, 3, 0.0), (4, 2, 0.48)])
def test_ids_per_second_are_those_of_the_vocabulary(n_q: int, stride: int, marks: float) -> None:
    layout = {"n_q": n_q, "acoustic_stride": stride, "time_marks": marks, "merge_repeats": False}
    config = settings(**layout, tasks={"activity": 1})
    vocabulary = config.vocabulary(10, load_codec(config.codec))
    codes = torch.arange(144).expand(n_q, 144)  # 5.76 s, after the last of which there is no mark
    ids = len(vocabulary.audio_ids(codes)) + bool(marks)
    assert model_sizes(config).ids_per_second == pytest.approx(ids / 5.76)


def dry_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    """``train/pretrain.py --dry-run`` in this process: what it printed, and its error or ""."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--dry-run", *map(str, arguments)])
    capsys.readouterr()
    code = 0
    try:
        pretrain.main()
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if "error" in line]
    assert (code, len(errors)) in ((0, 0), (2, 1))
    return printed.out, "".join(errors)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with text model and codec, and no corpora."""
    (tmp_path / "tokenizers").symlink_to(ROOT / "tokenizers")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", RANKS)
def test_shipped_configs_fit_the_machines_they_name(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = CONFIGS / f"{name}.yaml"
    config, tasks = read_config(path, Pretraining), read_config(CONFIGS / "all-tasks.yaml", Pretraining)
    assert config.tasks == tasks.tasks
    assert config.tasks.keys() == TASKS.keys()
    assert config.corpora == tasks.corpora
    assert config.bf16
    assert named_ranks(path) == RANKS[name]
    printed, error = dry_run(monkeypatch, capsys, "--config", path)
    assert not error
    assert f"memory of each of {RANKS[name]} GPUs\n" in printed
    if name == "large":  # the page has the plan
        page = (ROOT / "train" / "README.md").read_text(encoding="utf-8")
        assert "\n".join(f"    {line}" for line in printed.splitlines()) in page


@pytest.mark.usefixtures("elsewhere")
def test_ranks_are_given_or_launched_or_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--config", CONFIGS / "small.yaml", "--ranks", 1, "--gpu-memory", 24)
    printed, error = dry_run(monkeypatch, capsys, *given)
    assert "memory of each of 1 GPUs\n" in printed
    assert not error
    assert named_ranks(CONFIGS / "tiny.yaml") == 1
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config", str(CONFIGS / "small.yaml"), "--dry-run"])
    pretrain.main()
    assert "memory of each of 16 GPUs\n" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")  # one of them prints
    pretrain.main()
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("large", ("--ranks", 12), "expert_parallel = 8 must divide the number of ranks (12) and of experts (64)"),
        (
            "large",
            ("--gpu-memory", 40),
            "59.8 GiB of each of 64 GPUs, and 36.0 of 40 can be used (most of it: gradients)",
        ),
        ("small", ("--ranks", 0), "--ranks must be above 0, not 0"),
        ("small", ("--gpu-memory", "nan"), "--gpu-memory must be above 0, not nan"),
        ("small", ("--tflops", -1), "--tflops must be above 0, not -1.0"),
        ("small", ("--mfu", 40), "--mfu is a share of the peak: at most 1, not 40.0"),
        ("small", ("--hours", 0), "--hours must be above 0, not 0.0"),
    ],
)
def test_errors(
    name: str,
    arguments: tuple[object, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, error = dry_run(monkeypatch, capsys, "--config", CONFIGS / f"{name}.yaml", *arguments)
    assert message in error


@pytest.mark.parametrize(
    ("name", "ranks", "gpu_memory", "changes", "advice"),
    [
        ("large", 64, 80, {"activation_checkpointing": False}, {"activation_checkpointing": True}),
        ("large", 64, 50, {}, {"zero_stage": 2}),
        ("large", 64, 40, {}, {"zero_stage": 3}),
        ("large", 64, 37, {"zero_stage": 2}, {"zero_stage": 3}),
        ("small", 1, 11, {"activation_checkpointing": True}, {"batch_tokens": 8192, "grad_accum_steps": 8}),
        ("base", 1, 80, {}, {"offload": True}),
    ],
)
def test_the_way_out_is_one(
    name: str, ranks: int, gpu_memory: float, changes: dict[str, Any], advice: dict[str, Any]
) -> None:
    """With what the message advises the run fits, without it not."""
    config = read_config(CONFIGS / f"{name}.yaml", Pretraining).model_copy(update=changes)
    paths = {"text_model": TEXT_MODEL, "codec": ROOT / "tokenizers" / "codec"}
    plan = Plan(config, model_sizes(config.model_copy(update=paths)), Machine(ranks, gpu_memory), 1)
    with pytest.raises(InputError) as error:
        plan.check()
    said = " and ".join(f"{name} to {str(value).lower()}" for name, value in advice.items())
    assert str(error.value).endswith(f": set {said}")
    replace(plan, config=config.model_copy(update=advice)).check()


def test_more_gpus_are_advised_where_settings_are_not_enough(round_sizes: Sizes) -> None:
    config = settings(activation_checkpointing=True, batch_tokens=1)
    plan = Plan(config, replace(round_sizes, dense=10**10, in_experts=0), Machine(1), 1)
    with pytest.raises(InputError, match=r"take 4 GPUs, with zero_stage = 3 and activation_checkpointing$"):
        plan.check()
    found = memory(config.model_copy(update={"zero_stage": 3}), plan.sizes, 4).total
    assert found < 0.9 * 80 * GIB < 2 * found


def test_the_slurm_script_is_a_script() -> None:
    assert subprocess.run(["bash", "-n", CONFIGS / "slurm.sh"]).returncode == 0
