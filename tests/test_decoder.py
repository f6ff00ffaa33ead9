"""Slots of sequences: the compiled kernel and the model's own forward pass decode what the model itself would."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import require_engine
from test_kernel import (
    END,
    NEVER,
    PAD,
    SIZES,
    VOCABULARY_SIZE,
    farthest,
    forward,
    random_ids,
    small_mixtral,
    without_compiler,
)
from transformers import PreTrainedModel

from serve.decoder import MAX_POSITIONS, SHORT, Decoder
from serve.kernel import dequantized
from speechllm.errors import InputError
from speechllm.generate import generate

LONG = SHORT + 13  # a prompt that the kernel is not given
OTHERS: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.3, "intermediate_size": 32,
    "pad_token_id": PAD, "eos_token_id": END,
}  # fmt: skip


def llama() -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**OTHERS, tie_word_embeddings=False))


def qwen3_moe() -> PreTrainedModel:
    experts: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**OTHERS, **experts))


def gpt2() -> PreTrainedModel:
    """Positions have embeddings of their own; as many heads of keys as of queries."""
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY_SIZE, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 96}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, initializer_range=0.3))


@pytest.fixture(params=["compiled", "plain"])
def lm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PreTrainedModel]:
    """A Mixtral, on a machine with a compiler and on one without."""
    if request.param == "compiled":
        require_engine("c++")
        yield small_mixtral()
        return
    with without_compiler(tmp_path):
        yield small_mixtral()


@pytest.fixture(params=[llama, qwen3_moe, gpt2], ids=lambda make: make.__name__)
def other(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Of another architecture."""
    torch.manual_seed(5)
    return request.param().eval()


def greedy(decoder: Decoder, prompts: Sequence[Sequence[int]], slots: Sequence[int], steps: int) -> list[list[int]]:
    """The likeliest ids after each prompt, all decoded together."""
    logits = [decoder.prefill(slot, torch.tensor(ids)) for slot, ids in zip(slots, prompts, strict=True)]
    chosen = [torch.stack(logits).argmax(-1).tolist()]
    while len(chosen) < steps:
        chosen.append(decoder.step(slots, chosen[-1]).argmax(-1).tolist())
    return [list(ids) for ids in zip(*chosen, strict=True)]


def expected_ids(lm: PreTrainedModel, prompts: Sequence[Sequence[int]], steps: int) -> list[list[int]]:
    tensors = [torch.tensor(ids) for ids in prompts]
    return [c.ids for c in generate(lm, tensors, end_id=NEVER, pad_id=PAD, max_new_tokens=steps)]


def test_the_kernel_decodes_where_it_is_there(lm: PreTrainedModel, request: pytest.FixtureRequest) -> None:
    compiled = "compiled" in request.node.callspec.id
    assert Decoder(lm, 1).compiled is compiled
    assert not Decoder(small_mixtral().bfloat16(), 1).compiled


def test_prompts_and_steps_are_the_models_forward_pass(lm: PreTrainedModel) -> None:
    decoder = Decoder(lm, 6)
    sequences = random_ids(LONG, 3, SHORT, 1)
    slots = [4, 0, 5, 2]
    found = [decoder.prefill(slot, torch.tensor(ids)) for slot, ids in zip(slots, sequences, strict=True)]
    assert [decoder.lengths[slot] for slot in slots] == [len(ids) for ids in sequences]
    assert farthest(found, [forward(lm, ids)[-1] for ids in sequences]) < 1e-5
    for following in random_ids(4, 4, 4):
        for ids, one in zip(sequences, following, strict=True):
            ids.append(one)
        order = [2, 0, 3, 1]
        stepped = decoder.step([slots[row] for row in order], [following[row] for row in order])
        assert farthest(stepped, [forward(lm, sequences[row])[-1] for row in order]) < 1e-5
    assert decoder.lengths == [6, 0, 4, 0, LONG + 3, SHORT + 3]


@pytest.mark.parametrize("parts", [(1, LONG - 1), (LONG - 1, 1), (SHORT, 13), (5, LONG - 9, 4), (2, 3, LONG - 5)])
def test_prefill_in_parts_is_prefill_at_once(lm: PreTrainedModel, parts: tuple[int, ...]) -> None:
    (ids,) = random_ids(LONG)
    decoder = Decoder(lm, 3)
    whole = decoder.prefill(0, torch.tensor(ids))
    for part in torch.tensor(ids).split(list(parts)):
        last = decoder.prefill(2, part)
    assert farthest([last], [whole]) < 1e-5
    for cache in (decoder.keys, decoder.values):
        assert (cache[:, 2] - cache[:, 0]).abs().max() < 1e-5
        assert cache[:, 2, :, :LONG].abs().max() > 0.1 and not cache[:, 2, :, LONG:].any()
    assert not decoder.keys[:, 1].any(), "the slot between is not touched"


