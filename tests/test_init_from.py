"""Starting from somebody else's causal LM: its rows and its tokenizer stay; what cannot be a start is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import run_program, write_yaml
from test_pretrain import STOPPED, records, run_here, weights_of
from test_text import LINES, byte_level, wordpiece
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from serve.cli import app
from speechllm.checkpoint import load_checkpoint
from speechllm.errors import InputError
from speechllm.model import load_model
from speechllm.text import HuggingFaceTokenizer
from train import trainer
from train.init_from import open_lm, unfit

ROWS = 352  # of the tables; the tokenizer has fewer ids
# not the sizes our own models have by default
SIZES: dict[str, Any] = {
    "vocab_size": ROWS, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 480, "initializer_range": 0.05, "eos_token_id": 5,
}  # fmt: skip


def qwen3_moe() -> PreTrainedModel:
    sizes = SIZES | {"head_dim": 8, "intermediate_size": 32, "moe_intermediate_size": 16, "tie_word_embeddings": True}
    config = transformers.Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, attention_dropout=0.2)
    return transformers.Qwen3MoeForCausalLM(config)


def llama(rows: int = ROWS) -> PreTrainedModel:
    sizes = SIZES | {"vocab_size": rows, "intermediate_size": 32}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=False))


def mixtral() -> PreTrainedModel:
    config = transformers.MixtralConfig(**SIZES, intermediate_size=16, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"qwen3_moe": qwen3_moe, "llama": llama, "mixtral": mixtral}


def save(lm: PreTrainedModel, folder: Path) -> Path:
    """A folder as on the hub: the model in half precision, and its tokenizer."""
    lm.bfloat16().save_pretrained(folder)
    byte_level().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module", params=MODELS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    return save(MODELS[request.param](), tmp_path_factory.mktemp("base") / request.param)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The folder of a Llama, to damage."""
    torch.manual_seed(3)
    return save(llama(), tmp_path / "base")


@pytest.fixture(scope="module")
def settings(pretrain_settings: dict[str, Any]) -> dict[str, Any]:
    """Of a short run, without what an LM brings."""
    rest = {name: value for name, value in pretrain_settings.items() if name not in ("model", "text_model")}
    steps = {"curriculum": {}, "steps": 8, "log_every": 2, "evaluate_every": 8, "save_every": 4}
    return rest | steps


def tables_of(lm: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Input and output embeddings."""
    return {"in": lm.get_input_embeddings().weight.detach(), "out": lm.get_output_embeddings().weight.detach()}


def test_a_model_is_opened_as_it_is(base: Path) -> None:
    lm, text = open_lm(str(base), 2)
    theirs = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert lm.training
    assert {value.dtype for value in lm.state_dict().values()} == {torch.float32}
    assert lm.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name].float()) for name, value in lm.state_dict().items())
    assert isinstance(text, HuggingFaceTokenizer)
    assert text.model_bytes == (base / "tokenizer.json").read_bytes()
    assert text.encode(LINES[0]) == byte_level().encode(LINES[0]).ids
    assert text.size < ROWS


@pytest.fixture(scope="module")
def run(base: Path, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run that starts from the LM."""
    out = tmp_path_factory.mktemp("runs") / "run"
    config = write_yaml(out.with_name("pretrain.yaml"), settings | {"out": out, "init_from": base})
    result = run_program("python", "train/pretrain.py", "--config", config)
    assert result.returncode == 0, result.stderr
    return out


@pytest.mark.parametrize("base", ["qwen3_moe", "llama"], indirect=True)
def test_a_run_ends_with_a_checkpoint_that_needs_nothing_else(run: Path, base: Path, corpus: Path) -> None:
    losses = [r for r in records(run) if "loss" in r]
    assert [r["step"] for r in losses] == [2, 4, 6, 8]
    mixture = base.name != "llama"
    for r in losses:
        assert ("aux" in r, "busiest_expert" in r) == (mixture, mixture)
        assert not mixture or 0 <= r["idlest_expert"] < 0.25 < r["busiest_expert"] <= 0.5

    away = base.with_name("away")
    shutil.move(base, away)
    try:
        checkpoint = load_checkpoint(run / "checkpoint")
        (clip, *_) = sorted(corpus.rglob("*.wav")) or sorted(corpus.rglob("*.flac"))
        arguments = ["ask", "--model", str(run / "checkpoint"), "Transcribe this audio", str(clip), "--format", "json"]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    finally:
        shutil.move(away, base)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["seconds_consumed"] == answer["seconds_in"] > 0
    assert "\ufffd" not in answer["text"] or answer["finish_reason"] == "length"  # half a character, cut

    vocabulary, config = checkpoint.vocabulary, checkpoint.lm.config
    assert vocabulary.text_size == ROWS
    assert checkpoint.text.model_bytes == (base / "tokenizer.json").read_bytes()
    assert not (run / "checkpoint" / "text.model").exists()
    theirs = AutoModelForCausalLM.from_pretrained(base).config.to_dict()
    changed = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "dtype", "_name_or_path"}
    assert {k: v for k, v in config.to_dict().items() if k not in changed} == {
        k: v for k, v in theirs.items() if k not in changed
    }
    loaded = AutoModelForCausalLM.from_pretrained(run / "checkpoint" / "lm")
    assert type(loaded) is type(checkpoint.lm)
    assert loaded.config.vocab_size == vocabulary.size == ROWS + 32 + checkpoint.codec.card
    for ids in (loaded.config, loaded.generation_config):
        assert (ids.pad_token_id, ids.bos_token_id, ids.eos_token_id) == (vocabulary.pad, None, vocabulary.end)
    before = tables_of(AutoModelForCausalLM.from_pretrained(base))
    assert not any(torch.equal(value[:ROWS], before[name]) for name, value in tables_of(loaded).items()), "not trained"


