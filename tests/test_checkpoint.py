"""A checkpoint is whole, needs nothing outside its folder, and says what is wrong with it when it is not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import filled
from safetensors.torch import load_file, save_file
from test_text import byte_level
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

import speechllm.checkpoint
from speechllm.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from speechllm.codec import SpeechCodec, SpeechCodecConfig, save_codec
from speechllm.errors import InputError
from speechllm.model import ModelConfig, make_model
from speechllm.text import HuggingFaceTokenizer, TextTokenizer
from speechllm.vocabulary import Vocabulary
from train.text_tokenizer import train_text_tokenizer

TEXT = TextTokenizer.load(Path(__file__).parents[1] / "tokenizers" / "text.model")
VOCABULARY = Vocabulary(text_size=TEXT.size, n_q=2, card=16)
CODEC = SpeechCodecConfig(
    n_mels=16, card=16, n_acoustic=1, dim=16, depth=1, recognizer_depth=1, kernel=3, code_dim=4,
    acoustic_dim=16, acoustic_depth=1, decoder_dim=16, decoder_depth=1,
)  # fmt: skip
SIZES = ModelConfig(hidden_size=32, num_layers=2, expert_size=32, num_experts=4, max_positions=64)
NAMES: dict[str, Any] = {"name": "tiny", "max_audio_seconds": 8.0, "max_answer_tokens": 6, "tasks": ("transcribe",)}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """What is saved, before it was."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("parts")
    codec, lm = filled(SpeechCodec(CODEC)), make_model(SIZES, VOCABULARY.size, VOCABULARY.pad, VOCABULARY.end).eval()
    save_codec(codec, folder / "codec")
    save_checkpoint(folder / "checkpoint", lm, folder / "codec", TEXT, VOCABULARY, **NAMES)
    settings = load_checkpoint(folder / "checkpoint").settings
    return Checkpoint(lm, codec, TEXT, VOCABULARY, settings, folder / "checkpoint")


@pytest.fixture
def folder(parts: Checkpoint, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(parts.folder, tmp_path / "checkpoint"))


@torch.inference_mode()
def logits_of(checkpoint: Checkpoint) -> torch.Tensor:
    return checkpoint.lm(input_ids=torch.arange(0, VOCABULARY.size, 101)[None]).logits


def test_round_trip(parts: Checkpoint, folder: Path) -> None:
    shutil.move(folder, folder.with_name("elsewhere"))
    again = load_checkpoint(folder.with_name("elsewhere"))
    assert torch.equal(logits_of(again), logits_of(parts))
    assert not again.lm.training
    wav = 0.1 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(1))
    codes = parts.encode(wav)
    assert codes.shape == (2, 25)
    assert len(codes.unique()) > 3
    assert torch.equal(again.encode(wav), codes)
    assert torch.equal(again.codec.decode(codes), parts.codec.decode(codes))
    assert again.text.model_bytes == TEXT.model_bytes
    assert again.vocabulary == VOCABULARY
    assert again.settings.model_dump().items() >= NAMES.items()


def test_the_lm_sees_no_more_codebooks_than_its_vocabulary_has(tmp_path: Path) -> None:
    torch.manual_seed(0)
    codec, words = filled(SpeechCodec(CODEC)), Vocabulary(TEXT.size, n_q=1, card=16, merge_repeats=True)
    save_codec(codec, tmp_path / "codec")
    lm = make_model(SIZES, words.size, words.pad, words.end)
    save_checkpoint(tmp_path / "checkpoint", lm, tmp_path / "codec", TEXT, words, **NAMES)
    wav = 0.1 * torch.randn(1, 8000)
    again = load_checkpoint(tmp_path / "checkpoint")
    assert again.vocabulary.merge_repeats
    assert torch.equal(again.encode(wav), codec.encode(wav)[:1])


