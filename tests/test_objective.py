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
from transformers import PreTrainedModel

from speechllm.data.encoded import write_facts
from speechllm.data.mixture import Draw, Mixture, TrainingBatch
from speechllm.model import ModelConfig, make_model
from speechllm.prompt import IGNORE_INDEX, Batch
from speechllm.tasks import Facts
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train.encode import FEATURES
from train.objective import Objective

TEXT = TextTokenizer.load(Path(__file__).parents[1] / "tokenizers" / "text.model")
VOCABULARY = Vocabulary(TEXT.size, n_q=1, card=16)
SIZES = ModelConfig(hidden_size=32, num_layers=3, expert_size=32, num_experts=4, max_positions=256)
CLIPS = ((40, "Two dogs run."), (9, "A"), (25, "A boy jumps into the lake."), (12, ""))


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    rng = Random(0)
    rows = [
        {
            "id": str(n), "split": "train", "source": "made", "speaker": None, "n_q": 1,
            "facts": write_facts(Facts(frames / 25, text, "en")),
            "codes": [rng.randrange(16) for _ in range(frames)],
        }
        for n, (frames, text) in enumerate(CLIPS)
    ]  # fmt: skip
    return Mixture({"made": Dataset.from_list(rows, features=FEATURES)}, VOCABULARY, TEXT, ["transcribe"])


class First(Random):
    """Chooses what comes first, so that a clip's sequence is the same in every batch."""

    def choice(self, seq: Any) -> Any:
        return seq[0]


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
    return replace(batch, lm=lm, audio_mask=F.pad(batch.audio_mask, (0, columns)))


@pytest.fixture
def lm() -> PreTrainedModel:
    torch.manual_seed(0)
    model = make_model(SIZES, VOCABULARY.size, VOCABULARY.pad, VOCABULARY.end)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.1)  # far enough from zero for the experts to differ
    return model


def make(lm: PreTrainedModel, ctc_layer: int = 2, ctc_weight: float = 0.3, aux_weight: float = 0.01) -> Objective:
    torch.manual_seed(1)
    return Objective(lm, TEXT.size, ctc_layer, ctc_weight, aux_weight)


def test_answer_and_aux_are_those_of_hugging_face(lm: PreTrainedModel, mixture: Mixture) -> None:
    batch = batch_of(mixture, 0, 1, 2, 3)
    assert not batch.lm.attention_mask.all()
    inputs = {"input_ids": batch.lm.input_ids, "attention_mask": batch.lm.attention_mask, "labels": batch.lm.labels}
    losses, expected = make(lm)(batch), lm(**inputs)
    assert losses["answer"].item() == pytest.approx(expected.loss.item(), abs=1e-5)
    with_router = lm(**inputs, output_router_logits=True)
    assert losses["aux"].item() == pytest.approx(with_router.aux_loss.item(), abs=1e-5)
    assert losses["load"].sum().item() == pytest.approx(1)
    assert losses["load"].max() > losses["load"].min()


def test_the_loss_is_the_weighted_sum_of_its_parts(lm: PreTrainedModel, mixture: Mixture) -> None:
    batch = batch_of(mixture, 0, 2)
    losses = make(lm, ctc_weight=0.7, aux_weight=0.2)(batch)
    total = losses["answer"] + 0.7 * losses["ctc"] + 0.2 * losses["aux"]
    assert losses["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    plain = make(lm, ctc_weight=0.0, aux_weight=0.0)(batch)
    assert "ctc" not in plain
    assert torch.equal(plain["loss"], plain["answer"])
    assert torch.equal(plain["answer"], losses["answer"])


def test_neighbours_padding_and_packing_change_no_loss(lm: PreTrainedModel, mixture: Mixture) -> None:
    objective = make(lm)
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
        for name in ("answer", "ctc", "aux", "loss"):
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
