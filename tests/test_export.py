"""An exported language model is the checkpoint's: the same weights, the same answers, in anybody's hands."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, clip, command
from test_adapter import logits, make_adapter
from transformers import AutoModelForCausalLM
from typer import Typer
from typer.testing import CliRunner

from serve.answer import Answer
from serve.answerer import Answerer
from serve.export import Dtype, export, served_name, write_export
from serve.vllm_client import MOST_IDS
from speechllm.checkpoint import Checkpoint, load_checkpoint
from speechllm.errors import InputError
from speechllm.grammar import Grammars
from speechllm.model import load_model
from speechllm.prompt import Example, render
from speechllm.tasks import TASKS
from speechllm.vocabulary import Vocabulary

INSTRUCTIONS = ("Transcribe this audio", "Translate this audio to German")
CLIPS = sorted((ROOT / "prompts" / "clips").glob("*.wav"))


def answers(checkpoint: Checkpoint, files: Sequence[Path]) -> list[tuple[str, str, float]]:
    found = list(Answerer(checkpoint).ask([str(file) for file in files], INSTRUCTIONS))
    return [(a.text, a.finish_reason, a.confidence) for a in found]  # type: ignore[union-attr]  # no Failure


def refused(*arguments: object) -> str:
    app = Typer()
    app.command()(export)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    return line


def test_the_built_in_checkpoint_answers_the_same_once_exported(tmp_path: Path) -> None:
    out = tmp_path / "new" / "lm"
    printed = command(export, out)
    checkpoint = load_checkpoint()
    assert printed == f"{out}: {served_name(checkpoint)}, see its README.md\n"
    exported = load_model(out)
    for name, value in checkpoint.lm.state_dict().items():  # trained in bfloat16, exported in it
        assert torch.equal(value, exported.state_dict()[name]), name
    assert len(CLIPS) > 2
    expected = answers(checkpoint, CLIPS)
    assert answers(replace(checkpoint, lm=exported), CLIPS) == expected
    assert len({text for text, _, _ in expected}) > len(CLIPS)


@torch.inference_mode()
def test_transformers_alone_loads_it_and_answers_as_the_engine_does(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command(export, tmp_path / "lm", "--model", tiny_checkpoint, "--dtype", "float32")
    checkpoint = load_checkpoint(tiny_checkpoint)
    lm: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert lm.dtype == torch.float32
    assert torch.equal(logits(lm.eval()), logits(checkpoint.lm))
    file = str(clip(tmp_path / "a.wav"))
    (answer,) = Answerer(checkpoint).ask([file], INSTRUCTIONS[0])
    assert isinstance(answer, Answer)
    example = Example(Answerer(checkpoint).listen(file).spans[0].codes, INSTRUCTIONS[0])
    prompt = render(example, checkpoint.vocabulary, checkpoint.text).ids
    grammar = Grammars(checkpoint.vocabulary, checkpoint.text).of(TASKS["transcribe"])
    allowed = grammar.allowed(grammar.start).nonzero().flatten().tolist()
    most = checkpoint.settings.max_answer_tokens
    ids = lm.generate(
        prompt[None], do_sample=False, max_new_tokens=most, prefix_allowed_tokens_fn=lambda batch, ids: allowed
    )
    assert checkpoint.text.decode(ids[0, len(prompt) :].tolist()) == answer.text != ""
    assert answer.tokens_out == most


def test_an_adapter_is_merged_and_makes_another_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    make_adapter(tiny_checkpoint, tmp_path / "adapter")
    command(
        export, tmp_path / "lm", "--model", tiny_checkpoint, "--adapter", tmp_path / "adapter", "--dtype", "float32"
    )
    base, merged = load_checkpoint(tiny_checkpoint), load_checkpoint(tiny_checkpoint, adapter=tmp_path / "adapter")
    assert torch.equal(logits(load_model(tmp_path / "lm")), logits(merged.lm))
    assert not torch.equal(logits(merged.lm), logits(base.lm))
    name = served_name(merged, str(tmp_path / "adapter"))
    assert name.startswith("tiny-random-mine-")
    card = (tmp_path / "lm" / "README.md").read_text()
    assert name in card
    assert f"speechllm serve --model {tiny_checkpoint} --adapter {tmp_path / 'adapter'} --vllm http://" in card
    assert len({name[-8:], served_name(base)[-8:], served_name(load_checkpoint())[-8:]}) == 3


def test_what_lies_beside_the_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint, out = load_checkpoint(tiny_checkpoint), tmp_path / "lm"
    checkpoint.lm.generation_config.top_k = 3  # of an LM that it might have started from
    checkpoint.lm.config.output_router_logits = True
    write_export(out, checkpoint, "some-name", Dtype.bfloat16)
    config, generation = (json.loads((out / f"{name}config.json").read_text()) for name in ("", "generation_"))
    vocabulary = checkpoint.vocabulary
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert config["vocab_size"] == vocabulary.size
    assert not config["output_router_logits"]
    for told in (config, generation):
        assert (told["eos_token_id"], told["pad_token_id"]) == (vocabulary.end, vocabulary.pad)
    assert generation.keys() == {"eos_token_id", "pad_token_id", "transformers_version"}
    card = (out / "README.md").read_text()
    assert (
        "\n    vllm serve . --served-model-name some-name --skip-tokenizer-init --dtype bfloat16 "
        "--logprobs-mode processed_logprobs --port 8001\n"
    ) in card
    assert f"speechllm serve --model {tiny_checkpoint} --vllm http://" in card
    assert {file.stat().st_mode for file in out.iterdir()} == {(out / "README.md").stat().st_mode}
    assert not [file for file in out.iterdir() if "token" in file.name]
    # lists of ids that are too long for vLLM's newer code
    wide = Vocabulary(text_size=vocabulary.text_size, n_q=1, card=MOST_IDS)
    write_export(tmp_path / "wide", replace(checkpoint, vocabulary=wide), "some-name", Dtype.bfloat16)
    assert "    VLLM_USE_V2_MODEL_RUNNER=0 vllm serve . " in (tmp_path / "wide" / "README.md").read_text()


def test_what_is_in_the_way_stays(tiny_checkpoint: Path, tmp_path: Path) -> None:
    mine = clip(tmp_path / "mine" / "a.wav")
    assert refused(tmp_path / "mine") == f"error: {tmp_path / 'mine'}: there are files in it; name a new folder"
    assert refused(mine) == f"error: {mine}: not a folder; name a new one"
    below = mine / "lm"
    assert refused(below, "--model", tiny_checkpoint) == (
        f"error: {below}: cannot be written (File exists); name another folder"
    )
    (tmp_path / "empty").mkdir()
    command(export, tmp_path / "empty", "--model", tiny_checkpoint)
    assert (tmp_path / "empty" / "config.json").is_file()


def test_it_is_written_whole_or_not_at_all(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    lm: Any = checkpoint.lm
    lm.to("meta")  # weights that cannot be written
    with pytest.raises((RuntimeError, NotImplementedError)):
        write_export(tmp_path / "lm", checkpoint, "some-name", Dtype.float32)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="there are files in it"):
        write_export(tiny_checkpoint, checkpoint, "some-name", Dtype.float32)
