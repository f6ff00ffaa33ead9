"""The training losses, against Hugging Face's and PyTorch's own on the same batch."""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from speechllm.data.encoded import write_facts
from speechllm.data.mixture import CodeNoise, Draw, Mixture, TrainingBatch
from speechllm.errors import InputError
from speechllm.model import ModelConfig, make_model
from speechllm.prompt import IGNORE_INDEX, Batch
from speechllm.tasks import Facts
from speechllm.tasks.base import PHRASED
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train.balance import Balance, Fixed, PcGrad
from train.encode import FEATURES
from train.objective import Objective, load_balance

TEXT = TextTokenizer.load(Path(__file__).parents[1] / "tokenizers" / "text.model")
VOCABULARY = Vocabulary(TEXT.size, n_q=1, card=16)
SIZES = ModelConfig(hidden_size=32, num_layers=3, expert_size=32, num_experts=4, max_positions=256)
CLIPS = ((40, "Two dogs run."), (9, "A"), (25, "A boy jumps into the lake."), (12, ""))
GERMAN = {"Two dogs run.": "Zwei Hunde rennen.", "A": "Ein"}
TASKS = ("transcribe", "translate_de", "translate_text_de")


def mixture_of(noise: CodeNoise | None = None) -> Mixture:
    rng = Random(0)
    rows = [
        {
            "id": str(n), "split": "train", "source": "made", "speaker": None, "n_q": 1,
            "facts": write_facts(
                Facts(frames / 25, text, "en", translations={"de": GERMAN[text]} if text in GERMAN else {})
            ),
            "codes": [rng.randrange(16) for _ in range(frames)],
        }
        for n, (frames, text) in enumerate(CLIPS)
    ]  # fmt: skip
    return Mixture({"made": Dataset.from_list(rows, features=FEATURES)}, VOCABULARY, TEXT, TASKS, noise=noise)


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return mixture_of()


class First(Random):
    """Chooses what comes first, and no phrase, so that a clip's sequence is the same in every batch."""

    def choice(self, seq: Any) -> Any:
        return seq[0]

    def random(self) -> float:
        return PHRASED


def batch_of(mixture: Mixture, *indices: int, row_length: int = 1) -> TrainingBatch:
    """Sequences of the clips, the longest first: one in a row unless rows are longer than 1."""
    return mixture.batch([Draw("transcribe", index) for index in indices], row_length, First())


def pad_more(batch: TrainingBatch, columns: int) -> TrainingBatch:
    lm = Batch(
        F.pad(batch.lm.input_ids, (0, columns), value=VOCABULARY.pad),
        F.pad(batch.lm.labels, (0, columns), value=IGNORE_INDEX),
        F.pad(batch.lm.attention_mask, (0, columns)),
        F.pad(batch.lm.position_ids, (0, columns)),
    )
    example_ids = F.pad(batch.example_ids, (0, columns), value=-1)
    return replace(batch, lm=lm, example_ids=example_ids, audio_mask=F.pad(batch.audio_mask, (0, columns)))


@pytest.fixture
def lm() -> PreTrainedModel:
    torch.manual_seed(0)
    model = make_model(SIZES, VOCABULARY.size, VOCABULARY.pad, VOCABULARY.end)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.1)  # far enough from zero for the experts to differ
    return model


def make(
    lm: PreTrainedModel, ctc_layer: int = 2, ctc_weight: float = 0.3, aux_weight: float = 0.01, **others: Any
) -> Objective:
    torch.manual_seed(1)
    balance = others.pop("balance", None) or Balance(TASKS)
    return Objective(lm, VOCABULARY, balance, ctc_layer, ctc_weight, aux_weight, **others)


def test_answer_is_that_of_hugging_face_and_aux_the_mean_of_its_layers(lm: PreTrainedModel, mixture: Mixture) -> None:
    batch = batch_of(mixture, 0, 1, 2, 3)
    assert not batch.lm.attention_mask.all()
    inputs = {"input_ids": batch.lm.input_ids, "attention_mask": batch.lm.attention_mask, "labels": batch.lm.labels}
    losses, expected = make(lm)(batch), lm(**inputs)
    assert losses["answer"].item() == pytest.approx(expected.loss.item(), abs=1e-5)
    logits = lm(**inputs, output_router_logits=True).router_logits
    each = [load_balancing_loss_func((layer,), 4, 2, batch.lm.attention_mask) for layer in logits]
    assert losses["aux"].item() == pytest.approx(sum(each).item() / len(each), abs=1e-5)


