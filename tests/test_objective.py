"""The training losses, against Hugging Face's and PyTorch's own on the same batch."""

from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from speechllm.data.encoded import write_facts
from speechllm.data.mixture import Mixture, TrainingBatch
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
    return Mixture(Dataset.from_list(rows, features=FEATURES), VOCABULARY, TEXT, {"transcribe": 1})


def batch_of(mixture: Mixture, *indices: int) -> TrainingBatch:
    """One clip's sequence is the same in every batch: it has a random state of its own."""
    singles = [mixture.batch([i], Random(i)) for i in indices]
    longest = max(s.lm.input_ids.shape[1] for s in singles)
    pieces = max(s.transcripts.shape[1] for s in singles)

    def stack(values: Sequence[Tensor], size: int, fill: int) -> Tensor:
        return torch.cat([F.pad(v, (0, size - v.shape[1]), value=fill) for v in values])

    lm = Batch(
        stack([s.lm.input_ids for s in singles], longest, VOCABULARY.pad),
        stack([s.lm.labels for s in singles], longest, IGNORE_INDEX),
        stack([s.lm.attention_mask for s in singles], longest, 0),
    )
    return TrainingBatch(
        lm,
        stack([s.audio_mask for s in singles], longest, 0),
        stack([s.transcripts for s in singles], pieces, 0),
        torch.cat([s.transcript_lengths for s in singles]),
    )


def pad_more(batch: TrainingBatch, columns: int) -> TrainingBatch:
    lm = Batch(
        F.pad(batch.lm.input_ids, (0, columns), value=VOCABULARY.pad),
        F.pad(batch.lm.labels, (0, columns), value=IGNORE_INDEX),
        F.pad(batch.lm.attention_mask, (0, columns)),
    )
    return TrainingBatch(lm, F.pad(batch.audio_mask, (0, columns)), batch.transcripts, batch.transcript_lengths)


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


def test_neighbours_and_padding_change_no_loss(lm: PreTrainedModel, mixture: Mixture) -> None:
    objective = make(lm)
    together = batch_of(mixture, 0, 1, 2, 3)
    whole, padded = objective(together), objective(pad_more(together, 13))
    for name in ("answer", "ctc", "aux", "loss"):
        assert padded[name].item() == pytest.approx(whole[name].item(), abs=1e-5)

    answer = ctc = 0.0
    for index in range(4):
        alone = batch_of(mixture, index)
        losses = objective(alone)
        answer += losses["answer"].item() * int((alone.lm.labels != IGNORE_INDEX).sum())
        ctc += losses["ctc"].item() * max(1, int(alone.transcript_lengths))
    scored = int((together.lm.labels != IGNORE_INDEX).sum())
    assert whole["answer"].item() == pytest.approx(answer / scored, abs=1e-5)
    assert whole["ctc"].item() == pytest.approx(ctc / int(together.transcript_lengths.sum()), rel=1e-5)


def test_ctc_by_hand(lm: PreTrainedModel, mixture: Mixture) -> None:
    """Codes and the end-of-audio id are heard; symbol 0 is the blank, text piece p is symbol p + 1."""
    objective, batch = make(lm, ctc_layer=2), batch_of(mixture, 1, 0)
    hidden = lm.model(batch.lm.input_ids, output_hidden_states=True).hidden_states[2]
    total = torch.zeros(())
    for row, (frames, text) in enumerate((CLIPS[1], CLIPS[0])):
        heard = hidden[row, 1 : 1 + frames + 1]
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
    crowded = TrainingBatch(batch.lm, batch.audio_mask, long, torch.tensor([59]))
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