def test_rows_of_text_are_those_of_the_model_and_new_ones_lie_among_them(
    base: Path,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The model is looked at before the first step."""
    models: list[PreTrainedModel] = []

    def caught(objective: torch.nn.Module, lm: PreTrainedModel, *_: object) -> None:
        models.append(lm)
        raise InputError("seen")

    monkeypatch.setattr(trainer, "start_engine", caught)
    config = write_yaml(tmp_path / "pretrain.yaml", settings | {"out": tmp_path / "run", "init_from": base})
    assert run_here(monkeypatch, capsys, "--config", config) == "error: seen"
    before, after = load_model(base), models[0]
    assert after.training
    assert after.state_dict().keys() == before.state_dict().keys()
    for name, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[name][: len(value)], value), name
    for name, table in tables_of(after).items():
        own, controls, codes = table[:ROWS], table[ROWS : ROWS + 32], table[ROWS + 32 :]
        assert torch.equal(own, tables_of(before)[name])
        assert torch.allclose(codes.mean(0), own.mean(0), atol=1e-6)
        for rows in (controls, codes):
            assert ((rows - own.mean(0)) / own.std(0)).std().item() == pytest.approx(1, abs=0.2)
            assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize("base", ["qwen3_moe"], indirect=True)
def test_a_stopped_run_goes_on(base: Path, run: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = write_yaml(tmp_path / "pretrain.yaml", settings | {"out": out, "init_from": base})
    stopped = run_program("python", "-c", STOPPED, "--config", config, 3)
    assert "stopped after step 4; go on with --resume" in stopped.stderr
    assert [r["step"] for r in records(out)] == [2, 4]
    resumed = run_program("python", "train/pretrain.py", "--config", config, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert records(out) == records(run)
    assert all(torch.equal(value, weights_of(run)[name]) for name, value in weights_of(out).items())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def lose_a_weight(folder: Path) -> None:
    lm = llama()
    state = {name: value for name, value in lm.state_dict().items() if name != "model.norm.weight"}
    lm.save_pretrained(folder, state_dict=state)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(llama().state_dict(), folder / "pytorch_model.bin")


def other_lm(make: Callable[[], PreTrainedModel]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        save(make(), folder)

    return change


def roberta() -> PreTrainedModel:
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    return transformers.RobertaForCausalLM(transformers.RobertaConfig(**sizes, intermediate_size=32))


def t5() -> PreTrainedModel:
    config = transformers.T5Config(vocab_size=ROWS, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def granite() -> PreTrainedModel:
    return transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**SIZES, intermediate_size=32, logits_scaling=4.0)
    )


def opt() -> PreTrainedModel:
    config = transformers.OPTConfig(
        vocab_size=ROWS, hidden_size=24, word_embed_proj_dim=24, num_hidden_layers=2, num_attention_heads=4, ffn_dim=32,
        init_std=0.3,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


CAUSAL, WAY_OUT = "no causal LM can be had there", "safetensors, or download one"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, r"base: no such folder, and no name on the hub \(org/name\)"),
    "no config": (lambda f: (f / "config.json").unlink(), f"{CAUSAL}.*config.json.*{WAY_OUT}"),
    "config cut": (lambda f: cut(f / "config.json"), f"{CAUSAL}.*{WAY_OUT}"),
    "config of another type": (lambda f: rewrite(f / "config.json", hidden_size="wide"), f"{CAUSAL}.*hidden_size"),
    "unknown model": (lambda f: rewrite(f / "config.json", model_type="oracle"), f"{CAUSAL}.*oracle"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), f"{CAUSAL}.*model.safetensors"),
    "weights cut": (lambda f: cut(f / "model.safetensors"), CAUSAL),
    "a weight missing": (lose_a_weight, f"{CAUSAL} .no weights for model.norm.weight"),
    "weights pickled": (pickled, f"{CAUSAL}.*model.safetensors"),
    "other sizes": (lambda f: rewrite(f / "config.json", hidden_size=32), CAUSAL),
    "code of its own": (
        lambda f: rewrite(f / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"}),
        f"{CAUSAL}.*{WAY_OUT}",
    ),
    "an encoder and a decoder": (other_lm(t5), f"{CAUSAL}.*Unrecognized configuration class"),
    "an encoder": (other_lm(roberta), "base: not causal, .*: take another LM"),
    "scaled logits": (other_lm(granite), "its logits are scaled or capped, .*: take another LM"),
    "rows are not kept apart": (other_lm(opt), "packed into one row see one another: take another LM"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "base: holds no tokenizer.json: write it with Auto"),
    "tokenizer cut": (lambda f: cut(f / "tokenizer.json"), r"tokenizer\.json: not a tokenizer\.json that"),
    "uncased tokenizer": (lambda f: wordpiece().save(str(f / "tokenizer.json")), "does not keep every text; only BPE"),
    "tokenizer of a larger model": (
        other_lm(lambda: llama(100)),
        r"its tokenizer has \d+ ids, its model 100: they do not belong together",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_what_cannot_be_a_start_is_named_in_one_line(
    damage: Callable[[Path], object], message: str, copy: Path
) -> None:
    assert open_lm(str(copy), 2)[0].config.vocab_size == ROWS
    damage(copy)
    with pytest.raises(InputError, match=message) as error:
        open_lm(str(copy), 2)
    assert str(error.value).startswith(f"init_from: {copy}")
    assert "\n" not in str(error.value)


def test_a_config_without_positions(copy: Path) -> None:
    lm = load_model(copy)
    assert unfit(lm) is None
    lm.config.__dict__["max_position_embeddings"] = None
    assert unfit(lm) == "its config has no max_position_embeddings"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"num_layers": 2}}, "init_from brings its own weights, sizes and text tokenizer: leave out model"),
        ({"text_model": "tokenizers/text.model"}, "leave out text_model"),
        ({"start_from": "runs/tiny/checkpoint"}, "leave out start_from"),
        ({"init_from": ""}, "init_from: String should have at least 1 character"),
        ({"init_from": "nowhere"}, "error: init_from: nowhere: no such folder, and no name on the hub"),
        ({"ctc_layer": 3}, "ctc_layer = 3 exceeds the 2 layers of init_from: "),
        ({"max_answer_tokens": 100}, "make sequences of 500 ids; init_from: "),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else "",
)
def test_settings_that_contradict_it_are_named(
    change: dict[str, Any],
    message: str,
    copy: Path,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = settings | {"out": tmp_path / "run", "init_from": copy} | change
    error = run_here(monkeypatch, capsys, "--config", write_yaml(tmp_path / "pretrain.yaml", changed))
    assert message in error
    assert not (tmp_path / "run").exists()


def test_without_the_ctc_head_its_layer_is_not_asked_for(copy: Path) -> None:
    assert open_lm(str(copy), 0)[0].config.num_hidden_layers == 2
