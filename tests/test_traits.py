"""What is known of a recording beside its words, as a batch carries it, and the loss that teaches the LM to hear it."""

from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from speechllm.data.encoded import write_facts
from speechllm.data.mixture import Draw, Mixture, TrainingBatch
from speechllm.model import ModelConfig, make_model
from speechllm.tasks import TRAITS, Facts, Segment
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train.balance import Balance
from train.encode import FEATURES
from train.objective import Objective

TEXT = TextTokenizer.load(Path(__file__).parents[1] / "tokenizers" / "text.model")
VOCABULARY = Vocabulary(TEXT.size, n_q=1, card=16)
RECORDINGS = {
    "angry": Facts(1.6, "Ja.", "de", "female", {"en": "Yes."}, labels={"emotion": "anger"}),
    "hoarse": Facts(0.8, "Yes.", "en", "unsure", labels={"accent": "Scottish"}),
    "silence": Facts(0.4, ""),
    "talk": Facts(1.2, None, "fr", segments=(Segment("a", 0.0, 0.5, "Oui."), Segment("b", 0.5, 1.2, "Non."))),
}
TASKS = ("transcribe", "diarize", "translate_text_en")


@pytest.fixture(scope="module")
def batch() -> TrainingBatch:
    """Every recording, one to a row, and the first as text alone."""
    rows = [
        {
            "id": name, "split": "train", "source": "made", "speaker": None, "n_q": 1, "facts": write_facts(facts),
            "codes": [n % 16 for n in range(round(25 * facts.duration))],
        }
        for name, facts in RECORDINGS.items()
    ]  # fmt: skip
    vocabulary = Vocabulary(TEXT.size, n_q=1, card=16, times=100)
    mixture = Mixture({"made": Dataset.from_list(rows, features=FEATURES)}, vocabulary, TEXT, TASKS)
    drawn = [Draw("diarize" if n == 3 else "transcribe", n) for n in range(4)]
    return mixture.batch([*drawn, Draw("translate_text_en", 0)], 1, Random(0))


def test_a_batch_carries_what_is_known(batch: TrainingBatch) -> None:
    labels = [
        {trait.name: trait.labels[place] for trait, place in zip(TRAITS, places, strict=True) if place >= 0}
        for places in batch.traits.tolist()
    ]
    heard = {(draw.row, draw.task): found for draw, found in zip(batch.draws, labels, strict=True)}
    assert heard == {
        (0, "transcribe"): {"emotion": "angry", "language": "German", "gender": "female"},
        (1, "transcribe"): {"language": "English", "accent": "Scottish"},
        (2, "transcribe"): {"speakers": "none"},
        (3, "diarize"): {"language": "French", "speakers": "two"},
        (0, "translate_text_en"): {},
    }


def objective_for(vocabulary_size: int) -> Objective:
    torch.manual_seed(0)
    sizes = ModelConfig(hidden_size=32, num_layers=2, expert_size=32, num_experts=4, max_positions=512)
    lm = make_model(sizes, vocabulary_size, VOCABULARY.pad, VOCABULARY.end)
    return Objective(lm, VOCABULARY, Balance(TASKS), 1, 0.0, 0.0, trait_weight=0.5)


def test_the_loss_by_hand(batch: TrainingBatch) -> None:
    objective = objective_for(int(batch.lm.input_ids.max()) + 1)
    losses = objective(batch)
    states = objective.lm.base_model(input_ids=batch.lm.input_ids, output_hidden_states=True).hidden_states[1]
    expected = torch.zeros(())
    for trait, head in enumerate(objective.trait_heads):
        known = [n for n, place in enumerate(batch.traits[:, trait].tolist()) if place >= 0]
        means = torch.stack([states[n][batch.audio_mask[n]].mean(0) for n in known])
        expected = expected + F.cross_entropy(head(means), batch.traits[known, trait])
    assert [len([p for p in column if p >= 0]) for column in batch.traits.T.tolist()] == [1, 3, 1, 1, 2]
    torch.testing.assert_close(losses["traits"], expected)
    torch.testing.assert_close(losses["loss"], losses["answer"] + 0.5 * losses["traits"])


def test_the_layers_below_learn_to_hear(batch: TrainingBatch) -> None:
    objective = objective_for(int(batch.lm.input_ids.max()) + 1)
    optimizer = torch.optim.Adam(objective.parameters(), 3e-3)
    first = objective(batch)["traits"].item()
    for _ in range(100):
        optimizer.zero_grad()
        objective(batch)["traits"].backward()
        optimizer.step()
    assert objective(batch)["traits"].item() < 0.1 * first
