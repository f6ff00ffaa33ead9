"""Which implementation of attention an LM gets, and that none lets the sequences of a row see one another.

FlashAttention itself runs on GPUs alone. Elsewhere all of transformers' way to it does, down to a kernel that is
reckoned here by its definition.
"""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, modeling_flash_attention_utils
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.utils import is_flash_attn_2_available

from speechllm.data.mixture import pack
from speechllm.errors import InputError
from speechllm.model import FLASH, ModelConfig, choose_attention, keep_apart, load_model, make_model
from speechllm.prompt import Batch, Rendered, collate
from train.engine import start_engine
from train.pretrain_config import Pretraining
from train.state import Layout, RunState

# both experts are taken: which of several are may hang on a rounding
SIZES = ModelConfig(hidden_size=32, num_layers=2, expert_size=16, num_experts=2, top_k=2, max_positions=64)
IDS, PAD, END = 100, 90, 91
CPU, GPU = torch.device("cpu"), torch.device("cuda")
LENGTHS = (11, 7, 20, 5, 16)
BF16 = 0.2  # how far logits, of a spread of some 2, may be off for rounding


@pytest.fixture
def lm() -> PreTrainedModel:
    torch.manual_seed(0)
    model = make_model(SIZES, IDS, PAD, END).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # far enough from zero for attention to matter
    return model


def batch_of(row_length: int, seed: int = 0) -> Batch:
    """Sequences of LENGTHS, packed into rows of this length (1: each in a row of its own) and padded."""
    rng = Random(seed)
    sequences = []
    for length in LENGTHS:
        ids = torch.tensor([rng.randrange(PAD) for _ in range(length)])
        sequences.append(Rendered(ids, torch.arange(length) >= length // 2, length // 2))
    return collate([[sequences[i] for i in row] for row in pack(LENGTHS, row_length)], PAD)


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "expected"),
    [
        (GPU, torch.bfloat16, True, "flash_attention_2"),
        (GPU, torch.float16, True, "flash_attention_2"),
        (GPU, torch.float32, True, "sdpa"),
        (GPU, torch.bfloat16, False, "sdpa"),
        (CPU, torch.bfloat16, True, "sdpa"),
    ],
)
def test_flash_attention_is_taken_where_it_can_be_had(
    lm: PreTrainedModel, device: torch.device, dtype: torch.dtype, installed: bool, expected: str
) -> None:
    assert choose_attention(lm, device, dtype, flash_attn=installed) == expected
    assert choose_attention(lm, device, dtype, "eager", flash_attn=installed) == "eager"
    assert choose_attention(lm, device, dtype, "sdpa", flash_attn=installed) == "sdpa"
    if expected == FLASH:
        assert choose_attention(lm, device, dtype, FLASH, flash_attn=installed) == FLASH
        return
    lacking = "a GPU" if device == CPU else "bf16" if installed else "the package flash-attn"
    with pytest.raises(InputError, match=f"^attn_implementation: flash_attention_2 needs {lacking}.*leave the setting"):
        choose_attention(lm, device, dtype, FLASH, flash_attn=installed)


