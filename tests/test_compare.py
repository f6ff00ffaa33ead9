"""Variants of a run side by side: planned, trained once, and set out in a table."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import ROOT, write_yaml
from typer.testing import CliRunner

from speechllm.errors import InputError
from train import compare
from train.compare import Comparison, Run, Table, plan_runs
from train.pretrain_config import Pretraining


def settings(out: Path) -> dict[str, Any]:
    """Of a run that two corpora validate."""
    return {
        "out": out, "corpora": {"codes": 1}, "dev_corpora": ["codes/a", "codes/b"], "steps": 8,
        "tasks": {"transcribe": 1, "translate_de": 1, "gender": 1},
    }  # fmt: skip


def finished(folder: Path, variant: str, seed: int, *records: dict[str, float]) -> Run:
    """A run that logged the records after its last step."""
    out = folder / f"{variant}-{seed}"
    out.mkdir(parents=True)
    lines = [{"step": 4, "loss_transcribe_a": 99.0}, *({"step": 8} | record for record in records)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Run(variant, seed, Pretraining.model_validate(settings(out)), out.with_suffix(".yaml"))


PLAIN = {"loss_transcribe_a": 2.0, "loss_transcribe_b": 4.0, "wer_transcribe_a": 50.0, "wer_transcribe_b": 70.0}
GENDER = {"loss_gender_a": 1.0, "uar_gender_a": 60.0, "accuracy_gender_a": 1.0}
EXPECTED = """\
Loss on dev, nats per answer id:

| task | plain | other |
| --- | ---: | ---: |
| transcribe | 3.000 ± 0.000 | 1.500 ± 0.707 |
| gender | 1.000 ± 0.000 | 1.100 ± 0.000 |
| **mean gain** | – | +20.0 % |
| better on | – | 1 of 2 |

Score on dev:

