"""Suites: what a row may say, how it is named, what it is judged by; and results read back from their file."""

from pathlib import Path

import pytest
from conftest import ROOT, write_yaml

from speechllm.errors import InputError
from speechllm.tasks import TASKS
from train.results import Confusion, Evaluation, Result, Target, normalised, read_results, write_results
from train.scoring import SCORES
from train.suite import METRICS, Row, make_suite, read_suite, set_name


def test_the_suite_of_a_release_is_valid_and_asks_every_task_on_audio_that_has_targets() -> None:
    suite = read_suite(ROOT / "train" / "configs" / "suite-release.yaml")
    asked = {row.task for row in suite.rows}
    left_out = {name for name, task in TASKS.items() if task.listens} - asked
    assert left_out == {"translate_cs", "translate_en"}
    by_label = {row.label: row for row in suite.rows}
    assert len(by_label) == len(suite.rows)
    captions = by_label["captions, unseen voices"].target(["wer", "cer"])
    assert (captions.metric, captions.at_least, captions.aim) == ("wer", 12, 5)
    assert by_label["German read sentences"].target(["wer", "cer"]).metric == "cer"
    assert by_label["language"].name == "test_en + test_de + test_fr + nemo_pl + read_nl_nathalie"
    assert by_label["speech in noise"].name == "test_talks at 10 dB"


def test_every_score_of_training_is_one_of_the_suites_metrics() -> None:
    assert SCORES.keys() == METRICS.keys()
    for metric, names in SCORES.items():
        assert names[0] == METRICS[metric][0]
        assert set(names) <= set(METRICS[metric])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"task": "transcribe"}, "give either set or sets"),
        ({"set": "a", "sets": ["b"], "task": "transcribe"}, "give either set or sets"),
        ({"set": "a", "task": "sing"}, "a: no task 'sing' on audio; there are transcribe, "),
        ({"set": "a", "task": "next_text"}, "a: no task 'next_text' on audio"),
        ({"set": "a", "task": "transcribe", "aim": {"uar": 5}}, "a: transcribe has no metric 'uar'; it has wer, cer"),
        ({"set": "a", "task": "transcribe", "at_least": {"wer": 5}, "aim": {"cer": 5}}, "several metrics"),
        ({"sets": ["a", "b"], "task": "language", "baselines": ["svm"]}, "a \\+ b: baselines learn from one set"),
        ({"set": "a", "task": "transcribe", "groups": ["age"]}, "rows.0.groups.0: "),
        ({"set": "a", "task": "transcribe", "noise": 5}, "rows.0.noise: "),
    ],
)
def test_what_does_not_fit_is_told(row: dict, told: str, tmp_path: Path) -> None:
    write_yaml(tmp_path / "suite.yaml", {"rows": [row]})
    with pytest.raises(InputError, match=f"suite.yaml: .*{told}"):
        read_suite(tmp_path / "suite.yaml")


def test_rows_are_told_apart() -> None:
    with pytest.raises(InputError, match="'a transcribe' is there twice"):
        make_suite([{"set": path, "task": "transcribe"} for path in ("x/a", "y/a/manifest.jsonl")])
    noisy = {"set": "x/a", "task": "transcribe", "noise_db": 10}
    assert [row.key for row in make_suite([noisy, noisy | {"noise_db": 5}]).rows] == [
        "a at 10 dB transcribe",
        "a at 5 dB transcribe",
    ]


def test_sets_are_looked_for_in_two_folders(tmp_path: Path) -> None:
    for folder in ("corpus/both", "source/both", "source/only"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "manifest.jsonl").write_text("")
    suite = make_suite([{"set": "both", "task": "transcribe"}]).model_copy(
        update={"corpus": tmp_path / "corpus", "source": tmp_path / "source"}
    )
    assert suite.folder("both") == tmp_path / "corpus" / "both"
    assert suite.folder("only") == tmp_path / "source" / "only"
    with pytest.raises(InputError, match=r"none: neither in .*corpus nor in .*source"):
        suite.folder("none")
    assert set_name(tmp_path / "source" / "only" / "manifest.jsonl") == set_name("x/only") == "only"


def test_a_row_is_judged_by_its_own_metric_or_the_first_there_is() -> None:
    assert Row(set="a", task="transcribe").target(["invented"]).metric == "invented"
    assert Row(set="a", task="intent").target((), trained=False).metric == "slot_f1"
    judged = Row(set="a", task="transcribe", at_least={"invented": 2})
    assert judged.target((), trained=False).metric == "invented"
    with pytest.raises(InputError, match="a transcribe: its clips tell nothing about 'invented'"):
        judged.target(["wer", "cer"])


def test_results_are_read_back(tmp_path: Path) -> None:
    evaluation = Evaluation(
        checkpoint="tiny",
        fingerprint="0123",
        command="python -m train.evaluate",
        results=(
            Result("a", "emotion", "uar", 50.0, 2, 3.5, 0.0, 100.0),
            Result("a", "emotion", "uar", 1.0, 2, 3.5, None, None, "svm"),
        ),
        confusions={"a emotion": Confusion(("angry", "sad"), ((1, 0), (1, 0)))},
        seconds={"a emotion": 1.5},
        targets=(Target("a", "emotion", "emotions", "uar", 55.0, None),),
    )
    write_results(tmp_path / "results.json", evaluation)
    assert read_results(tmp_path / "results.json") == evaluation
    (target,) = evaluation.targets
    assert evaluation.whole(target) == evaluation.results[0]
    assert evaluation.whole(target, "svm") == evaluation.results[1]
    assert evaluation.whole(target, metric="accuracy") is None
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(InputError, match=r"bad.json: not what train.evaluate writes"):
        read_results(tmp_path / "bad.json")
    with pytest.raises(InputError, match=r"none.json: cannot be read"):
        read_results(tmp_path / "none.json")


def test_scores_from_0_to_100_and_what_is_reached() -> None:
    assert [normalised("wer", 30), normalised("cer", 140), normalised("bleu", 30)] == [70, 0, 30]
    low, high = Target("a", "t", "", "wer"), Target("a", "t", "", "bleu")
    assert [low.reached(5, 5), low.reached(6, 5), high.reached(5, 5), high.reached(4, 5)] == [True, False, True, False]
