"""Starting from an earlier checkpoint: everything that means the same is taken over, and nothing else."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TEXT_MODEL, filled
from transformers import PreTrainedModel

from speechllm.checkpoint import load_checkpoint, save_checkpoint
from speechllm.codec import Codec, SpeechCodec, load_codec
from speechllm.errors import InputError
from speechllm.model import ModelConfig, make_model
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train.warm_start import start_from

TEXT = TextTokenizer.load(TEXT_MODEL)
SIZES: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "expert_size": 32, "num_experts": 4, "max_positions": 512}
FIRST = TEXT.size + 32  # id after text and controls
PLAIN = Vocabulary(TEXT.size, n_q=1, card=16)
RICH = Vocabulary(TEXT.size, n_q=2, card=16, times=51, acoustic_stride=3)
MARKED = replace(RICH, mark_frames=12, mark_steps=12)


@pytest.fixture
def codec(tiny_checkpoint: Path) -> Codec:
    return load_codec(tiny_checkpoint / "codec")


def model(vocabulary: Vocabulary, seed: int, **sizes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    return make_model(ModelConfig(**SIZES | sizes), vocabulary.size, vocabulary.pad, vocabulary.end)


def save(folder: Path, vocabulary: Vocabulary, codec_folder: Path) -> Path:
    save_checkpoint(
        folder, model(vocabulary, 7), codec_folder, TEXT, vocabulary,
        name="older", max_audio_seconds=2.0, max_answer_tokens=6, tasks=["transcribe"],
    )  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("older", "newer", "taken"),
    [
        # text and controls, times, codebooks: rows here, and rows there
        (PLAIN, RICH, [((0, FIRST), (0, FIRST)), ((FIRST + 51, FIRST + 67), (FIRST, FIRST + 16))]),
        (RICH, PLAIN, [((0, FIRST), (0, FIRST)), ((FIRST, FIRST + 16), (FIRST + 51, FIRST + 67))]),
        (RICH, RICH, [((0, RICH.size), (0, RICH.size))]),
        (RICH, MARKED, [((0, RICH.size), (0, RICH.size))]),  # no new ids: those of answers
    ],
    ids=["more codebooks and times", "fewer", "the same", "marks of time"],
)
def test_what_means_the_same_is_taken_over(
    older: Vocabulary, newer: Vocabulary, taken: list[Any], tiny_checkpoint: Path, codec: Codec, tmp_path: Path
) -> None:
    folder = save(tmp_path / "older", older, tiny_checkpoint / "codec")
    theirs = load_checkpoint(folder).lm.state_dict()
    lm = model(newer, 8)
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    start_from(folder, lm, newer, TEXT, codec)
    after = lm.state_dict()

    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    for name in after.keys() - tables:
        assert torch.equal(after[name], theirs[name]), name
        assert name.endswith("norm.weight") or not torch.equal(after[name], before[name]), name
    for name in tables:
        expected = before[name]
        for (here, to), (there, until) in taken:
            expected[here:to] = theirs[name][there:until]
        assert torch.equal(after[name], expected)
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


@torch.no_grad()
def test_a_dense_model_becomes_experts_that_answer_alike(tiny_checkpoint: Path, codec: Codec, tmp_path: Path) -> None:
    dense = model(PLAIN, 7, num_experts=1, top_k=1)
    save_checkpoint(
        tmp_path, dense, tiny_checkpoint / "codec", TEXT, PLAIN,
        name="dense", max_audio_seconds=2.0, max_answer_tokens=6, tasks=["transcribe"],
    )  # fmt: skip
    lm = model(PLAIN, 8)
    routers = {name: value.clone() for name, value in lm.state_dict().items() if name.endswith("gate.weight")}
    start_from(tmp_path, lm, PLAIN, TEXT, codec)
    ids = torch.randint(0, PLAIN.size, (2, 20))
    assert torch.allclose(lm(ids).logits, load_checkpoint(tmp_path).lm(ids).logits, atol=1e-4)
    assert lm.config.num_local_experts == 4
    assert routers and all(torch.equal(lm.state_dict()[name], value) for name, value in routers.items())
    with pytest.raises(InputError, match="a model of another size"):
        start_from(tmp_path, model(PLAIN, 8, expert_size=16), PLAIN, TEXT, codec)


def test_what_cannot_be_a_start_is_named_in_one_line(tiny_checkpoint: Path, codec: Codec, tmp_path: Path) -> None:
    torch.manual_seed(1)
    assert isinstance(codec, SpeechCodec)
    other_codec = filled(SpeechCodec(codec.config))
    other_text: Any = SimpleNamespace(model_bytes=b"other")
    wider = Vocabulary(TEXT.size, n_q=1, card=17)
    cases: list[tuple[Path, PreTrainedModel, Vocabulary, Any, Codec, str]] = [
        (tmp_path, model(PLAIN, 0), PLAIN, TEXT, codec, "not a checkpoint folder"),
        (tiny_checkpoint, model(PLAIN, 0), PLAIN, other_text, codec, "another text model: name it as text_model"),
        (tiny_checkpoint, model(PLAIN, 0), PLAIN, TEXT, other_codec, "another codec: name its codec/ as codec"),
        (tiny_checkpoint, model(wider, 0), wider, TEXT, codec, "another codec"),
    ]
    for sizes in ({"expert_size": 16}, {"num_layers": 3}, {"num_layers": 1}, {"num_heads": 8, "num_kv_heads": 4}):
        lm = model(PLAIN, 0, **sizes)  # the last: weights of the same shapes that are read otherwise
        cases.append((tiny_checkpoint, lm, PLAIN, TEXT, codec, "a model of another size"))
    for folder, lm, vocabulary, text, with_codec, message in cases:
        before = {name: value.clone() for name, value in lm.state_dict().items()}
        with pytest.raises(InputError, match=message) as error:
            start_from(folder, lm, vocabulary, text, with_codec)
        assert str(error.value).startswith(f"start_from: {folder}")
        assert "\n" not in str(error.value)
        assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())