| task | plain | other |
| --- | ---: | ---: |
| transcribe: wer ↓ | 60.0 ± 0.0 | 30.0 ± 0.0 |
| gender: uar ↑ | 60.0 ± 0.0 | 50.0 ± 0.0 |
| **mean gain** | – | +10.0 points |
| better on | – | 1 of 2 |
"""


def test_table_of_hand_made_runs(tmp_path: Path) -> None:
    runs = []
    for seed, loss in ((1, 1.0), (2, 2.0)):
        runs.append(finished(tmp_path, "plain", seed, {"loss": 9.0}, PLAIN, GENDER))
        other = {"loss_transcribe_a": loss, "loss_transcribe_b": loss, "wer_transcribe_a": 20.0, "wer_transcribe_b": 40}
        # a score that the others do not have is left out
        more = {"loss_gender_a": 1.1, "uar_gender_a": 50.0, "bleu_translate_de_a": 3.0}
        runs.append(finished(tmp_path, "other", seed, other, more))
    assert Table(runs).markdown() == EXPECTED
    compare.report(runs, tmp_path)
    assert (tmp_path / "comparison.png").stat().st_size > 5000
    values = json.loads((tmp_path / "comparison.json").read_text())
    assert {"task": "transcribe", "score": "loss", "plain": [3.0, 3.0], "other": [1.0, 2.0]} in values


def test_a_run_that_has_not_been_validated_after_its_last_step_is_not_finished(tmp_path: Path) -> None:
    assert finished(tmp_path, "stopped", 1).scores() is None
    assert finished(tmp_path, "training only", 1, {"loss": 1.0}).scores() is None


def comparison(folder: Path, **changed: Any) -> Path:
    base = write_yaml(folder / "base.yaml", settings(folder / "unused"))
    values = {"base": base, "out": folder / "out", "variants": {"none": {}, "small": {"ctc_weight": 0.1}}, **changed}
    return write_yaml(folder / "comparison.yaml", values)


def test_settings_of_variants(tmp_path: Path) -> None:
    config = comparison(tmp_path, settings={"warmup": 7}, seeds=[3, 4])
    runs = plan_runs(compare.read_config(config, Comparison))
    told = [(r.variant, r.seed, r.config.seed, r.config.ctc_weight, r.config.warmup, r.config.out.name) for r in runs]
    assert told == [
        ("none", 3, 3, 0.3, 7, "none-3"),
        ("small", 3, 3, 0.1, 7, "small-3"),
        ("none", 4, 4, 0.3, 7, "none-4"),
        ("small", 4, 4, 0.1, 7, "small-4"),
    ]
    assert all(compare.read_config(run.file, Pretraining) == run.config for run in runs)


@pytest.mark.parametrize("config", sorted((ROOT / "train" / "configs").glob("compare-*.yaml")), ids=lambda p: p.stem)
def test_ready_made_comparisons_are_ones(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    comparison = compare.read_config(config, Comparison).model_copy(update={"out": tmp_path})
    runs = plan_runs(comparison)
    assert len({run.config.model_copy(update={"out": tmp_path}).model_dump_json() for run in runs}) == len(runs)


def test_the_dense_model_has_as_many_active_parameters_as_the_one_with_experts(tmp_path: Path) -> None:
    comparison = compare.read_config(ROOT / "train" / "configs" / "compare-experts.yaml", Comparison)
    base = {"base": ROOT / comparison.base, "out": tmp_path}
    dense, experts = (run.config.model for run in plan_runs(comparison.model_copy(update=base)))
    one = {"num_experts": 1, "top_k": 1, "expert_size": experts.top_k * experts.expert_size}
    assert experts.num_experts > experts.top_k > 1 and dense == experts.model_copy(update=one)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"variants": {"none": {}, "odd": {"ctc_weight": -1}}},
            "variants: odd: ctc_weight: .* greater than or equal to 0",
        ),
        ({"variants": {"none": {}, "odd": {"ctc_wait": 1}}}, "variants: odd: ctc_wait: Extra inputs"),
        ({"settings": {"tasks": {"sing": 1}}}, "variants: none: tasks: .*unknown task 'sing'"),
        ({"base": "missing.yaml"}, "missing.yaml: cannot be read"),
        ({"settings": {"dev_corpora": []}}, "base.yaml: no dev_corpora, by which"),
    ],
)
def test_what_is_no_comparison(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_runs(compare.read_config(comparison(tmp_path, **changed), Comparison))


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    config = comparison(tmp_path)
    (run, _) = plan_runs(compare.read_config(config, Comparison))
    run.config.out.mkdir()
    assert len(plan_runs(compare.read_config(config, Comparison))) == 2
    changed = comparison(tmp_path, settings={"learning_rate": 0.5})
    with pytest.raises(InputError, match="none-1: holds a run with other settings: remove it"):
        plan_runs(compare.read_config(changed, Comparison))


def test_runs_are_trained_once(pretrain_settings: dict[str, Any], tmp_path: Path) -> None:
    """Both variants for real; a second start adds nothing, one that fails names its log."""
    base = write_yaml(tmp_path / "base.yaml", pretrain_settings | {"out": tmp_path / "unused", "curriculum": {}})
    short = {"steps": 2, "evaluate_every": 2, "save_every": 1, "loader_workers": 0}
    variants: dict[str, dict[str, Any]] = {"experts": {}, "one": {"model": {"num_experts": 1, "top_k": 1, **SMALL}}}
    values = {"base": base, "out": tmp_path / "out", "settings": short, "variants": variants}
    config = write_yaml(tmp_path / "comparison.yaml", values)
    app = typer.Typer()
    app.command()(compare.main)
    first = CliRunner().invoke(app, ["--config", str(config)])
    assert first.exit_code == 0, first.output
    assert "| transcribe: wer ↓ |" in first.output and "| task | experts | one |" in first.output
    logs = [(tmp_path / "out" / f"{variant}-1.log").read_text() for variant in variants]
    assert CliRunner().invoke(app, ["--config", str(config)]).exit_code == 0
    assert [(tmp_path / "out" / f"{variant}-1.log").read_text() for variant in variants] == logs

    write_yaml(config, values | {"out": tmp_path / "bad", "settings": short | {"codec": "nowhere"}})
    failed = CliRunner().invoke(app, ["--config", str(config)])
    assert failed.exit_code == 2 and "experts with seed 1 stopped with exit code 2: see" in failed.output
    assert "nowhere" in (tmp_path / "bad" / "experts-1.log").read_text()


SMALL = {"hidden_size": 32, "num_layers": 2, "expert_size": 32, "max_positions": 512}
