"""Decoding with a cache, in batches: the same answers as one full forward pass an id, and as Hugging Face's."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from speechllm.generate import Completion, generate
from speechllm.model import ModelConfig, make_model

VOCABULARY_SIZE, PAD, END, NEVER = 60, 58, 59, 60  # NEVER: an end id that no model of this size can choose
SIZES = ModelConfig(hidden_size=32, num_layers=2, expert_size=32, num_experts=4, max_positions=64)
LENGTHS = (17, 3, 9, 17, 1)
NEW = 12


@pytest.fixture(scope="module")
def lm() -> PreTrainedModel:
    """Weights far from zero: the answers vary, and no choice hangs on a rounding error."""
    torch.manual_seed(3)
    model = make_model(SIZES, VOCABULARY_SIZE, PAD, END).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, PAD, (length,), generator=generator) for length in LENGTHS]


@torch.inference_mode()
def uncached(lm: PreTrainedModel, prompt: Tensor, steps: int, allowed: Tensor | None = None) -> Completion:
    """Greedy decoding in the plainest way: the whole sequence again for every id."""
    ids, logprobs = prompt, []
    for _ in range(steps):
        scores = lm(input_ids=ids[None], use_cache=False).logits[0, -1].log_softmax(-1)
        if allowed is not None:
            scores[~allowed] = -torch.inf
        logprobs.append(scores.max().item())
        ids = torch.cat([ids, scores.argmax()[None]])
    return Completion(ids[len(prompt) :].tolist(), logprobs, "length")


def run(lm: PreTrainedModel, prompts: list[Tensor], end_id: int = NEVER, **options: Tensor | int) -> list[Completion]:
    return generate(lm, prompts, end_id=end_id, pad_id=PAD, **({"max_new_tokens": NEW} | options))  # type: ignore[arg-type]


def same(found: Completion, expected: Completion) -> None:
    assert (found.ids, found.finish_reason) == (expected.ids, expected.finish_reason)
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_cached_is_uncached(lm: PreTrainedModel, prompts: list[Tensor]) -> None:
    for prompt in prompts:
        (found,) = run(lm, [prompt])
        assert len(found.ids) == len(found.logprobs) == NEW
        same(found, uncached(lm, prompt, NEW))
    assert len({index for c in run(lm, prompts) for index in c.ids}) > 5


@torch.inference_mode()
def test_logits_of_a_cached_step_are_those_of_the_whole_sequence(lm: PreTrainedModel, prompts: list[Tensor]) -> None:
    ids = prompts[0][None]
    whole = lm(input_ids=ids, use_cache=False).logits
    cache = DynamicCache(config=lm.config)
    first = lm(input_ids=ids[:, :10], past_key_values=cache, use_cache=True).logits
    steps = [lm(input_ids=ids[:, n : n + 1], past_key_values=cache, use_cache=True).logits for n in range(10, 17)]
    assert (torch.cat([first, *steps], dim=1) - whole).abs().max() < 1e-4


def test_a_batch_answers_as_its_members_alone(lm: PreTrainedModel, prompts: list[Tensor]) -> None:
    alone = [run(lm, [prompt])[0] for prompt in prompts]
    assert len({tuple(c.ids) for c in alone}) == len(prompts)
    for found, expected in zip(run(lm, prompts), alone, strict=True):
        same(found, expected)
    for found, expected in zip(run(lm, prompts[::-1]), alone[::-1], strict=True):
        same(found, expected)


def test_no_prompts_no_answers(lm: PreTrainedModel) -> None:
    assert run(lm, []) == []


def test_the_end_id_stops_its_row_only(lm: PreTrainedModel, prompts: list[Tensor]) -> None:
    endless = run(lm, prompts)
    end = endless[0].ids[4]
    for found, whole in zip(run(lm, prompts, end_id=end), endless, strict=True):
        if end in whole.ids:
            stop = whole.ids.index(end)
            assert (found.ids, found.finish_reason) == (whole.ids[:stop], "stop")
            assert found.logprobs == pytest.approx(whole.logprobs[: stop + 1], abs=1e-4)
        else:
            same(found, whole)
    assert run(lm, prompts, end_id=end)[0].finish_reason == "stop"


def test_length_is_the_reason_when_ids_run_out(lm: PreTrainedModel, prompts: list[Tensor]) -> None:
    (short,) = run(lm, prompts[:1], max_new_tokens=5)
    (long,) = run(lm, prompts[:1])
    assert (short.ids, short.finish_reason) == (long.ids[:5], "length")


def test_only_the_end_allowed_is_an_empty_answer(lm: PreTrainedModel, prompts: list[Tensor]) -> None:
    allowed = torch.arange(VOCABULARY_SIZE) == END
    for completion in run(lm, prompts, end_id=END, allowed=allowed):
        assert (completion.ids, completion.finish_reason) == ([], "stop")
        assert len(completion.logprobs) == 1
        assert completion.logprobs[0] < 0


def test_allowed_ids_alone_are_chosen_and_their_logprobs_stay_those_of_the_model(
    lm: PreTrainedModel, prompts: list[Tensor]
) -> None:
    free = {index for completion in run(lm, prompts) for index in completion.ids}
    allowed = torch.tensor([index % 2 == 0 for index in range(VOCABULARY_SIZE)])
    assert any(index % 2 for index in free)
    for prompt, completion in zip(prompts, run(lm, prompts, allowed=allowed), strict=True):
        assert all(index % 2 == 0 for index in completion.ids)
        same(completion, uncached(lm, prompt, NEW, allowed))


def test_what_does_not_fit_is_refused_with_both_numbers(lm: PreTrainedModel) -> None:
    prompt = torch.zeros(60, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"60 ids and 5 more .* 64 positions"):
        run(lm, [prompt[:3], prompt], max_new_tokens=5)
    assert len(run(lm, [prompt], max_new_tokens=4)[0].ids) == 4
    with pytest.raises(ValueError, match="no ids"):
        run(lm, [prompt, prompt[:0]], max_new_tokens=4)


def test_hugging_face_generates_the_same(lm: PreTrainedModel, prompts: list[Tensor]) -> None:
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0), value=PAD) for p in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - len(p) for p in prompts]).long()
    theirs = lm.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        output_router_logits=False,
        eos_token_id=NEVER,
        pad_token_id=PAD,
    )
    assert theirs[:, longest:].tolist() == [completion.ids for completion in run(lm, prompts)]
