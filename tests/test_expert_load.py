"""What the router chose is counted as by hand, and what is read, written and drawn of it."""

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from speechllm.data.encoded import write_facts
from speechllm.data.mixture import Draw, Mixture
from speechllm.model import ModelConfig, make_model
from speechllm.tasks import Facts
from speechllm.tasks.base import PHRASED
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train.balance import Balance
from train.encode import FEATURES
from train.expert_load import ExpertLoad, count_choices, divergence
from train.objective import Objective, router_z

TEXT = TextTokenizer.load(Path(__file__).parents[1] / "tokenizers" / "text.model")
VOCABULARY = Vocabulary(TEXT.size, n_q=1, card=16)
FIRST_CODE = TEXT.size + 32
TASKS = ("transcribe", "translate_de", "translate_text_de")
DRAWS = [Draw("transcribe", 0), Draw("translate_text_de", 1), Draw("transcribe", 1), Draw("translate_de", 1)]


class First(Random):
    """Chooses what comes first, and no phrase, so that a clip's sequence is the same in every batch."""

    def choice(self, seq: Any) -> Any:
        return seq[0]

    def random(self) -> float:
        return PHRASED


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    rng = Random(0)
    clips = (("Two dogs run.", "Zwei Hunde rennen.", 40), ("A", "Ein", 9))
    rows = [
        {
            "id": str(n), "split": "train", "source": "made", "speaker": None, "n_q": 1,
            "facts": write_facts(Facts(frames / 25, english, "en", translations={"de": german})),
            "codes": [rng.randrange(16) for _ in range(frames)],
        }
        for n, (english, german, frames) in enumerate(clips)
    ]  # fmt: skip
    return Mixture({"made": Dataset.from_list(rows, features=FEATURES)}, VOCABULARY, TEXT, TASKS)


def model(num_experts: int, top_k: int) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = ModelConfig(hidden_size=32, num_layers=3, expert_size=32, num_experts=num_experts, top_k=top_k)
    lm = make_model(sizes, VOCABULARY.size, VOCABULARY.pad, VOCABULARY.end)
    for name, parameter in lm.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.1)  # far enough from zero for the experts to differ
    return lm


def objective(lm: PreTrainedModel) -> Objective:
    return Objective(lm, VOCABULARY, Balance(TASKS), ctc_layer=1, ctc_weight=0.0, aux_weight=0.01)


@pytest.mark.parametrize("row_length", [1, 60, 1000])
def test_choices_are_those_of_the_gates(mixture: Mixture, row_length: int) -> None:
    """Of each sequence alone, one position and layer after the other; however they are packed and padded."""
    lm = model(num_experts=4, top_k=2)
    expected = torch.zeros(3, len(TASKS), 3, 4, dtype=torch.int64)
    inputs: list[Tensor] = []  # of the gate of each layer
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, given, __: inputs.append(given[0])) for layer in lm.model.layers
    ]
    ids = 0
    for draw in DRAWS:
        alone = mixture.batch([draw], 1, First()).lm.input_ids[0].tolist()
        answer = alone.index(VOCABULARY.answer)
        inputs.clear()
        lm(input_ids=torch.tensor([alone]))
        for layer, given in enumerate(inputs):
            scores = (given.reshape(-1, 32) @ lm.model.layers[layer].mlp.gate.weight.T).tolist()
            for place, (index, score) in enumerate(zip(alone, scores, strict=True)):
                modality = 2 if place > answer else 0 if index >= FIRST_CODE else 1
                for expert in sorted(range(4), key=lambda e, score=score: -score[e])[:2]:
                    expected[layer, TASKS.index(draw.task), modality, expert] += 1
        ids += len(alone)
    for hook in hooks:
        hook.remove()
    assert expected.sum((1, 2, 3)).tolist() == [2 * ids] * 3
    assert (expected.sum((0, 3)) > 0).tolist() == [[True, True, True], [True, True, True], [False, True, True]]

    batch = mixture.batch(DRAWS, row_length, First())
    assert bool(batch.lm.attention_mask.all()) == (row_length == 1000)
    choices = objective(lm)(batch)["choices"]
    assert choices.dtype == torch.int64
    assert torch.equal(choices, expected)


