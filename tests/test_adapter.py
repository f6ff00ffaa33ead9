"""Adapters: merged when loaded, in PEFT's own format, found by name, and refused where they do not belong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from typer.testing import CliRunner

from serve.cli import app
from speechllm.adapter import AdapterSettings, lm_fingerprint, save_adapter
from speechllm.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from speechllm.checkpoint_settings import read_settings
from speechllm.errors import InputError
from speechllm.model import load_model
from train.finetune import add_lora
from train.finetune_config import Lora

ATTENTION = Lora(rank=2, alpha=4)
EXPERTS = Lora(rank=2, alpha=4, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])


def make_adapter(checkpoint: Path, folder: Path, lora: Lora = ATTENTION, name: str = "mine") -> PreTrainedModel:
    """Save an adapter with random weights; the LM that holds it beside its own weights."""
    lm, settings = load_model(checkpoint / "lm"), read_settings(checkpoint)
    torch.manual_seed(1)
    add_lora(lm, lora)
    for parameter in (p for p in lm.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.3)
    told = AdapterSettings(
        name=name,
        checkpoint=settings.name,
        fingerprint=settings.fingerprint,
        lm_fingerprint=lm_fingerprint(checkpoint / "lm"),
        tasks=("emotion", "transcribe"),
    )
    save_adapter(folder, lm, dict(lm.named_parameters()), told)
    return lm.eval()


@torch.inference_mode()
def logits(lm: nn.Module) -> torch.Tensor:
    scores: torch.Tensor = lm(input_ids=torch.arange(0, 3000, 41)[None]).logits
    return scores


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint whose own folder has the adapter "mine"."""
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    make_adapter(copy, copy / "adapters" / "mine")
    return copy


@pytest.mark.parametrize("lora", [ATTENTION, EXPERTS], ids=["attention", "experts"])
def test_merged_it_computes_what_it_does_beside_the_weights(lora: Lora, tiny_checkpoint: Path, tmp_path: Path) -> None:
    trained = make_adapter(tiny_checkpoint, tmp_path / "adapter", lora)
    base, merged = load_checkpoint(tiny_checkpoint), load_checkpoint(tiny_checkpoint, adapter=tmp_path / "adapter")
    assert merged.lm.state_dict().keys() == base.lm.state_dict().keys()
    torch.testing.assert_close(logits(merged.lm), logits(trained), rtol=1e-4, atol=1e-5)
    assert (logits(merged.lm) - logits(base.lm)).abs().max() > 0.01
    # and what PEFT by itself makes of the folder
    peft = PeftModel.from_pretrained(load_model(tiny_checkpoint / "lm"), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(peft), logits(trained), rtol=0, atol=0)
    changed = {
        name for name, value in merged.lm.state_dict().items() if not torch.equal(value, base.lm.state_dict()[name])
    }
    parts = (".q_proj.", ".k_proj.", ".v_proj.", ".o_proj.") + ((".experts.",) if lora is EXPERTS else ())
    assert changed == {name for name in base.lm.state_dict() if any(part in name for part in parts)}


def test_it_is_found_by_name_and_by_path(checkpoint: Path, tmp_path: Path) -> None:
    by_name = load_checkpoint(checkpoint, adapter="mine")
    assert by_name.settings.name == "tiny random + mine"
    assert by_name.settings.tasks == ("transcribe", "emotion")
    elsewhere = shutil.move(checkpoint / "adapters" / "mine", tmp_path / "elsewhere")
    assert torch.equal(logits(load_checkpoint(checkpoint, adapter=elsewhere).lm), logits(by_name.lm))
    with pytest.raises(InputError, match=r"adapter mine: no such folder with adapter\.json in it; those in .*: none"):
        load_checkpoint(checkpoint, adapter="mine")


def changed_weights(of: Checkpoint, folder: Path) -> Path:
    """The checkpoint with another value in one place."""
    state = of.lm.state_dict()
    state["model.norm.weight"] = state["model.norm.weight"].clone()
    state["model.norm.weight"][3] += 0.125
    save_checkpoint(
        folder, of.lm, of.folder / "codec", of.text, of.vocabulary,
        name="other", max_audio_seconds=8.0, max_answer_tokens=6, tasks=["transcribe"], weights=state,
    )  # fmt: skip
    return folder


def test_one_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    adapter = checkpoint / "adapters" / "mine"
    other = changed_weights(load_checkpoint(checkpoint), tmp_path / "other")
    with pytest.raises(InputError) as error:
        load_checkpoint(other, adapter=adapter)
    assert str(error.value) == (
        f"{adapter}: an adapter of another language model: it was trained on the checkpoint 'tiny random': load it "
        "with that one"
    )
    told = json.loads((adapter / "adapter.json").read_text())
    (adapter / "adapter.json").write_text(json.dumps(told | {"fingerprint": "0" * 64}))
    with pytest.raises(InputError, match="an adapter of another vocabulary: it was trained on"):
        load_checkpoint(checkpoint, adapter="mine")


def test_weights_in_other_files_are_the_same_model(checkpoint: Path) -> None:
    before = lm_fingerprint(checkpoint / "lm")
    (whole,) = (checkpoint / "lm").glob("*.safetensors")
    weights = load_file(whole)
    whole.unlink()
    for number, (name, value) in enumerate(weights.items()):
        save_file({name: value}, checkpoint / "lm" / f"part-{number}.safetensors")
    assert lm_fingerprint(checkpoint / "lm") == before


@pytest.mark.parametrize("name", ["adapter.json", "adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("keep", [None, 0.0, 0.5])
def test_damaged_ones_are_told_in_one_line(name: str, keep: float | None, checkpoint: Path) -> None:
    file = checkpoint / "adapters" / "mine" / name
    content = file.read_bytes()
    file.unlink()
    if keep is not None:
        file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(InputError) as error:
        load_checkpoint(checkpoint, adapter="mine")
    assert "\n" not in str(error.value)
    assert str(checkpoint / "adapters") in str(error.value)


def test_one_that_lacks_a_layer_is_refused(checkpoint: Path) -> None:
    file = checkpoint / "adapters" / "mine" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    fewer = {other: value for other, value in weights.items() if other != name}
    for changed in (fewer, weights | {name.replace("0", "7"): weights[name].clone()}):
        save_file(changed, file)
        with pytest.raises(InputError, match=r"does not hold what adapter_config\.json says"):
            load_checkpoint(checkpoint, adapter="mine")
    save_file(weights | {name: weights[name][:1].clone()}, file)
    with pytest.raises(InputError, match="the adapter cannot be loaded: "):
        load_checkpoint(checkpoint, adapter="mine")


def test_info_lists_them(checkpoint: Path) -> None:
    (checkpoint / "adapters" / "bad").mkdir()
    (checkpoint / "adapters" / "bad" / "adapter.json").write_text("{}")
    told = CliRunner().invoke(app, ["info", "--model", str(checkpoint)])
    assert told.exit_code == 0
    bad, mine = (line for line in told.stdout.splitlines() if line.startswith("adapter "))
    assert mine.split(maxsplit=2) == ["adapter", "mine", "trained on emotion, transcribe"]
    assert "not an adapter's settings: name: Field required" in bad