def test_shards_hold_the_same_and_none_of_an_older_save_stays(
    parts: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speechllm.checkpoint, "MAX_SHARD", "50KB")
    (folder / "adapters" / "mine").mkdir(parents=True)
    save_checkpoint(folder, parts.lm, parts.folder / "codec", TEXT, VOCABULARY, **NAMES)
    shards = sorted(path.name for path in (folder / "lm").glob("*.safetensors"))
    assert len(shards) > 2
    assert (folder / "adapters" / "mine").is_dir()
    assert "model.safetensors" not in shards
    assert torch.equal(logits_of(load_checkpoint(folder)), logits_of(parts))
    monkeypatch.undo()
    save_checkpoint(folder, parts.lm, parts.folder / "codec", TEXT, VOCABULARY, **NAMES)
    assert [path.name for path in (folder / "lm").glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(logits_of(load_checkpoint(folder)), logits_of(parts))


def test_a_tokenizer_of_hugging_face_is_kept_with_rows_to_spare(parts: Checkpoint, folder: Path) -> None:
    """Saved where a checkpoint with a text.model was: of the two only the new one stays."""
    text = HuggingFaceTokenizer(byte_level().to_str().encode())
    vocabulary = Vocabulary(text.size + 7, n_q=2, card=16)
    lm = make_model(SIZES, vocabulary.size, vocabulary.pad, vocabulary.end)
    save_checkpoint(folder, lm, parts.folder / "codec", text, vocabulary, **NAMES)
    assert {path.name for path in folder.iterdir()} == {"lm", "codec", "tokenizer.json", "speechllm.json"}
    again = load_checkpoint(folder)
    assert isinstance(again.text, HuggingFaceTokenizer)
    assert again.text.model_bytes == (folder / "tokenizer.json").read_bytes() == text.model_bytes
    assert again.vocabulary == vocabulary

    (folder / "tokenizer.json").write_bytes(text.model_bytes + b"\n")  # of the same meaning, but not what was saved
    with pytest.raises(InputError, match=r"tokenizer\.json is not the one it was trained with"):
        load_checkpoint(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"text\.model: cannot read"):
        load_checkpoint(folder)
    fewer = Vocabulary(text.size - 1, n_q=2, card=16)
    lm = make_model(SIZES, fewer.size, fewer.pad, fewer.end)
    save_checkpoint(folder, lm, parts.folder / "codec", text, fewer, **NAMES)
    with pytest.raises(InputError, match=f"tokenizer.json has {text.size} pieces, the vocabulary {text.size - 1}"):
        load_checkpoint(folder)


def test_half_precision_rounds_the_weights_and_nothing_else(parts: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, parts.lm, parts.folder / "codec", TEXT, VOCABULARY, **NAMES, dtype=torch.bfloat16)
    again, expected = load_checkpoint(tmp_path).lm.state_dict(), parts.lm.state_dict()
    assert all(torch.equal(value, expected[name].bfloat16().float()) for name, value in again.items())
    assert {parameter.dtype for parameter in parts.lm.parameters()} == {torch.float32}
    told = [json.loads((folder / "lm" / "config.json").read_text())["dtype"] for folder in (tmp_path, parts.folder)]
    assert told == ["bfloat16", "float32"]
    assert parts.lm.config.dtype != "bfloat16", "the model in memory is what it was"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "lm", dtype="auto").dtype == torch.bfloat16