def test_a_gpu_is_not_waited_for(mixture: Mixture) -> None:
    """Nothing has a shape that follows from values, which a device without values could not tell."""
    batch = mixture.batch(DRAWS, 60, Random(0)).to(torch.device("meta"))
    logits = [torch.zeros(batch.lm.input_ids.numel(), 4, device="meta")] * 3
    assert count_choices(logits, 2, batch, TASKS, VOCABULARY).shape == (3, len(TASKS), 3, 4)
    assert router_z(logits, batch.lm.attention_mask).shape == ()


def test_a_dense_model_has_nothing_to_choose(mixture: Mixture, tmp_path: Path) -> None:
    """One expert is a dense model: the loss is that of the answers alone, and no gradient reaches the gates."""
    lm = model(num_experts=1, top_k=1)
    losses = objective(lm)(mixture.batch(DRAWS, 60, Random(0)))
    assert losses.keys() == {"answer", "loss", "tasks"}
    assert torch.equal(losses["loss"], losses["answer"])
    losses["loss"].backward()
    for name, parameter in lm.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad.abs().sum() > 0) == ("mlp.gate." not in name), name
    load = ExpertLoad(TASKS)
    load.write(tmp_path, 1)
    assert load.read() == {}
    assert not [*tmp_path.iterdir()]


def counts_of(*layers: list[int]) -> Tensor:
    """Of the second of two tasks, on the audio."""
    counts = torch.zeros(len(layers), 2, 3, len(layers[0]), dtype=torch.int64)
    counts[:, 1, 0] = torch.tensor(layers)
    return counts


def test_what_is_read_is_since_the_last_reading() -> None:
    load = ExpertLoad(("a", "b"))
    load.add(0, counts_of([5, 5, 0, 10], [10, 10, 0, 0]))
    load.add(1, counts_of([15, 14, 1, 50], [10, 50, 0, 20]))
    # [20, 19, 1, 60] and [20, 60, 0, 20]: busy experts of one layer do not make up for idle ones of another
    assert load.read() == {"busiest_expert": 60 / 100, "idlest_expert": 0, "unused_experts": 2}
    load.add(2, counts_of([26, 26, 26, 2], [26, 26, 26, 3]))  # a tenth of an even share is two
    read = load.read()
    assert read == pytest.approx({"busiest_expert": 26 / 80, "idlest_expert": 2 / 80, "unused_experts": 0})
    load.add(3, counts_of([26, 26, 27, 1], [26, 26, 26, 2]))
    assert load.read()["unused_experts"] == 1


def test_what_is_written_is_of_the_last_one_to_two_intervals(tmp_path: Path) -> None:
    load = ExpertLoad(("a", "b"))
    first, second, third = (counts_of([n, 2, 3], [4, 5, n]) for n in (10, 100, 1000))
    third[1, 0, 2, 0] = 7  # the other task, its answers

    def written(step: int) -> dict:
        load.write(tmp_path, step)
        return json.loads((tmp_path / "experts.json").read_text())

    load.add(6, first)  # a run that was resumed after six steps
    found = written(7)
    assert found == {
        "steps": [7, 7],
        "modalities": {"audio": [[10, 2, 3], [4, 5, 10]], "instruction": [[0] * 3] * 2, "answer": [[0] * 3] * 2},
        "tasks": {"a": [[0] * 3] * 2, "b": [[10, 2, 3], [4, 5, 10]]},
    }
    load.read()  # changes nothing
    load.add(7, second)
    assert (written(8)["steps"], written(8)["steps"]) == ([7, 8], [8, 8])
    load.add(8, third)
    found = written(9)
    assert found["steps"] == [9, 9]
    assert found["tasks"] == {"a": [[0, 0, 0], [7, 0, 0]], "b": [[1000, 2, 3], [4, 5, 1000]]}
    assert found["modalities"]["answer"] == [[0, 0, 0], [7, 0, 0]]
    load.plot(tmp_path)
    image = (tmp_path / "experts.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 1000


def test_divergence_by_hand() -> None:
    """Two groups that share no expert, and two that are alike."""
    counts = torch.tensor([[[8, 0], [0, 8]], [[1, 3], [10, 30]], [[4, 0], [2, 2]]])  # [layers, groups, experts]
    last = [math.log2(1 / 0.75), 0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25)]
    bits = divergence(counts)
    assert bits.T.tolist() == [[1, 1], [pytest.approx(0, abs=1e-12)] * 2, pytest.approx(last)]
