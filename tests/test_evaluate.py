"""Scores with intervals, by group and wording; the whole command, gone on with after an interruption; several runs."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import command, write_yaml
from sacrebleu import CHRF
from typer import Typer
from typer.testing import CliRunner

from speechllm.audio import write_audio
from speechllm.data.corpus import Item
from speechllm.data.manifest import Utterance, write_manifest
from speechllm.errors import InputError
from speechllm.metrics import bootstrap_interval, interval, ratio
from speechllm.tasks import TASKS, ParsedAnswer, Speaker, Time
from train import evaluate
from train.asking import Server
from train.evaluate_report import geometric_mean, scores, targets_table
from train.evaluate_rows import fingerprint, held_out_results, parts_of_row, read_found, results_of
from train.kept import Kept
from train.questions import pose
from train.results import OURS, Evaluation, Result, Target, read_results, write_results
from train.scoring import confusion, measures
from train.suite import read_suite


def utterance(number: int, text: str, speaker: str, **fields: Any) -> Utterance:
    known: dict[str, Any] = {
        "id": f"u{number}",
        "audio": f"{number}.wav",
        "duration": 0.5,
        "language": "en",
        "translations": {"de": "ein Hund"},
        "split": "test",
        "source": "made",
    }
    return Utterance(**known | {"text": text, "speaker": speaker} | fields)


UTTERANCES = [
    utterance(0, "a dog", "ann", gender="female"),
    utterance(1, "a cat", "ann", gender="female"),
    utterance(2, "two cows", "bob", gender="male"),
]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "set").mkdir()
    for number in range(3):
        write_audio(tmp_path / "set" / f"{number}.wav", 0.1 * torch.randn(1, 8000, generator=generator), 16000)
    write_manifest(tmp_path / "set" / "manifest.jsonl", UTTERANCES)
    return tmp_path / "set" / "manifest.jsonl"


def items() -> list[Item]:
    return [Item(one, Path()) for one in UTTERANCES]


def transcripts(*texts: str) -> list[ParsedAnswer]:
    return [TASKS["transcribe"].read((text,) if text else ()) for text in texts]


def by_metric(results: list[Result], group: str = "", wording: str = "") -> dict[str, Result]:
    return {r.metric: r for r in results if (r.group, r.wording) == (group, wording)}


def test_results_are_hand_computed_over_all_clips_and_groups() -> None:
    task = TASKS["transcribe"]
    questions = pose(items(), task)
    found = results_of("made", task, questions, transcripts("a dog", "a hat", ""), ["speaker"])
    whole = by_metric(found)
    assert list(whole) == ["wer", "cer"]
    assert whole["wer"].value == pytest.approx(100 * 3 / 6)  # one substitution and two deletions in six words
    assert whole["cer"].value == pytest.approx(100 * 9 / 18)  # one letter of "cat", and all of "two cows"
    assert (whole["wer"].clips, whole["wer"].seconds) == (3, 1.5)
    assert "normalize_text" in whole["wer"].note
    expected = bootstrap_interval(["a dog", "a cat", "two cows"], ["a dog", "a hat", ""])
    assert (whole["wer"].low, whole["wer"].high) == pytest.approx(tuple(100 * edge for edge in expected))
    assert by_metric(found, "speaker=ann")["wer"].value == pytest.approx(25)
    alone = by_metric(found, "speaker=bob")["wer"]
    assert (alone.value, alone.clips, alone.low, alone.high) == (100, 1, None, None)

    german = TASKS["translate_de"]
    answers = [german.read((text,)) for text in ("ein Hund", "ein Hund", "eine Katze")]
    translated = by_metric(results_of("made", german, pose(items(), german), answers))
    assert translated["chrf"].value == pytest.approx(
        CHRF().corpus_score([a.text for a in answers], [["ein Hund"] * 3]).score
    )
    assert "version:" in translated["bleu"].note
    assert translated["chrf"].low is not None


def test_every_metric_has_an_interval_that_holds_its_value() -> None:
    turns: list[Any] = [(Speaker(1), Time(0), "a dog", Time(1), Speaker(2), Time(1), "yes", Time(2))]
    for name, true, said in (
        ("diarize", turns * 2, [*turns, (Speaker(1), Time(0), "a hat", Time(2))]),
        ("activity", [(Time(0), Time(2))] * 2, [(Time(0), Time(2)), (Time(1), Time(2))]),
        ("gender", [("male",), ("female",), ("male",)], [("male",), ("male",), ("what",)]),
        ("intent", [("order(drink=tea)",), ("stop()",)], [("order(drink=tea)",), ("order(drink=tea)",)]),
        ("translate_de", [("ein Hund",), ("eine Katze",), ()], [("ein Hund",), ("ein Tisch",), ("und",)]),
    ):
        task = TASKS[name]
        own = measures(task, [*map(task.read, true)], [*map(task.read, said)], [2.0] * len(true))
        values = {m.metric: m.value() for m in own}
        for measure in own:
            low, high = measure.interval()
            assert math.isnan(low) == (measure.applies.sum() < 2), measure.metric
            assert math.isnan(low) or low <= values[measure.metric] <= high
            assert math.isnan(low) or measure.metric == "malformed" or low < high or name == "translate_de"
        if name == "gender":
            assert values == pytest.approx({"uar": 25.0, "accuracy": 100 / 3, "malformed": 100 / 3})
        if name == "intent":
            assert values == {"slot_f1": pytest.approx(200 / 3), "intent_accuracy": 50, "all_slots": 50, "malformed": 0}
        if name == "diarize":
            assert set(values) == {"der", "cpwer", "malformed"}


def test_resampling_is_of_units() -> None:
    counts = np.array([[1, 1], [0, 1]] * 50)
    low, high = interval(counts, ratio)
    assert 0.38 < low < 0.44
    assert 0.56 < high < 0.62
    assert interval(counts, ratio) == (low, high)
    assert all(map(math.isnan, interval(np.zeros((3, 2)), ratio)))


def test_labels_that_were_mistaken_for_one_another() -> None:
    task = TASKS["gender"]
    true = [task.read((label,)) for label in ("male", "male", "female", "male")]
    said = [task.read((label,)) for label in ("male", "female", "female", "a man")]
    matrix = confusion(true, said)
    assert matrix.labels == ("female", "male", "(none)")
    assert matrix.counts == ((1, 0, 0), (1, 1, 1), (0, 0, 0))


def test_held_out_wordings_have_a_mean_and_a_worst() -> None:
    task = TASKS["transcribe"]
    said = [transcripts("a dog", "a cat", "two cows"), transcripts("a dog", "a hat", "")]
    found = held_out_results("made", task, ["Say it.", "Write it."], pose(items(), task), said)
    mean, worst = (by_metric(found, wording=wording)["wer"] for wording in ("held-out mean", "held-out worst"))
    assert (mean.value, mean.note) == (pytest.approx(25), "of 2 wordings")
    assert (worst.value, worst.note) == (pytest.approx(50), "Write it.")
    assert mean.high is not None
    assert worst.high is not None
    assert mean.high == pytest.approx(worst.high / 2)


def test_what_may_be_answered_with_no_is_asked_of_clips_that_have_an_answer() -> None:
    clips = [
        Item(utterance(n, "a dog", "ann", labels=labels), Path())
        for n, labels in enumerate([{"emotion": "anger"}, {"emotion": "fear"}] * 15 + [{}] * 300)
    ]
    task = TASKS["is_emotion"]
    questions = pose(clips, task)
    assert len(questions) == 30
    assert 8 < sum(task.read(q.answer).label == "no" for q in questions) < 22
    others = pose(clips, task, task.held_out[0])
    assert [q.answer for q in others] == [q.answer for q in questions]  # the same is asked, in other words
    assert others[0].instruction != questions[0].instruction


def test_sets_in_place_of_a_suite(manifest: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    command(evaluate.main, manifest, "--task", "transcribe", "--model", tiny_checkpoint, "--out", out)
    results = read_results(out / "results.json").results
    assert [(r.group, r.clips) for r in results if r.metric == "wer"] == [
        ("", 3),
        ("speaker=ann", 2),
        ("speaker=bob", 1),
    ]
    assert (out / "results.png").stat().st_size > 1000
    assert "speaker=ann" in (out / "results.md").read_text()


@pytest.fixture
def suite(manifest: Path, tmp_path: Path) -> Path:
    rows = [
        {"set": "set", "task": "transcribe", "wordings": True, "groups": ["speaker"], "at_least": {"wer": 50}},
        {"set": "set", "task": "gender", "baselines": ["majority"], "label": "who"},
        {"set": "set", "task": "translate_de", "noise_db": 5.0, "aim": {"bleu": 30}},
        {"set": "set", "task": "language"},
    ]
    return write_yaml(tmp_path / "suite.yaml", {"corpus": tmp_path, "source": tmp_path / "none", "rows": rows})


def test_a_suite_goes_on_where_it_was_stopped(
    suite: Path, manifest: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = [utterance(n, "a dog", "cat", gender="male", split="train") for n in (7, 8)]
    write_manifest(manifest, [*UTTERANCES, *learn])
    settings = json.loads((tiny_checkpoint / "speechllm.json").read_text())
    known = [*settings["tasks"], "gender", "translate_de"]
    monkeypatch.setattr(
        evaluate, "read_settings", lambda folder: evaluate_settings(folder).model_copy(update={"tasks": tuple(known)})
    )
    out, asked = tmp_path / "out", []
    answer = Server.answer

    def stopping(server: Server, questions: Any, task: Any, advance: Any) -> Any:
        asked.append(task.name)
        if asked == ["transcribe", "transcribe", "gender"]:
            raise KeyboardInterrupt
        return answer(server, questions, task, advance)

    monkeypatch.setattr(Server, "answer", stopping)
    arguments = ["--suite", suite, "--model", tiny_checkpoint, "--out", out]
    app = Typer()
    app.command()(evaluate.main)
    stopped = CliRunner().invoke(app, [*map(str, arguments)])
    assert stopped.exit_code == 130, stopped.output
    assert "finished parts are kept" in stopped.output
    printed = command(evaluate.main, *arguments)
    assert asked == ["transcribe", "transcribe", "gender", "gender", "translate_de"]
    assert "not trained" in printed

    evaluation = read_results(out / "results.json")
    assert [target.trained for target in evaluation.targets] == [True, True, True, False]
    assert {r.wording for r in evaluation.results} == {"", "held-out mean", "held-out worst"}
    assert {r.system for r in evaluation.results if r.task == "gender"} == {"speechllm", "majority"}
    who = evaluation.targets[1]
    majority = evaluation.whole(who, "majority", "accuracy")
    assert majority is not None
    assert majority.value == pytest.approx(100 / 3)
    assert list(evaluation.confusions) == ["set gender"]
    assert sum(map(sum, evaluation.confusions["set gender"].counts)) == 3
    noisy = evaluation.whole(evaluation.targets[2])
    assert noisy is not None
    assert noisy.set == "set at 5 dB"
    assert "white noise at 5 dB" in noisy.note
    assert set(evaluation.seconds) == {
        "set transcribe", "set transcribe / held-out wordings", "set gender", "set gender / majority",
        "set at 5 dB translate_de",
    }  # fmt: skip
    assert {path.name for path in out.iterdir()} == {
        "rows.jsonl", "results.json", "results.md", "results.png", "confusion-set-gender.png",
    }  # fmt: skip

    command(evaluate.main, *arguments)
    assert len(asked) == 5  # nothing is asked again
    for setting in (["--limit", "2"], ["--beams", "2"]):
        other = CliRunner().invoke(app, [*map(str, arguments), *setting])
        assert other.exit_code == 2
        assert "was asked with other settings" in other.output


def test_the_server_is_told_how_many_hypotheses_to_keep(
    suite: Path, manifest: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Path, adapter: str | None, beams: int) -> Server:
        raise InputError(f"{beams} are asked for")

    write_manifest(manifest, UTTERANCES)
    monkeypatch.setattr(evaluate, "Server", refuse)
    app = Typer()
    app.command()(evaluate.main)
    arguments = ["--suite", suite, "--model", tiny_checkpoint, "--out", tmp_path / "out"]
    for options, beams in (((), 1), (("--beams", "3"), 3)):
        result = CliRunner().invoke(app, [*map(str, arguments), *options])
        assert result.exit_code == 2
        assert f"error: {beams} are asked for" in result.output


def test_baselines_do_not_depend_on_the_weights(suite: Path, manifest: Path) -> None:
    write_manifest(manifest, UTTERANCES)
    asked = read_suite(suite)
    ours, majority = parts_of_row(asked.rows[1], asked, "test", None)
    assert (ours.system, majority.system) == (OURS, "majority")
    for part, same in ((ours, False), (majority, True)):
        prints = {fingerprint(part, asked, weights) for weights in ("these", "those")}
        assert (len(prints) == 1) == same
    asked_otherwise = replace(ours, questions=(tuple(replace(q, instruction="Who?") for q in ours.questions[0]),))
    assert fingerprint(asked_otherwise, asked, "these") != fingerprint(ours, asked, "these")


evaluate_settings = evaluate.read_settings


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give either sets, or --suite"),
        (["--suite", "SUITE", "SET"], "give either sets, or --suite"),
        (["--suite", "SUITE", "--task", "gender"], "a suite says which tasks are asked"),
        (["SET", "--task", "next_text"], "no task on audio"),
        (["SET", "--axis", "a b"], "of the plot that --compare draws"),
        (["SET", "--task", "emotion"], "none of the sets holds an answer"),
        (["--suite", "missing.yaml"], "missing.yaml: cannot be read"),
    ],
)
def test_what_cannot_be_done_is_told(
    arguments: list[str], told: str, suite: Path, manifest: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    names = {"SUITE": str(suite), "SET": str(manifest)}
    app = Typer()
    app.command()(evaluate.main)
    given = [names.get(word, word) for word in arguments]
    done = CliRunner().invoke(app, [*given, "--model", str(tiny_checkpoint), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    assert told in done.output


def test_a_missing_clip_is_an_error(manifest: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (manifest.parent / "1.wav").unlink()
    app = Typer()
    app.command()(evaluate.main)
    done = CliRunner().invoke(app, [str(manifest), "--model", str(tiny_checkpoint), "--out", str(tmp_path / "r")])
    assert done.exit_code == 2
    assert "1.wav: cannot be read (No such file" in done.output


def test_a_damaged_file_of_rows_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"part": "a"}\n')
    with pytest.raises(evaluate.InputError, match=r"rows.jsonl: damaged"):
        Kept(tmp_path / "rows.jsonl", read_found)


def run(wer: float, bleu: float | None) -> Evaluation:
    results = [Result("a", "transcribe", "wer", wer, 9, 9.0, wer - 1, wer + 1)]
    results += [] if bleu is None else [Result("a", "translate_de", "bleu", bleu, 9, 9.0, None, None)]
    targets = (
        Target("a", "transcribe", "captions", "wer", 12, 5),
        Target("a", "translate_de", "to German", "bleu", trained=bleu is not None),
    )
    return Evaluation("tiny", "0123", "", tuple(results), targets=targets)


def test_what_is_reached_by_chance_perhaps_is_told() -> None:
    for wer, reached in ((9, "yes"), (11.5, "yes, unsure"), (12.5, "no, unsure"), (14, "no")):
        assert f"| ≤ 12 | {reached} | ≤ 5 | no |" in targets_table(run(wer, None))


def test_scores_are_summed_up() -> None:
    assert scores(run(130, 25)) == {"a transcribe": 0, "a translate_de": 25}
    assert geometric_mean([0, 25]) == pytest.approx(5)  # 0 counts as 1
    assert geometric_mean([50]) == pytest.approx(50)


def test_runs_are_compared(tmp_path: Path) -> None:
    files = []
    for name, evaluation in {"both": run(20, 25), "words": run(10, None), "worse": run(30, 16)}.items():
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "results.json")
        write_results(files[-1], evaluation)
    axes = ["--axis", "a transcribe", "--axis", "a translate_de"]
    printed = command(evaluate.main, "--compare", *files, *axes, "--out", tmp_path / "out")
    assert printed.splitlines()[0] == "| row | metric | both | words | worse |"
    assert "| captions | WER % | 20.0 (19.0–21.0) | 10.0 (9.0–11.0) | 30.0 (29.0–31.0) |" in printed
    assert "| to German | BLEU | 25.0 | – | 16.0 |" in printed
    assert "| geometric mean of the 1 rows of all runs | 0–100 | 80.0 | 90.0 | 70.0 |" in printed
    assert (tmp_path / "out" / "compare.md").read_text() in printed
    assert (tmp_path / "out" / "pareto.png").stat().st_size > 1000
    app = Typer()
    app.command()(evaluate.main)
    unused = CliRunner().invoke(
        app, ["--compare", str(files[0]), "--limit", "3", "--beams", "2", "--out", str(tmp_path)]
    )
    assert unused.exit_code == 2
    assert "error: --limit and --beams: --compare asks nothing" in unused.output
    (tmp_path / "taken" / "compare.md").mkdir(parents=True)
    taken = CliRunner().invoke(app, ["--compare", str(files[0]), "--out", str(tmp_path / "taken")])
    assert taken.exit_code == 2
    assert "compare.md: cannot be written (Is a directory)" in taken.output
    wrong = CliRunner().invoke(app, ["--compare", str(files[0]), "--axis", "a", "--out", str(tmp_path)])
    assert wrong.exit_code == 2
    assert "--axis: give it twice, each one of 'a transcribe'" in wrong.output