def test_each_layer_is_balanced_for_itself() -> None:
    favours = torch.tensor([5.0, 5.0, 0.0, 0.0]).expand(6, 4)
    opposite, mask = (favours, favours.flip(1)), torch.ones(2, 3, dtype=torch.int64)
    even = tuple(torch.eye(4).roll(n, 0).repeat(2, 1)[:6] * 9 for n in range(2))
    assert load_balancing_loss_func(opposite, 4, 2, mask).item() == pytest.approx(2, abs=1e-3)  # unseen
    assert load_balance(opposite, 4, 2, mask).item() > 3.9
    assert load_balance(even, 4, 2, mask).item() < 2.7


def test_the_loss_is_the_weighted_sum_of_its_parts(lm: PreTrainedModel, mixture: Mixture) -> None:
    batch = batch_of(mixture, 0, 2)
    losses = make(lm, ctc_weight=0.7, aux_weight=0.2, audio_weight=0.4, router_z_weight=0.1)(batch)
    total = losses["answer"] + 0.7 * losses["ctc"] + 0.2 * losses["aux"]
    total = total + 0.4 * losses["audio"] + 0.1 * losses["router_z"]
    assert losses["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    plain = make(lm, ctc_weight=0.0, aux_weight=0.0)(batch)
    assert plain.keys() == {"answer", "loss", "tasks", "aux", "choices"}
    assert torch.equal(plain["loss"], plain["answer"])
    assert torch.equal(plain["answer"], losses["answer"])


def test_the_plain_mixture_is_cross_entropy_bit_for_bit(lm: PreTrainedModel, mixture: Mixture) -> None:
    """Values and gradients."""
    batch, objective = mixed(mixture, 150), make(lm, ctc_weight=0.0, aux_weight=0.0)
    states = lm.base_model(input_ids=batch.lm.input_ids, position_ids=batch.lm.position_ids, use_cache=False)[0]
    target = batch.lm.labels[:, 1:]
    scored = target != IGNORE_INDEX
    expected = F.cross_entropy(lm.lm_head(states[:, :-1][scored]), target[scored])
    expected.backward()
    gradients = {name: p.grad for name, p in lm.named_parameters()}
    lm.zero_grad(set_to_none=True)
    losses = objective(batch)
    assert torch.equal(losses["answer"], expected) and torch.equal(losses["loss"], expected)
    losses["loss"].backward()
    for name, parameter in lm.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradients[name]), name


def mixed(mixture: Mixture, row_length: int) -> TrainingBatch:
    """Two clips transcribed and one of them translated, and a translation of text."""
    draws = [Draw("transcribe", 0), Draw("translate_de", 0), Draw("translate_text_de", 1), Draw("transcribe", 2)]
    return mixture.batch(draws, row_length, First())


@pytest.mark.parametrize("row_length", [1, 150, 1000])
def test_each_answer_id_counts_for_its_task(lm: PreTrainedModel, mixture: Mixture, row_length: int) -> None:
    """However the sequences are packed: against Hugging Face's loss of each alone."""
    batch = mixed(mixture, row_length)
    assert len(batch.lm.input_ids) == {1: 4, 150: 2, 1000: 1}[row_length]
    sums, counts = dict.fromkeys(TASKS, 0.0), dict.fromkeys(TASKS, 0)
    for task, clip in (("transcribe", 0), ("translate_de", 0), ("translate_text_de", 1), ("transcribe", 2)):
        alone = mixture.batch([Draw(task, clip)], 1, First()).lm
        ids = int((alone.labels != IGNORE_INDEX).sum())
        sums[task] += lm(input_ids=alone.input_ids, labels=alone.labels).loss.item() * ids
        counts[task] += ids
    losses = make(lm)(batch)
    found_sums, found_counts, weights = losses["tasks"]
    assert found_sums.tolist() == pytest.approx([*sums.values()], rel=1e-4)
    assert found_counts.tolist() == [*counts.values()]
    assert weights.tolist() == [1, 1, 1]
    assert losses["answer"].item() == pytest.approx(sum(sums.values()) / sum(counts.values()), rel=1e-5)

    weighed = make(lm, ctc_weight=0.5, aux_weight=0.2, balance=Fixed(TASKS, {"translate_de": 3.0}))(batch)
    total = (sum(sums.values()) + 2 * sums["translate_de"]) / sum(counts.values())
    total += 0.5 * losses["ctc"].item() + 0.2 * losses["aux"].item()
    assert weighed["loss"].item() == pytest.approx(total, rel=1e-5)
    assert weighed["tasks"][2].tolist() == [1, 3, 1]
    assert torch.equal(weighed["answer"], losses["answer"])