def test_an_lm_that_might_not_be_told_of_packed_rows_does_not_get_it(
    lm: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_attention(lm, GPU, torch.bfloat16, flash_attn=True) == FLASH
    monkeypatch.setattr(type(lm), "_supports_attention_backend", False)  # as of LMs with an attention of their own
    assert lm._supports_flash_attn
    assert choose_attention(lm, GPU, torch.bfloat16, flash_attn=True) == "sdpa"
    with pytest.raises(InputError, match=f"another LM than {lm.config.model_type}"):
        choose_attention(lm, GPU, torch.bfloat16, FLASH, flash_attn=True)


def test_models_made_and_loaded_on_a_cpu_have_sdpa(lm: PreTrainedModel, tmp_path: Path) -> None:
    lm.save_pretrained(tmp_path)
    for model in (lm, load_model(tmp_path)):
        assert model.config._attn_implementation == "sdpa"
        assert keep_apart(model, batch_of(30).position_ids) == {}


def test_several_ends_of_a_sequence_see_its_beginning_and_themselves(lm: PreTrainedModel) -> None:
    """What each end is told is what it would be told alone."""
    ids = torch.arange(30) * 7 % PAD
    begun, ends, other = ids[:6], (ids[6:11], ids[11:13], ids[13:20]), ids[20:]
    first, *others = (torch.cat([begun, ends[0]]), *ends[1:])
    row = [Rendered(first, first > 0, 0), *(Rendered(end, end > 0, 0, shared=6) for end in others)]
    alone = Rendered(other, other > 0, 0)
    batch = collate([[*row, alone], [alone]], PAD)
    assert batch.position_ids[0].tolist() == [*range(11), 6, 7, *range(6, 13), *range(10)]
    states = lm.base_model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, **keep_apart(lm, batch.position_ids, True)
    )[0]
    for other_way in ("eager", FLASH):
        lm.config._attn_implementation = other_way
        with pytest.raises(AssertionError, match="need a mask"):
            keep_apart(lm, batch.position_ids, True)
    lm.config._attn_implementation = "sdpa"
    found = states[0].split([6, 5, 2, 7, 10])
    for end, state in zip(ends, found[1:4], strict=True):
        expected = lm.base_model(input_ids=torch.cat([begun, end])[None])[0][0]
        assert torch.allclose(torch.cat([found[0], state]), expected, atol=1e-4)
    expected = lm.base_model(input_ids=other[None])[0][0]
    assert torch.allclose(found[4], expected, atol=1e-4) and torch.allclose(states[1, :10], expected, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it may be had here")
def test_a_run_that_asks_for_what_cannot_be_had_is_refused(lm: PreTrainedModel, tmp_path: Path) -> None:
    config = Pretraining(
        out=tmp_path, corpora={tmp_path: 1.0}, dev_corpora=[], tasks={"transcribe": 1}, steps=1,
        attn_implementation="flash_attention_2",
    )  # fmt: skip
    with pytest.raises(InputError, match="attn_implementation: flash_attention_2 needs"):
        start_engine(lm, lm, config, RunState(tmp_path / "state", Layout(1, 0, 1)))
    plain = config.model_copy(update={"attn_implementation": None})
    assert plain.attention is None and plain.model_copy(update={"questions": 2}).attention == "sdpa"


@pytest.mark.parametrize("row_length", [1, 30, 1000])
def test_transformers_finds_where_sequences_begin(row_length: int) -> None:
    """In rows that are packed, with one sequence each and a single one: those of the batch, and padding one by one."""
    batch = batch_of(row_length)
    (begins, same), (longest, _) = prepare_fa_kwargs_from_position_ids(batch.position_ids)
    assert torch.equal(begins, same)
    kept = batch.attention_mask.flatten()
    spans = [(a, b) for a, b in zip(begins.tolist(), begins.tolist()[1:], strict=False) if kept[a]]
    order = [index for row in pack(LENGTHS, row_length) for index in row]
    assert [b - a for a, b in spans] == [LENGTHS[index] for index in order]
    assert all(kept[a:b].all() for a, b in spans)
    assert int(longest) == max(LENGTHS)
    assert begins.tolist()[0] == 0 and begins.tolist()[-1] == kept.numel()
    assert len(begins) - 1 == len(LENGTHS) + int((kept == 0).sum())
    assert (len(batch.input_ids) == 1) == (row_length == 1000)
    assert bool((kept == 0).any()) == (row_length != 1000)


def kernel(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, softmax_scale: float, **_: Any) -> Tensor:
    """What ``flash_attn_varlen_func`` gives for ``[positions, heads, size]``: causal attention within each sequence."""
    out = torch.empty_like(q)
    for a, b in zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], strict=False):
        parts = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        heads = F.scaled_dot_product_attention(*parts, is_causal=True, scale=softmax_scale, enable_gqa=True)
        out[a:b] = heads[0].transpose(0, 1)
    return out