def test_a_table_of_two_names_is_stored_once(parts: Checkpoint, tmp_path: Path) -> None:
    """Whatever the LM calls its output table."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    for tied in (True, False):
        lm = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCABULARY.size, **sizes, tie_word_embeddings=tied)).eval()
        weights = {name: value.clone() for name, value in lm.state_dict().items()}  # as gathered from ranks
        save_checkpoint(tmp_path, lm, parts.folder / "codec", TEXT, VOCABULARY, **NAMES, weights=weights)
        stored = load_file(tmp_path / "lm" / "model.safetensors")
        assert ("embed_out.weight" in stored) != tied
        again = load_checkpoint(tmp_path).lm.state_dict()
        assert again.keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in again.items())


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def other_text(folder: Path) -> None:
    train_text_tokenizer([f"a line of {n} words" for n in range(200)], 360, folder / "text.model")


def other_lm(folder: Path) -> None:
    make_model(SIZES, VOCABULARY.size + 1, VOCABULARY.pad, VOCABULARY.end).save_pretrained(folder / "lm")


def lose_a_weight(folder: Path) -> None:
    weights = load_file(folder / "lm" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "lm" / "model.safetensors", {"format": "pt"})


def lose_a_shard(folder: Path) -> None:
    lm = make_model(SIZES, VOCABULARY.size, VOCABULARY.pad, VOCABULARY.end)
    (folder / "lm" / "model.safetensors").unlink()
    lm.save_pretrained(folder / "lm", max_shard_size="50KB")
    sorted((folder / "lm").glob("*.safetensors"))[1].unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no settings": (
        lambda f: (f / "speechllm.json").unlink(),
        r"checkpoint: not a checkpoint folder .*speechllm\.json",
    ),
    "no folder": (shutil.rmtree, r"checkpoint: not a checkpoint folder"),
    "settings cut": (lambda f: cut(f / "speechllm.json"), r"speechllm\.json: not a checkpoint's settings"),
    "settings binary": (lambda f: (f / "speechllm.json").write_bytes(b"\xff\xfe\x00"), r"speechllm\.json: not a"),
    "settings unknown": (lambda f: rewrite(f / "speechllm.json", colour="red"), r"speechllm\.json: .*colour"),
    "vocabulary": (
        lambda f: rewrite(f / "speechllm.json", vocabulary={"n_q": 1}),
        r"speechllm\.json: vocabulary\.acoustic_stride",
    ),
    "no text model": (lambda f: (f / "text.model").unlink(), r"text\.model: cannot read"),
    "text model cut": (lambda f: cut(f / "text.model"), r"text\.model: "),
    "other text model": (other_text, r"checkpoint: .* text\.model is not the one it was trained with"),
    "no lm": (lambda f: shutil.rmtree(f / "lm"), r"checkpoint/lm: "),
    "no lm config": (lambda f: (f / "lm" / "config.json").unlink(), r"checkpoint/lm: "),
    "lm config cut": (lambda f: cut(f / "lm" / "config.json"), r"checkpoint/lm: "),
    "lm config of another type": (
        lambda f: rewrite(f / "lm" / "config.json", hidden_size="wide"),
        r"checkpoint/lm: .*hidden_size",
    ),
    "no lm weights": (lambda f: (f / "lm" / "model.safetensors").unlink(), r"checkpoint/lm: "),
    "lm weights cut": (lambda f: cut(f / "lm" / "model.safetensors"), r"checkpoint/lm: "),
    "lm weight missing": (lose_a_weight, r"checkpoint/lm: .*model\.norm\.weight"),
    "lm shard missing": (lose_a_shard, r"checkpoint/lm: .*model-00002-of-"),
    "lm of other sizes": (lambda f: rewrite(f / "lm" / "config.json", hidden_size=64), r"checkpoint/lm: "),
    "other lm": (other_lm, f"language model has {VOCABULARY.size + 1} ids, the vocabulary {VOCABULARY.size}"),
    "no codec": (lambda f: shutil.rmtree(f / "codec"), r"checkpoint/codec: not a codec folder"),
    "codec config": (lambda f: (f / "codec" / "config.json").write_text("[]"), r"codec/config\.json: not a codec's"),
    "codec binary": (
        lambda f: (f / "codec" / "config.json").write_bytes(b"\xff"),
        r"codec/config\.json: not a codec's",
    ),
    "codec weights cut": (lambda f: cut(f / "codec" / "model.safetensors"), r"codec/model\.safetensors: damaged"),
    "codec card": (
        lambda f: save_codec(filled(SpeechCodec(CODEC.model_copy(update={"card": 32}))), f / "codec"),
        r"checkpoint: .* the codec has 32 codes, the vocabulary 16",
    ),
    "another codec": (
        lambda f: save_codec(filled(SpeechCodec(CODEC)), f / "codec"),
        r"checkpoint: .* codec is not the codec whose codes it was trained on",
    ),
    "semantic codec": (
        lambda f: rewrite(f / "speechllm.json", **settings_of(Vocabulary(TEXT.size, n_q=3, card=16))),
        r"checkpoint: .* the codec has 2 codebooks, the vocabulary 3",
    ),
}


def settings_of(vocabulary: Vocabulary) -> dict[str, object]:
    return {"vocabulary": vocabulary.to_dict(), "fingerprint": vocabulary.fingerprint(TEXT.model_bytes)}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_in_one_line(damage: Callable[[Path], object], message: str, folder: Path) -> None:
    load_checkpoint(folder)
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        load_checkpoint(folder)
    assert "\n" not in str(error.value)