@pytest.mark.parametrize("length", [None, LONG - 6, 2])
def test_a_copy_goes_on_as_the_original_would(lm: PreTrainedModel, length: int | None) -> None:
    ids, after, longer = random_ids(LONG, 4, LONG + 9)
    decoder = Decoder(lm, 3)
    decoder.prefill(0, torch.tensor(ids))
    decoder.prefill(1, torch.tensor(longer))  # what was there is gone
    decoder.copy(0, 1, length)
    kept = ids if length is None else ids[:length]
    assert decoder.lengths == [LONG, len(kept), 0]
    found = decoder.prefill(1, torch.tensor(after))
    assert farthest([found], [forward(lm, kept + after)[-1]]) < 1e-5
    one = decoder.step([1], [7])
    assert farthest(one, [forward(lm, [*kept, *after, 7])[-1]]) < 1e-5
    assert farthest(decoder.step([0], [7]), [forward(lm, [*ids, 7])[-1]]) < 1e-5, "the original is as it was"


def test_greedy_ids_are_those_of_generate(lm: PreTrainedModel) -> None:
    prompts = random_ids(LONG, 5, SHORT, 1)
    expected = expected_ids(lm, prompts, 20)
    assert len({index for ids in expected for index in ids}) > 10
    assert greedy(Decoder(lm, 4), prompts, [3, 1, 0, 2], 20) == expected


def test_other_architectures_decode_by_their_own_forward_pass(other: PreTrainedModel) -> None:
    prompts = random_ids(LONG, 5, 1)
    expected = expected_ids(other, prompts, 16)
    assert len({index for ids in expected for index in ids}) > 5
    decoder = Decoder(other, 4)
    assert not decoder.compiled
    assert greedy(decoder, prompts, [3, 0, 1], 16) == expected
    decoder.copy(3, 2, LONG)
    following = decoder.prefill(2, torch.tensor([9, 8, 7]))
    assert farthest([following], [other(torch.tensor([[*prompts[0], 9, 8, 7]])).logits[0, -1].detach()]) < 1e-5


@pytest.mark.parametrize("make", [small_mixtral, llama, qwen3_moe], ids=lambda make: make.__name__)
def test_another_implementation_of_attention_changes_no_answer(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    torch.manual_seed(5)
    lm = make().eval()
    prompts = random_ids(LONG, 4)
    expected = expected_ids(lm, prompts, 12)
    lm.set_attn_implementation("eager")
    with without_compiler(tmp_path):
        assert greedy(Decoder(lm, 2), prompts, [0, 1], 12) == expected


def test_int8_is_one_model_for_prompts_and_answers(tmp_path: Path) -> None:
    require_engine("c++")
    lm = small_mixtral()
    rounded = dequantized(lm)
    decoder = Decoder(lm, 2, "int8")
    long, short = random_ids(LONG, 6)
    for slot, ids in enumerate((long, short)):
        found = decoder.prefill(slot, torch.tensor(ids))
        assert farthest([found], [forward(rounded, ids)[-1]]) < 1e-4
        assert farthest([found], [forward(lm, ids)[-1]]) > 1e-3
    found = decoder.step([0, 1], [5, 6])
    assert farthest(found, [forward(rounded, [*long, 5])[-1], forward(rounded, [*short, 6])[-1]]) < 1e-4
    with pytest.raises(InputError, match="int8: only for a Mixtral on a CPU"):
        Decoder(llama(), 1, "int8")
    with without_compiler(tmp_path), pytest.raises(InputError, match=r"a C\+\+ compiler"):
        Decoder(lm, 1, "int8")


def test_positions_are_the_models_up_to_a_limit() -> None:
    assert Decoder(small_mixtral(), 1).positions == SIZES.max_positions
    config = transformers.LlamaConfig(**OTHERS | {"max_position_embeddings": 10 * MAX_POSITIONS})
    assert Decoder(transformers.LlamaForCausalLM(config), 1).positions == MAX_POSITIONS


def test_the_last_position_can_be_decoded(lm: PreTrainedModel) -> None:
    decoder = Decoder(lm, 1)
    (ids,) = random_ids(SIZES.max_positions)
    decoder.prefill(0, torch.tensor(ids[:-1]))
    assert farthest(decoder.step([0], ids[-1:]), [forward(lm, ids)[-1]]) < 1e-5


def test_windows_of_attention_are_refused() -> None:
    mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**OTHERS, sliding_window=16))
    qwen2 = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**OTHERS, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    )
    for lm in (mistral, qwen2):
        with pytest.raises(InputError, match=f"a {lm.config.model_type} with windows of attention cannot be served"):
            Decoder(lm, 1)
    whole = transformers.MistralForCausalLM(transformers.MistralConfig(**OTHERS, sliding_window=None))
    assert Decoder(whole, 1).positions == 96
