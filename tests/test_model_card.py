"""The model card follows from its inputs: every number, nothing else, the same each time."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, command, write_yaml
from typer import Typer
from typer.testing import CliRunner

from speechllm.checkpoint import load_checkpoint
from speechllm.checkpoint_settings import DEFAULT, read_settings
from train import model_card
from train.card_inputs import Inputs, amounts
from train.card_sections import limits
from train.config import read_config
from train.corpus_config import Recipe
from train.icl_report import Point, Row
from train.kept import weights_fingerprint
from train.licences import TABLE, read_licences
from train.results import Evaluation, Result, Target, write_results
from train.stage_costs import Cost, add_cost
from train.synthesize import BUILT_IN

NAME = read_settings(DEFAULT).name
SECTIONS = [
    "Intended use", "Out of scope", "Sizes", "Training", "Data", "Results", "In-context learning", "Confidence",
    "Limits and biases", "Licence",
]  # fmt: skip


def score(name: str, value: float, **told: Any) -> Result:
    return Result(**{"set": name, "task": "transcribe", "metric": "wer", "value": value, "clips": 40, "seconds": 90.0,
                     "low": value - 1, "high": value + 1} | told)  # fmt: skip


WEIGHTS = weights_fingerprint(DEFAULT, read_settings(DEFAULT), None)
EVALUATION = Evaluation(
    checkpoint=NAME,
    fingerprint=WEIGHTS,
    command="python -m train.evaluate --suite x.yaml",
    results=(
        score("good", 11.7),
        score("bad", 43.2),
        score("bad", 38.4, system="pocketsphinx"),
        score("bad", 40.1, metric="cer"),
        score("good", 8.6, group="speaker=ann"),
        score("good", 15.9, group="speaker=bob"),
        score("good", 12.3, wording="held-out mean"),
        score("good", 19.8, wording="held-out worst", note="“Tell | me”"),
        score("good", 22.2, task="translate_de", metric="bleu", low=None, high=None),
    ),
    targets=(
        Target("good", "transcribe", "clear speech", "wer", 12.0, 5.0),
        Target("bad", "transcribe", "noisy speech", "wer", 30.0, None),
        Target("moods", "emotion", "moods", "uar", 40.0, None, trained=False),
    ),
)
BINS = {"counts": [0], "confidence": [0.0], "right": [0.0]}
MEASURES = {"ece": 7.7, "low": 6.6, "high": 8.8, "brier": 0.123, "bins": BINS}
CALIBRATION = {
    "model": NAME, "fingerprint": WEIGHTS,
    "temperature": 1.234, "dev_sets": ["dev_x"], "fitted_on": 321, "likelihood_before": -0.5,
    "likelihood_after": -0.4,
    "rows": [{
        "set": "test_x", "task": "transcribe", "of": "words", "count": 654, "right": 87.6, "before": MEASURES,
        "after": MEASURES | {"ece": 2.1}, "auroc": 0.876, "risk": "errors %",
        "kept": [{"coverage": 1.0, "confidence": 0.01, "risk": 0.124}],
    }],
}  # fmt: skip


def corpus(kind: str, split: str, utterances: int, hours: float, speakers: int) -> dict[str, Any]:
    amount = {"utterances": utterances, "hours": hours, "speakers": speakers}
    return {"kind": kind, "encoded": split == "train", "splits": {split: amount}}


CORPUS = {
    "corpora": {
        "digits_fsdd": corpus("recorded", "train", 1234, 1.0, 4),
        "snips": corpus("synthesized", "train", 777, 3.0, 20),
        "test_en": corpus("synthesized", "test", 1, 9.0, 2),
    }
}


def icl() -> dict[str, Any]:
    points = [Point("shots", 0, 50.1, 45, 55), Point("shots", 4, 61.3, 56, 66)]
    points += [Point(name, 4, 49.2, 44, 54) for name in ("shuffled labels", "other audio", "no audio")]
    row = Row("word/made-up", "A", ("x",), "accuracy %", 99, 88, 7, 0, 9, tuple(points))
    return {
        "model": NAME,
        "fingerprint": WEIGHTS,
        "asked": 200,
        "seed": 0,
        "rows": [json.loads(json.dumps(row, default=vars))],
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Option -> small made-up file."""
    folder = tmp_path_factory.mktemp("inputs")
    told = {"icl": icl(), "calibration": CALIBRATION, "corpus": CORPUS}
    found = {name: folder / name / f"{name}.json" for name in ("results", *told)}
    for name, path in found.items():
        path.parent.mkdir()
        if name in told:
            path.write_text(json.dumps(told[name]))
    write_results(found["results"], EVALUATION)
    (found["results"].parent / "results.png").write_bytes(b"picture")
    found["stages"] = folder / "stages.jsonl"
    for outcome in ("interrupted", "done"):
        add_cost(found["stages"], Cost("pretrain", "k", outcome, 1800.0, 3600.0, 36000.0, "an estimate"))  # type: ignore[arg-type]
    run = folder / "run"
    run.mkdir()
    rates = {"tokens_per_second": 1000.0, "audio_hours_per_hour": 36.0}
    lines = [{"step": 10, "seconds": 100.0, **rates}, {"step": 10, "seconds": 150.0, "loss_x": 1.0},
             {"step": 20, "seconds": 200.0, **rates}, {"step": 30, "seconds": 50.0, **rates}]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    settings = {"out": run, "corpora": {"codes/snips": 1, "codes/digits_fsdd": 1}, "dev_corpora": [], "steps": 30}
    found["pretrain"] = write_yaml(folder / "pretrain.yaml", settings | {"tasks": {"transcribe": 1}})
    return found