@pytest.fixture
def flash(lm: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """``lm`` with FlashAttention's kernel replaced; what the kernel was called with."""
    calls: list[dict[str, Any]] = []

    def varlen(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
        calls.append(arguments)
        return kernel(q, k, v, **arguments)

    def process(**arguments: Any) -> dict[str, Any]:
        return {name: arguments.get(name) for name in ("softmax_scale", "max_seqlen_q", "max_seqlen_k")}

    monkeypatch.setattr(
        modeling_flash_attention_utils,
        "lazy_import_flash_attention",
        lambda *_, **__: ((None, varlen, None, None, None), (process, None)),
    )
    lm.config._attn_implementation = FLASH
    yield calls
    lm.config._attn_implementation = "sdpa"


def logits_of(lm: PreTrainedModel, batch: Batch) -> Tensor:
    return lm(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        **keep_apart(lm, batch.position_ids),
    ).logits


@torch.inference_mode()
def check_apart(lm: PreTrainedModel, row_length: int, atol: float) -> None:
    """Each sequence's logits are those it has alone with SDPA, and stay when all others are changed."""
    batch, implementation = batch_of(row_length), lm.config._attn_implementation
    batch = Batch(**{name: value.to(lm.device) for name, value in vars(batch).items()})
    packed = logits_of(lm, batch)
    places = [
        (row, start + column, length)
        for row, members in enumerate(pack(LENGTHS, row_length))
        for start, column, length in (
            (sum(LENGTHS[i] for i in members[:n]), 0, LENGTHS[index]) for n, index in enumerate(members)
        )
    ]
    assert sorted(length for *_, length in places) == sorted(LENGTHS)
    for row, start, length in places:
        span = (row, slice(start, start + length))
        lm.config._attn_implementation = "sdpa"
        alone = lm(input_ids=batch.input_ids[span][None], use_cache=False).logits[0]
        lm.config._attn_implementation = implementation
        assert torch.allclose(packed[span], alone, atol=atol)
        changed = (batch.input_ids + 17) % PAD  # padding too
        changed[span] = batch.input_ids[span]
        other = Batch(changed, batch.labels, batch.attention_mask, batch.position_ids)
        assert torch.allclose(logits_of(lm, other)[span], packed[span], atol=atol)
        if start:  # the change is seen where sequences are not kept apart
            running = torch.arange(changed.shape[1], device=lm.device).expand_as(changed)
            loose = Batch(changed, batch.labels, batch.attention_mask, running)
            assert not torch.allclose(logits_of(lm, loose)[span], packed[span], atol=5 * atol)


@pytest.mark.parametrize("row_length", [1, 30, 1000])
@pytest.mark.parametrize(
    ("implementation", "dtype", "atol"),
    [("sdpa", torch.float32, 1e-4), ("eager", torch.float32, 1e-4), ("sdpa", torch.bfloat16, BF16)],
)
def test_no_sequence_of_a_row_sees_another(
    lm: PreTrainedModel, implementation: str, dtype: torch.dtype, atol: float, row_length: int
) -> None:
    lm.to(dtype).set_attn_implementation(implementation)
    check_apart(lm, row_length, atol)


@pytest.mark.parametrize("row_length", [1, 30, 1000])
def test_flash_attention_is_told_which_sequences_share_a_row(
    lm: PreTrainedModel, flash: list[dict[str, Any]], row_length: int
) -> None:
    check_apart(lm, row_length, 1e-4)
    assert len(flash) % SIZES.num_layers == 0 and flash
    batch = batch_of(row_length)
    expected = prepare_fa_kwargs_from_position_ids(batch.position_ids)[0][0]
    for call in flash[: SIZES.num_layers]:
        assert torch.equal(call["cu_seqlens_q"], expected) and torch.equal(call["cu_seqlens_k"], expected)
        assert (call["max_seqlen_q"], call["max_seqlen_k"]) == (max(LENGTHS), max(LENGTHS))
        assert type(call["max_seqlen_q"]) is int  # a tensor would make the GPU wait in each layer


@pytest.mark.skipif(
    not (torch.cuda.is_available() and is_flash_attn_2_available()), reason="needs a GPU and the package flash-attn"
)
@pytest.mark.parametrize("row_length", [1, 30, 1000])
def test_flash_attention_agrees_with_sdpa(lm: PreTrainedModel, row_length: int) -> None:
    lm.to(GPU, torch.bfloat16)
    lm.set_attn_implementation(choose_attention(lm, lm.device, lm.dtype))
    assert lm.config._attn_implementation == FLASH
    check_apart(lm, row_length, BF16)
