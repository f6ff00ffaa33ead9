"""The backbone: what Hugging Face loads is what was made, and its sizes are those asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from speechllm.errors import InputError
from speechllm.model import (
    ModelConfig,
    experts,
    extend_model,
    load_model,
    make_model,
    parameter_counts,
    set_embedding_rows,
)
from train.config import Settings, read_config

SIZES = ModelConfig(hidden_size=32, num_layers=2, expert_size=16, num_experts=4, max_positions=64)
VOCABULARY_SIZE, PAD, END = 100, 90, 91


@pytest.fixture
def lm() -> PreTrainedModel:
    torch.manual_seed(0)
    return make_model(SIZES, VOCABULARY_SIZE, PAD, END).eval()


def table_of(lm: PreTrainedModel) -> torch.Tensor:
    embeddings = lm.get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Embedding)
    return embeddings.weight


@torch.inference_mode()
def logits_of(lm: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(40).reshape(2, 20) * 7 % VOCABULARY_SIZE
    return lm(input_ids=ids).logits


def test_config_reaches_the_model(lm: PreTrainedModel) -> None:
    config = lm.config
    assert (config.model_type, config.vocab_size, config.max_position_embeddings) == ("mixtral", VOCABULARY_SIZE, 64)
    assert (config.num_local_experts, config.num_experts_per_tok) == (4, 2)
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (PAD, END, None)
    assert lm.get_output_embeddings().weight is table_of(lm)
    other = make_model(SIZES.model_copy(update={"rope_theta": 100.0}), VOCABULARY_SIZE, PAD, END).eval()
    other.load_state_dict(lm.state_dict())
    assert not torch.allclose(logits_of(other), logits_of(lm))


@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
def test_hugging_face_loads_it_with_equal_logits(lm: PreTrainedModel, max_shard_size: str, tmp_path: Path) -> None:
    lm.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) == 1 if max_shard_size == "50GB" else len(shards) > 2
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path).eval(), load_model(tmp_path)):
        assert not again.training
        assert type(again) is type(lm)
        weights, expected = again.state_dict(), lm.state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert torch.equal(logits_of(again), logits_of(lm))


def test_half_precision_weights_are_loaded_as_float32_on_a_cpu(lm: PreTrainedModel, tmp_path: Path) -> None:
    lm.bfloat16().save_pretrained(tmp_path)
    again = load_model(tmp_path, "cpu")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert all(torch.equal(w, lm.state_dict()[name].float()) for name, w in again.state_dict().items())


def test_a_missing_weight_is_an_error_not_a_random_number(lm: PreTrainedModel, tmp_path: Path) -> None:
    state = {name: value for name, value in lm.state_dict().items() if name != "model.layers.1.self_attn.q_proj.weight"}
    lm.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj"):
        load_model(tmp_path)


def test_parameter_counts_by_hand(lm: PreTrainedModel) -> None:
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32  # 4 heads and 2 key-value heads of 8
    expert, router, norms = 3 * 32 * 16, 4 * 32, 2 * 32
    rest = VOCABULARY_SIZE * 32 + 2 * (attention + router + norms) + 32
    assert parameter_counts(lm) == (rest + 2 * 4 * expert, rest + 2 * 2 * expert)


def qwen3_moe(**sizes: Any) -> PreTrainedModel:
    sizes = {"vocab_size": VOCABULARY_SIZE, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8} | sizes
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        num_hidden_layers=2, num_key_value_heads=2, intermediate_size=48, moe_intermediate_size=16, num_experts=8,
        num_experts_per_tok=3, max_position_embeddings=64, tie_word_embeddings=True, eos_token_id=7, **sizes,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def biased() -> PreTrainedModel:
    """A model whose output has a bias too."""
    torch.manual_seed(0)
    lm = GPTJForCausalLM(GPTJConfig(vocab_size=VOCABULARY_SIZE, n_embd=32, n_layer=1, n_head=4, rotary_dim=8)).eval()
    torch.nn.init.normal_(lm.get_output_embeddings().bias, mean=3.0)
    return lm


def test_experts_are_found_under_each_name_and_a_dense_model_has_none(lm: PreTrainedModel) -> None:
    assert experts(lm.config) == (4, 2)
    assert experts(qwen3_moe().config) == (8, 3)
    assert experts(llama().config) is None


def test_parameter_counts_of_other_models() -> None:
    mixture, dense = qwen3_moe(mlp_only_layers=[0]), llama()
    total = sum(p.numel() for p in mixture.parameters())
    assert parameter_counts(mixture) == (total, total - (8 - 3) * 3 * 32 * 16)  # one layer of the two has experts
    total = sum(p.numel() for p in dense.parameters())
    assert parameter_counts(dense) == (total, total)


@pytest.mark.parametrize("make", [qwen3_moe, llama, biased])
def test_an_extended_model_keeps_its_rows_bit_for_bit(make: Any) -> None:
    lm = make()
    with torch.no_grad():  # mean and spread that differ from dimension to dimension
        for table in {lm.get_input_embeddings().weight, lm.get_output_embeddings().weight}:
            table.mul_(torch.linspace(1, 4, 32)).add_(torch.linspace(-1, 1, 32))
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    known = logits_of(lm)
    extend_model(lm, 2100, 2000, 2001, seed=3)
    after = lm.state_dict()
    assert after.keys() == before.keys()
    tables = [name for name, value in before.items() if len(value) == VOCABULARY_SIZE]
    assert len(tables) == (3 if make is biased else 2)
    for name, value in before.items():
        assert torch.equal(after[name][: len(value)], value), name
        assert len(after[name]) == (2100 if name in tables else len(value))
    for name in tables:
        own, new = after[name][:VOCABULARY_SIZE], after[name][VOCABULARY_SIZE:]
        if own.ndim == 1:
            assert torch.equal(new, own.mean().expand(2000))
            continue
        spread = own.std(0)
        assert ((new.mean(0) - own.mean(0)).abs() < 0.15 * spread).all()
        assert ((new.std(0) / spread - 1).abs() < 0.1).all()
    if make is qwen3_moe:
        assert lm.get_output_embeddings().weight is table_of(lm)
    else:
        assert not torch.equal(lm.get_output_embeddings().weight, table_of(lm))
    assert torch.allclose(logits_of(lm)[..., :VOCABULARY_SIZE], known, atol=1e-5)
    assert logits_of(lm).shape[-1] == lm.config.vocab_size == 2100
    for settings in (lm.config, lm.generation_config):
        assert (settings.pad_token_id, settings.bos_token_id, settings.eos_token_id) == (2000, None, 2001)

    again = make()
    again.load_state_dict(before)
    extend_model(again, 2100, 2000, 2001, seed=3)
    assert all(torch.equal(value, after[name]) for name, value in again.state_dict().items())


def test_rows_for_vectors_lie_where_the_models_own_rows_do() -> None:
    lm = llama()
    with torch.no_grad():
        for scale, table in enumerate((table_of(lm), lm.get_output_embeddings().weight), 2):
            table.mul_(scale * torch.linspace(1, 4, 32)).add_(scale)
    extend_model(lm, 2200, 100, 101)
    before = [table.detach().clone() for table in (table_of(lm), lm.get_output_embeddings().weight)]
    vectors = torch.randn(2000, 64, generator=torch.Generator().manual_seed(5))
    set_embedding_rows(lm, 150, vectors, own=VOCABULARY_SIZE)
    for table, old in zip((table_of(lm), lm.get_output_embeddings().weight), before, strict=True):
        own, rows = table[:VOCABULARY_SIZE], table[150:2150]
        assert torch.equal(table[:150], old[:150])
        assert torch.equal(table[2150:], old[2150:])
        assert torch.allclose(rows.mean(0), own.mean(0), atol=1e-4)
        assert ((rows.std(0) / own.std(0) - 1).abs() < 0.5).all()
        centred = (rows - rows.mean(0)) / own.std(0)  # what a projection keeps of the vectors: which are alike
        alike = torch.nn.functional.cosine_similarity(centred[:1], centred[1:])
        expected = torch.nn.functional.cosine_similarity(vectors[:1] - vectors.mean(0), vectors[1:] - vectors.mean(0))
        assert torch.corrcoef(torch.stack([alike, expected]))[0, 1] > 0.4


def test_embedding_rows_follow_the_vectors_and_no_other_row_moves(lm: PreTrainedModel) -> None:
    before = table_of(lm).detach().clone()
    weights = {name: value.clone() for name, value in lm.state_dict().items() if "embed" not in name}
    generator = torch.Generator().manual_seed(5)
    vectors = torch.randn(20, 64, generator=generator)
    vectors[10:] = vectors[:10] + 0.1 * torch.randn(10, 64, generator=generator)  # row 10 + n is like row n
    set_embedding_rows(lm, 40, vectors)
    table = table_of(lm).detach()
    assert torch.equal(table[:40], before[:40])
    assert torch.equal(table[60:], before[60:])
    assert lm.get_output_embeddings().weight.data_ptr() == table.data_ptr()
    assert all(torch.equal(lm.state_dict()[name], value) for name, value in weights.items() if name != "lm_head.weight")

    rows = table[40:60]
    similarity = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    alike = similarity[torch.arange(10), torch.arange(10) + 10]
    assert alike.min() > 0.95
    unlike = similarity[:10, :10][~torch.eye(10, dtype=torch.bool)]
    assert unlike.max() < 0.8
    assert rows.std().item() == pytest.approx(lm.config.initializer_range, rel=1e-4)
    assert rows.mean(0).abs().max() < 1e-6

    set_embedding_rows(lm, 40, vectors)
    assert torch.equal(table_of(lm).detach()[40:60], rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 36, "num_heads": 8}, "num_heads must divide hidden_size"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads must divide num_heads"),
        ({"top_k": 5, "num_experts": 4}, "top_k = 5 exceeds num_experts = 4"),
        ({"num_layers": 0}, "num_layers"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"hidden_dim": 64}, "hidden_dim"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**settings)

    class File(Settings):
        model: ModelConfig

    path = tmp_path / "config.yaml"
    path.write_text(f"model: {settings}")
    with pytest.raises(InputError, match=f"config.yaml: model.*{message}"):
        read_config(path, File)
