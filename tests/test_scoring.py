"""Scores against cases computed by hand."""

import math

import numpy as np
import pytest

from speechllm.tasks import TASKS, Parts, Speaker, Time
from train.scoring import measures, score


def scores(name: str, true: list[Parts], said: list[Parts], seconds: float = 10.0) -> dict[str, float]:
    task = TASKS[name]
    return score(task, [*map(task.read, true)], [*map(task.read, said)], [seconds] * len(true))


def test_words() -> None:
    assert scores("transcribe", [("A dog runs.",), ("Yes.",)], [("a hat runs",), ()]) == {"wer": 50.0}
    assert scores("translate_de", [("Ein Hund läuft im Park.",)], [("Ein Hund läuft im Park.",)])["bleu"] > 99
    timed: Parts = (Time(1), "a dog", Time(2))
    found = scores("transcribe_times", [timed], [(Time(1.5), "a hat", Time(2), Time(3))])
    assert found == {"wer": 50.0, "malformed": 100.0}


def test_words_invented_where_nobody_speaks_do_not_count_among_the_others() -> None:
    found = scores("transcribe", [("A dog runs.",), (), ()], [("a hat runs",), ("and",), ()])
    assert found == {"wer": pytest.approx(100 / 3), "invented": 50.0}
    assert scores("translate_fr", [(), ()], [("un",), ()]) == {"invented": 50.0}


def test_labels() -> None:
    true: list[Parts] = [("angry",), ("angry",), ("angry",), ("sad",)]
    said: list[Parts] = [("angry",), ("sad",), ("banana",), ("Sad.",)]
    found = scores("emotion", true, said)
    assert found["accuracy"] == 50.0
    assert found["uar"] == pytest.approx(100 * (1 / 3 + 1) / 2)
    assert found["malformed"] == 25.0


def test_the_recall_of_some_labels_is_not_compared_with_that_of_all() -> None:
    task = TASKS["emotion"]
    true = [task.read((label,)) for label in ("angry", "sad", "angry", "sad", "angry")]
    recall, accuracy, _ = measures(task, true, true, [1.0] * 5)
    for chosen, whole in (([0, 1], True), ([0, 2, 4], False), ([3], False), ([1, 2, 3], True)):
        group = np.isin(np.arange(5), chosen)
        assert math.isnan(recall.value(group)) != whole
        assert accuracy.value(group) == 100


def test_slots() -> None:
    found = scores(
        "intent", [("order(drink=mocha, size=big)",)] * 2, [("order(drink=Mocha, size=small)",), ("stop()",)]
    )
    assert found["intent_accuracy"] == 50.0
    assert found["slot_f1"] == pytest.approx(100 * 2 * 1 / (4 + 2))


def test_activity() -> None:
    true: list[Parts] = [(Time(0), Time(2)), ("no speech",)]
    assert scores("activity", true, true)["f1"] == 100.0
    assert scores("activity", true, [(Time(1), Time(3)), ("no speech",)])["f1"] == pytest.approx(50.0)
    assert scores("activity", true, [("no speech",)] * 2)["f1"] == 0.0


def test_turns() -> None:
    true: Parts = (Speaker(1), Time(0), "hello world", Time(1), Speaker(2), Time(1), "yes", Time(2))
    renamed: Parts = (Speaker(2), Time(0), "hello world", Time(1), Speaker(1), Time(1), "yes", Time(2))
    merged: Parts = (Speaker(1), Time(0), "hello world", Time(1), Speaker(1), Time(1), "yes", Time(2))
    assert scores("diarize", [true], [renamed]) == {"der": 0.0, "cpwer": 0.0, "malformed": 0.0}
    found = scores("diarize", [true], [merged])
    assert found["der"] == pytest.approx(50.0)  # one of two seconds is given to the wrong speaker
    assert found["cpwer"] == pytest.approx(100 * 2 / 3)  # one word too many for one speaker, one missing for the other
    assert scores("turns", [(Speaker(1), Time(0), Time(2))], [()])["der"] == 100.0
