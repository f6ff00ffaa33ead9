"""Which clips a model is validated on, and what they cost."""

from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from speechllm.data.encoded import write_facts
from speechllm.data.mixture import Mixture
from speechllm.errors import InputError
from speechllm.model import ModelConfig, make_model
from speechllm.prompt import IGNORE_INDEX, collate, render
from speechllm.tasks import TASKS, Facts
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train.encode import FEATURES
from train.pretrain_config import Pretraining
from train.setup import make_start
from train.validate import Validation, dev_set

TEXT = TextTokenizer.load(Path(__file__).parents[1] / "tokenizers" / "text.model")


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    """Clips of 1 to 79 frames, not in order."""
    rows = [
        {
            "id": str(frames), "split": "dev", "source": "made", "speaker": None, "n_q": 1,
            "facts": write_facts(Facts(frames / 25, "Yes.", "en")), "codes": [frames % 16] * frames,
        }
        for frames in Random(0).sample(range(1, 80), 79)
    ]  # fmt: skip
    data = Dataset.from_list(rows, features=FEATURES)
    return Mixture({"dev": data}, Vocabulary(TEXT.size, n_q=1, card=16), TEXT, ["transcribe", "language"])


@pytest.mark.parametrize("most", [1, 40, 78, 79, 500])
def test_clips_of_all_lengths_are_spread_over_the_ranks(mixture: Mixture, most: int) -> None:
    whole = dev_set("dev", mixture, "transcribe", most, 0, 1)
    frames = [example.codes.shape[1] for (example,) in whole.examples]
    assert len(set(frames)) == len(frames) == min(most, 79)
    if most > 1:
        gaps = [b - a for a, b in zip([0, *frames], [*frames, 80], strict=True)]
        assert max(gaps) <= 3, "from the shortest to the longest"
    for (example,), seconds in zip(whole.examples, whole.durations, strict=True):
        assert seconds == example.codes.shape[1] / 25
        assert example.codes.tolist() == [[example.codes.shape[1] % 16] * example.codes.shape[1]]
        assert (example.instruction, example.answer) == (TASKS["transcribe"].wordings[0], ("Yes.",))
    ranks = [dev_set("dev", mixture, "transcribe", most, rank, 3) for rank in range(3)]
    shared = [seconds for rank in ranks for seconds in rank.durations]
    pairs = zip(whole.examples, whole.foreign, strict=True)
    swaps = {len(e.codes[0]): len(other.codes[0]) for (e,), (other,) in pairs}
    assert swaps == dict(zip(frames, frames[1:] + frames[:1], strict=True)), "the next clip's audio, whatever the ranks"
    for rank in ranks:
        assert len(rank.examples) == len(rank.foreign) == -(-len(frames) // 3), "as many on each"
        assert rank.counted == len(rank.durations)
        for (example,), (other,) in zip(rank.examples, rank.foreign, strict=True):
            assert swaps[len(example.codes[0])] == len(other.codes[0])
            assert (example.instruction, example.answer) == (other.instruction, other.answer)
    assert sorted(shared) == sorted(whole.durations)


def test_the_audio_of_what_is_asked_is_swapped_and_that_of_its_shots_is_not() -> None:
    rows = [
        {
            "id": str(n), "split": "dev", "source": "made", "speaker": "ab"[n % 2], "n_q": 1,
            "facts": write_facts(Facts(0.4, "Yes.", "en")), "codes": [n] * 10,
        }
        for n in range(12)
    ]  # fmt: skip
    data = Dataset.from_list(rows, features=FEATURES)
    mixture = Mixture({"dev": data}, Vocabulary(TEXT.size, n_q=1, card=16), TEXT, ["few_shot_speaker"])
    dev = dev_set("dev", mixture, "few_shot_speaker", 10, 0, 1)
    for number, (own, other) in enumerate(zip(dev.examples, dev.foreign, strict=True)):
        assert len(own) > 1
        assert all(a is b for a, b in zip(own[:-1], other[:-1], strict=True))
        assert torch.equal(other[-1].codes, dev.examples[(number + 1) % len(dev.examples)][-1].codes)
        assert (own[-1].instruction, own[-1].answer) == (other[-1].instruction, other[-1].answer)


def test_a_dev_corpus_may_be_for_some_tasks(pretrain_settings: dict[str, Any], tmp_path: Path) -> None:
    (dev,) = pretrain_settings["dev_corpora"]
    for asked, scored in (([dev], ["transcribe", "translate_de"]), ({dev: ["translate_de"]}, ["translate_de"])):
        config = Pretraining.model_validate(pretrain_settings | {"out": tmp_path, "dev_corpora": asked})
        start = make_start(config, False)
        validation = Validation(config, start.codec, start.vocabulary, start.text, 0, 1)
        corpora = validation.corpora()
        assert [task for task in config.tasks if corpora[task] == [dev.name]] == scored
        assert sum(map(len, corpora.values())) == len(scored)


def test_what_a_dev_corpus_cannot_score_is_named(pretrain_settings: dict[str, Any], tmp_path: Path) -> None:
    (dev,) = pretrain_settings["dev_corpora"]
    change = {"out": tmp_path, "tasks": {"transcribe": 1, "emotion": 1}, "curriculum": {}}
    config = Pretraining.model_validate(pretrain_settings | change | {"dev_corpora": {dev: ["transcribe", "emotion"]}})
    start = make_start(config, False)
    with pytest.raises(InputError, match=f"dev_corpora: {dev} has no answers for emotion among its dev clips of up to"):
        Validation(config, start.codec, start.vocabulary, start.text, 0, 1)


def test_labels_take_more_clips(mixture: Mixture) -> None:
    assert len(dev_set("dev", mixture, "transcribe", 10, 0, 1).examples) == 10
    assert len(dev_set("dev", mixture, "language", 10, 0, 1).examples) == 40


@torch.inference_mode()
def test_losses_are_those_of_hugging_face_and_only_of_what_is_scored(mixture: Mixture) -> None:
    torch.manual_seed(0)
    words = mixture.vocabulary
    sizes = ModelConfig(hidden_size=32, num_layers=1, expert_size=32, num_experts=2, max_positions=256)
    lm = make_model(sizes, words.size, words.pad, words.end).eval()
    examples = dev_set("dev", mixture, "transcribe", 5, 0, 1).examples
    expected, ids = 0.0, 0
    for (example,) in examples[:3]:
        alone = collate([[render(example, words, TEXT)]], words.pad)
        scored = int((alone.labels != IGNORE_INDEX).sum())
        expected += lm(input_ids=alone.input_ids, labels=alone.labels).loss.item() * scored
        ids += scored
    paid: list[int] = []
    lm.lm_head.register_forward_hook(lambda _, __, logits: paid.append(logits[..., 0].numel()))
    validation: Any = SimpleNamespace(vocabulary=words, text=TEXT)
    found, count = Validation.summed_loss(validation, lm, examples, 3)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert paid == [ids] == [count.item()]
    nothing, none = Validation.summed_loss(validation, lm, examples, 0)
    assert (nothing.item(), none.item()) == (0, 0)