@pytest.mark.parametrize("row_length", [1, 1000])
def test_further_questions_cost_what_they_would_alone(lm: PreTrainedModel, mixture: Mixture, row_length: int) -> None:
    """The losses are those of a sequence each, and a clip that is heard once counts once for CTC."""
    draws = [Draw("transcribe", 0, ("translate_de",)), Draw("translate_text_de", 1), Draw("transcribe", 2)]
    shared, apart = mixture.batch(draws, row_length, First()), mixed(mixture, row_length)
    assert sorted(shared.tasks) == sorted(apart.tasks) and len(shared.draws) == 3
    assert len(shared.audio_lengths) == 3 < len(apart.audio_lengths)
    assert (
        shared.lm.attention_mask.sum()
        == apart.lm.attention_mask.sum() - len(VOCABULARY.audio_ids(torch.zeros(1, 40).long())) - 2
    )
    found, expected = make(lm)(shared), make(lm)(apart)
    assert torch.allclose(found["tasks"], expected["tasks"], rtol=1e-4)
    assert found["answer"].item() == pytest.approx(expected["answer"].item(), rel=1e-4)
    once = mixture.batch([replace(draw, also=()) for draw in draws], row_length, First())
    assert found["ctc"].item() == pytest.approx(make(lm)(once)["ctc"].item(), rel=1e-4)


def test_pcgrad_projects_the_gradients_of_a_language_model(lm: PreTrainedModel, mixture: Mixture) -> None:
    """Two tasks on one clip, which are at odds once what they have in common is learnt."""
    batch = mixture.batch([Draw("transcribe", 0), Draw("translate_de", 0)], 1000, First())
    plain = make(lm, ctc_weight=0.0, aux_weight=0.0)
    optimizer = torch.optim.Adam(lm.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        plain(batch)["loss"].backward()
        optimizer.step()

    def gradient(loss: Tensor) -> Tensor:
        lm.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None])

    ids = int((batch.lm.labels != IGNORE_INDEX).sum())
    own = []
    for task in ("transcribe", "translate_de"):
        alone = mixture.batch([Draw(task, 0)], 1, First())
        share = int((alone.lm.labels != IGNORE_INDEX).sum()) / ids
        own.append(gradient(share * plain(alone)["loss"]))
    product = own[0] @ own[1]
    assert product < 0
    assert torch.allclose(gradient(plain(batch)["loss"]), own[0] + own[1], atol=1e-5)
    projected = own[0] - product / (own[1] @ own[1]) * own[1] + own[1] - product / (own[0] @ own[0]) * own[0]
    losses = make(lm, ctc_weight=0.0, aux_weight=0.0, balance=PcGrad(TASKS, 0))(batch)
    assert torch.allclose(gradient(losses["loss"]), projected, atol=1e-5)
    assert (projected - own[0] - own[1]).abs().max() > 1e-3
    assert losses["tasks"][2, :2].min() > 1 and losses["tasks"][2, 2] == 1
    # what belongs to no task is added unprojected
    others = make(lm, aux_weight=0.2)(batch)
    both = make(lm, aux_weight=0.2, balance=PcGrad(TASKS, 0))(batch)
    assert torch.allclose(gradient(both["loss"]) - projected, gradient(others["loss"]) - own[0] - own[1], atol=2e-5)