def write(out: Path, files: dict[str, Path], *options: object) -> str:
    given = [word for name, path in files.items() for word in (f"--{name}", path)]
    command(model_card.main, "--model", DEFAULT, "--out", out, *given, *options)
    return out.read_text()


@pytest.fixture(scope="module")
def card(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("card") / "README.md"
    write(out, files)
    return out


@pytest.fixture(scope="module")
def text(card: Path) -> str:
    return card.read_text()


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def refused(*arguments: object) -> str:
    app = Typer()
    app.command()(model_card.main)
    result = CliRunner().invoke(app, ["--model", str(DEFAULT), *map(str, arguments)], catch_exceptions=False)
    error = result.stderr.splitlines()[-1]  # after transformers' progress bar
    assert result.exit_code == 2 and error.startswith("error: ")
    return error


def test_front_matter_is_that_of_hugging_face(text: str) -> None:
    _, yaml_text, body = text.split("---\n", 2)
    told = yaml.safe_load(yaml_text)
    assert told["license"] == "other" and told["license_name"] == "non-commercial"
    assert told["language"] == ["en", "de", "fr", "cs"]  # heard, and translated to
    assert told["pipeline_tag"] == "automatic-speech-recognition"
    assert {"speech", "mixtral", "mixture-of-experts", "speech-translation"} <= set(told["tags"])
    assert told["datasets"] == ["digits_fsdd", "text_snips_intents", "noise"]
    assert body.startswith(f"\n# {NAME}\n")
    assert [line[3:] for line in body.splitlines() if line.startswith("## ")] == SECTIONS


def test_sizes_are_those_of_the_checkpoint(text: str) -> None:
    sizes = section(text, "Sizes")
    for cell in ("9,995,008", "4,096,768", "8, 2 of them active", "25 frames a second", "3,000", "15 s at once"):
        assert f"{cell} |" in sizes or cell in sizes
    assert "| audio is heard as | 2 codebooks, " in sizes and ", diarize, turns, activity, emotion, " in sizes


def test_every_result_is_in_it(text: str) -> None:
    results = section(text, "Results")
    for result in EVALUATION.results:
        assert f"| {result.value:.1f} | " in results
        if result.low is not None and result.high is not None:
            assert f"{result.low:.1f}–{result.high:.1f}" in results
    assert "| clear speech | WER % | 11.7 (10.7–12.7) | ≤ 12 | yes, unsure | ≤ 5 | no |" in results
    assert "| noisy speech | WER % | 43.2 (42.2–44.2) | ≤ 30 | no |" in results
    assert "38.4 (37.4–39.4)" in results and "| pocketsphinx |" in results
    assert "not trained" in results and "“Tell \\| me”" in results
    assert EVALUATION.command in results and EVALUATION.fingerprint in results


def test_training_adds_up_what_was_logged(text: str, files: dict[str, Path]) -> None:
    training = section(text, "Training")
    told = amounts("run", files["pretrain"].parent / "run" / "metrics.jsonl")  # taken up once: 200 s and 50 s
    assert (told.steps, told.ids, told.hours, told.seconds) == (30, 200_000.0, 2.0, 250.0)
    assert "| run | 30 | 0.2 M | 2.0 h | 4.2 min |" in training
    assert "| pretrain | 1.0 h | 2.0 h | 20.0 |" in training and "Energy: an estimate." in training
    assert "for want of a log" not in training


def test_data_have_sizes_and_licences(text: str) -> None:
    data = section(text, "Data")
    assert "| snips | language model | synthesized | 777 | 3.0 | 20 |" in data
    assert "| digits_fsdd | language model | recorded | 1,234 | 1.0 | 4 | digits_fsdd |" in data
    assert "test_en" not in data and "4.0 h for the language model" in data and "75 % spoken by machines" in data
    assert "CC BY-SA 4.0" in data and "MBROLA" in data
    licence = section(text, "Licence")
    assert "**Use of these weights should be non-commercial**" in licence and "MBROLA" in licence


def test_shots_and_confidence(text: str) -> None:
    assert "0 of 1 rows are learnt" in section(text, "In-context learning")
    assert "61.3 (56.0–66.0)" in section(text, "In-context learning")
    confidence = section(text, "Confidence")
    assert "temperature 1.234" in confidence and "| 87.6 | 7.7 | 6.6–8.8 | 2.1 |" in confidence


def test_limits_follow_from_the_numbers(text: str) -> None:
    limits = section(text, "Limits and biases")
    assert "Below what a release must reach: noisy speech (WER % 43.2 (42.2–44.2), asked for 30)" in limits
    assert "worst by speaker for bob 15.9 (14.9–16.9), best for ann 8.6" in limits
    assert "noisy speech: pocketsphinx does better, 38.4" in limits
    assert "Not learnt from shots, 1 of 1: word/made-up" in limits
    assert "Not trained" not in limits
    assert "Good enough to be used, by the release's own measure: clear speech (unsure)." in section(
        text, "Intended use"
    )


def test_tasks_that_were_not_trained_are_named() -> None:
    shipped = load_checkpoint(DEFAULT)
    words = replace(shipped, settings=shipped.settings.model_copy(update={"tasks": ("transcribe", "translate_de")}))
    told = limits(Inputs(words, read_licences(TABLE)))
    assert "Not trained: transcribe_times, " in told and ", emotion, " in told and "translate_de," not in told


def test_the_same_inputs_give_the_same_card(text: str, files: dict[str, Path], tmp_path: Path) -> None:
    assert write(tmp_path / "again.md", files) == text


def test_pictures_lie_beside_it(card: Path) -> None:
    assert "![results](results.png)" in card.read_text()
    assert sorted(path.name for path in card.parent.iterdir()) == ["README.md", "results.png"]


def test_what_is_missing_is_named_with_its_command(tmp_path: Path) -> None:
    text = write(tmp_path / "README.md", {})
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == SECTIONS
    for title, words in (
        ("Training", "`python -m train.release`"), ("Training", "`train/pretrain.py`"), ("Data", "train.corpus"),
        ("Results", "train.evaluate --suite"), ("In-context learning", "train.evaluate_icl"),
        ("Confidence", "train.calibrate"), ("Licence", "not known here"),
    ):  # fmt: skip
        assert words in section(text, title), title
    assert "license: other\nlicense_name: unknown\n" in text


def test_a_missing_licence_is_an_error(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps({"corpora": {"mine": CORPUS["corpora"]["snips"]}}))
    out = tmp_path / "README.md"
    error = refused("--corpus", path, "--out", out)
    assert f"{TABLE}: no licence of mine" in error and not out.exists()
    table = tmp_path / "licences.yaml"
    table.write_text("mine: {title: My own, licence: CC0 1.0, use: free, language: [en]}\n")
    text = write(out, {"corpus": path, "licences": table})
    assert "license_name: unknown\n" in text and "the rest is not known here" in section(text, "Licence")
    codec = write_yaml(tmp_path / "codec.yaml", {"out": tmp_path, "manifests": ["mine"], "dev_manifests": ["mine"],
                                             "semantic": {"steps": 9}, "acoustic": {"steps": 9}})  # fmt: skip
    text = write(out, {"corpus": path, "licences": table, "codec": codec})
    assert "license: apache-2.0\n" in text and "nothing that they learnt from restricts" in section(text, "Licence")
    later = {"out": tmp_path, "corpora": {"mine": 1}, "dev_corpora": [], "steps": 30, "tasks": {"transcribe": 1}}
    later = write_yaml(tmp_path / "later.yaml", later | {"start_from": "runs/others/checkpoint"})
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 30, "seconds": 9.0}\n')
    text = write(out, {"pretrain": later, "licences": table, "codec": codec})
    assert "license_name: unknown\n" in text
    assert "for want of a log: codec, semantic; codec, acoustic." in section(text, "Training")
    table.write_text("mine: {title: My own, use: free}\n")
    assert "give title, licence and use" in refused("--corpus", path, "--licences", table, "--out", out)


def test_results_of_another_checkpoint_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    path, out = tmp_path / "results.json", tmp_path / "README.md"
    write_results(path, replace(EVALUATION, checkpoint="other"))
    assert f"--results: of the checkpoint other, not of {NAME}" in refused("--results", path, "--out", out)
    write_results(path, replace(EVALUATION, fingerprint="0" * 16))
    assert "--results: of other weights or settings" in refused("--results", path, "--out", out)
    for option, told in (("icl", icl()), ("calibration", CALIBRATION)):
        path.write_text(json.dumps(told | {"fingerprint": "0" * 16}))
        assert f"--{option}: of other weights or settings" in refused(f"--{option}", path, "--out", out)
    for option in ("icl", "calibration", "corpus", "stages"):
        path.write_text("{}\n")
        assert f"{path}: not what" in refused(f"--{option}", path, "--out", out)
        assert "cannot be read" in refused(f"--{option}", tmp_path / "none", "--out", out)
    assert not out.exists()


def test_every_corpus_of_the_recipe_has_a_licence() -> None:
    recipe, licences = read_config(ROOT / "train" / "configs" / "corpus.yaml", Recipe), read_licences()
    assert licences.sources(recipe.encoded.keys() - {n for n in recipe.encoded if n.startswith("dev_")})
    for name, spoken in recipe.synthesized.items():
        if spoken.split == "train":
            source = spoken.text.partition("/")[0]
            assert source in licences.entries[name].of or source in BUILT_IN
    for name, talks in recipe.conversations.items():
        if talks.split == "train":
            assert set(talks.of) <= set(licences.entries[name].of)