def test_audio_loss_by_hand(lm: PreTrainedModel) -> None:
    """Codes are predicted from what is before them, hidden ones are not; nothing else pays for the softmax."""
    hiding = mixture_of(CodeNoise(0.0, 0.4))
    draws = [Draw("transcribe", 0), Draw("translate_text_de", 1), Draw("transcribe", 2), Draw("translate_de", 1)]
    first_code = TEXT.size + 32
    for row_length, rows in ((1, 4), (1000, 1)):
        batch = hiding.batch(draws, row_length, Random(3))
        assert len(batch.lm.input_ids) == rows
        total, codes, answers, hidden = 0.0, 0, int((batch.lm.labels != IGNORE_INDEX).sum()), 0
        for ids, positions in zip(batch.lm.input_ids, batch.lm.position_ids, strict=True):
            logits = lm(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
            for place, index in enumerate(ids.tolist()):
                hidden += index == VOCABULARY.mask
                if index >= first_code:
                    total -= logits[place - 1].log_softmax(-1)[index].item()
                    codes += 1
        assert codes > 20 and hidden > 10
        paid: list[int] = []
        hook = lm.lm_head.register_forward_hook(
            lambda _, inputs, output, paid=paid: paid.append(output[..., 0].numel())
        )
        losses = make(lm, audio_weight=1.0)(batch)
        hook.remove()
        assert losses["audio"].item() == pytest.approx(total / codes, rel=1e-5)
        assert paid == [answers, codes]
        losses["audio"].backward()
        assert lm.get_input_embeddings().weight.grad.abs().sum() > 0


def test_without_audio_there_is_no_audio_loss(lm: PreTrainedModel, mixture: Mixture) -> None:
    losses = make(lm, ctc_weight=0.0, audio_weight=1.0)(mixture.batch([Draw("translate_text_de", 0)], 1, First()))
    assert losses["audio"].item() == 0
    losses["loss"].backward()
    assert all(p.grad.isfinite().all() for p in lm.parameters() if p.grad is not None)


def test_router_z_loss_by_hand(lm: PreTrainedModel, mixture: Mixture) -> None:
    """Of what goes into the experts' gates, one unpadded sequence after the other."""
    batch = batch_of(mixture, 0, 1, 2)
    squares: list[float] = []

    def note(gate: torch.nn.Module, inputs: tuple[Tensor], _: Any) -> None:
        for position in inputs[0].reshape(-1, SIZES.hidden_size) @ gate.weight.T:
            squares.append(torch.log(torch.exp(position.double()).sum()).item() ** 2)

    hooks = [layer.mlp.gate.register_forward_hook(note) for layer in lm.model.layers]
    for ids, kept in zip(batch.lm.input_ids, batch.lm.attention_mask, strict=True):
        lm(input_ids=ids[: int(kept.sum())][None])
    for hook in hooks:
        hook.remove()
    assert len(squares) == 3 * int(batch.lm.attention_mask.sum()) < 3 * batch.lm.attention_mask.numel()
    losses = make(lm, router_z_weight=1.0)(batch)
    assert losses["router_z"].item() == pytest.approx(sum(squares) / len(squares), rel=1e-5)
    losses["router_z"].backward()
    assert all(layer.mlp.gate.weight.grad.abs().sum() > 0 for layer in lm.model.layers)


def test_router_z_loss_needs_a_router() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY.size, **sizes))
    with pytest.raises(InputError, match="router_z_weight: the model has no experts"):
        make(dense, router_z_weight=0.1)
    one_expert = make_model(SIZES.model_copy(update={"num_experts": 1, "top_k": 1}), VOCABULARY.size, 0, 1)
    with pytest.raises(InputError, match="router_z_weight: the model has no experts"):
        make(one_expert, router_z_weight=0.1)


def test_neighbours_padding_and_packing_change_no_loss(lm: PreTrainedModel, mixture: Mixture) -> None:
    objective = make(lm, audio_weight=0.5, router_z_weight=0.1)
    together = batch_of(mixture, 0, 1, 2, 3)
    packed = [batch_of(mixture, 0, 1, 2, 3, row_length=length) for length in (80, 1000)]
    assert [len(batch.lm.input_ids) for batch in (together, *packed)] == [4, 2, 1]
    whole = objective(together)
    whole["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    assert len(gradients) > 20
    for other in (pad_more(together, 13), *packed):
        objective.zero_grad()
        losses = objective(other)
        for name in ("answer", "ctc", "aux", "audio", "router_z", "loss"):
            assert losses[name].item() == pytest.approx(whole[name].item(), abs=1e-5)
        losses["loss"].backward()
        for name, parameter in objective.named_parameters():
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, gradients[name], atol=1e-5), name

    answer = ctc = 0.0
    for index in range(4):
        alone = batch_of(mixture, index)
        losses = objective(alone)
        answer += losses["answer"].item() * int((alone.lm.labels != IGNORE_INDEX).sum())
        ctc += losses["ctc"].item() * max(1, int(alone.transcript_lengths))
    scored = int((together.lm.labels != IGNORE_INDEX).sum())
    assert whole["answer"].item() == pytest.approx(answer / scored, abs=1e-5)
    assert whole["ctc"].item() == pytest.approx(ctc / int(together.transcript_lengths.sum()), rel=1e-5)


@torch.inference_mode()
def test_no_sequence_of_a_row_sees_another(lm: PreTrainedModel, mixture: Mixture) -> None:
    def hidden(batch: Batch) -> Tensor:
        return lm.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)[0]

    row, other = batch_of(mixture, 0, 2, 1, row_length=1000).lm, batch_of(mixture, 0, 2, 3).lm
    assert len(row.input_ids) == 1 and row.attention_mask.all()
    packed = hidden(row)[0]
    starts = [n for n, position in enumerate(row.position_ids[0].tolist()) if position == 0]
    assert len(starts) == 3
    for index, start, end in zip((0, 2, 1), starts, [*starts[1:], len(packed)], strict=True):
        alone = batch_of(mixture, index).lm
        assert torch.equal(alone.input_ids[0], row.input_ids[0, start:end])
        assert torch.allclose(packed[start:end], hidden(alone)[0], atol=1e-5)
        changed = row.input_ids.clone()  # all but this one
        changed[0, :start] = torch.arange(start)
        changed[0, end:] = torch.arange(len(packed) - end)
        assert torch.allclose(hidden(replace(row, input_ids=changed))[0, start:end], packed[start:end], atol=1e-6)
    # rows of another length, some padded, next to it: as above
    assert torch.allclose(hidden(other)[0, : starts[1]], packed[: starts[1]], atol=1e-5)
    # that the positions do it: were they to run on, neighbours would be seen
    running = replace(row, position_ids=torch.arange(len(packed))[None])
    assert not torch.allclose(hidden(running)[0, starts[1] :], packed[starts[1] :], atol=1e-2)


def test_ctc_by_hand(lm: PreTrainedModel, mixture: Mixture) -> None:
    """Codes and the end-of-audio id are heard; symbol 0 is the blank, text piece p is symbol p + 1."""
    objective, batch = make(lm, ctc_layer=2), batch_of(mixture, 1, 0)
    total = torch.zeros(())
    for row, (frames, text) in enumerate((CLIPS[0], CLIPS[1])):
        hidden = lm.model(batch.lm.input_ids[row : row + 1], output_hidden_states=True).hidden_states[2]
        heard = hidden[0, 1 : 1 + frames + 1]
        log_probs = objective.ctc_head(heard).log_softmax(-1)
        target = torch.tensor(TEXT.encode(text)) + 1
        total = total + F.ctc_loss(
            log_probs, target, torch.tensor(len(heard)), torch.tensor(len(target)), reduction="sum"
        )
    pieces = len(TEXT.encode(CLIPS[0][1])) + len(TEXT.encode(CLIPS[1][1]))
    assert objective(batch)["ctc"].item() == pytest.approx(total.item() / pieces, rel=1e-5)


def test_ctc_stays_finite_when_the_words_do_not_fit_the_audio(lm: PreTrainedModel, mixture: Mixture) -> None:
    batch = batch_of(mixture, 1)
    long = torch.arange(1, 60)[None]
    crowded = replace(batch, transcripts=long, transcript_lengths=torch.tensor([59]))
    losses = make(lm)(crowded)
    assert losses["ctc"].item() == 0
    losses["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in lm.parameters())
    wordless = make(lm)(batch_of(mixture, 3))
    assert wordless["ctc"].isfinite()


def test_ctc_teaches_the_layers_below_it_and_learns(lm: PreTrainedModel, mixture: Mixture) -> None:
    objective, batch = make(lm, ctc_layer=2), batch_of(mixture, 0, 2)
    objective(batch)["ctc"].backward()
    for name, parameter in lm.named_parameters():
        if "layers.0." in name or "layers.1." in name or "embed" in name:
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None or parameter.grad.abs().sum() == 0, name
    optimizer = torch.optim.Adam(lm.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = objective(batch)["ctc"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
