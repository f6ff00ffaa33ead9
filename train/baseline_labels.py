"""Labels without our model: the commonest answer, and a support vector machine on statistics of the sound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from speechllm.data.corpus import Item, read_corpus
from speechllm.data.manifest import Split
from speechllm.errors import InputError
from speechllm.tasks import ParsedAnswer, Task, Trait
from speechllm.tasks.labels import Intent, Label, write_intent
from train.baseline_features import RATE, features
from train.baseline_system import needed
from train.questions import Advance, Question, pose

# what is tried on the dev split: C, and gamma as multiples of one over the number of features
COSTS = (0.3, 1.0, 3.0, 10.0, 30.0)
GAMMAS = (0.1, 0.3, 1.0)


class Majority:
    """Answers every question with the label most frequent in the train split of the same set."""

    name = "majority"

    def __init__(self, data: Path) -> None:
        self._data = data

    def answer(self, questions: Sequence[Question], task: Task, advance: Advance) -> list[ParsedAnswer]:
        """Raises InputError for a task without labels, or a set without a label to learn from."""
        if not isinstance(task, Label | Intent):
            raise InputError(f"majority: {task.name} has no labels to count; it answers tasks with labels alone")
        counts = Counter(task.read(one.answer).label for one in pose(read_corpus([self._data], "train"), task))
        if not counts:
            raise _unlabelled(self.name, self._data, task, "train")
        label = str(min(counts, key=lambda one: (-counts[one], str(one))))
        said = task.read((label if isinstance(task, Label) else write_intent(label, {}),))
        advance(len(questions))
        return [said] * len(questions)


class Svm:
    """A support vector machine with a Gaussian kernel on :func:`features`, each scaled to the unit deviation.

    Trained on the train split of the same set, labels weighted by their rarity; C and gamma are the ones with the best
    unweighted average recall on its dev split. What the test split holds is only answered.
    """

    name = "svm"

    def __init__(self, data: Path) -> None:
        self._data = data

    def answer(self, questions: Sequence[Question], task: Task, advance: Advance) -> list[ParsedAnswer]:
        """Raises InputError for a task that tells no trait of a recording, or splits without two labels."""
        if not isinstance(task, Trait):
            traits = "emotion, language, gender, accent and speakers"
            raise InputError(f"svm: it tells traits of a recording ({traits}), and does not answer {task.name}")
        machine = self._trained(task)
        answers = []
        for question in questions:
            heard = features(question.wav(RATE)).numpy()[None]
            answers.append(task.read((str(machine.predict(heard)[0]),)))
            advance(1)
        return answers

    def _trained(self, task: Task) -> Any:
        preprocessing = needed(self.name, "sklearn.preprocessing", "scikit-learn")
        from sklearn.metrics import balanced_accuracy_score
        from sklearn.pipeline import make_pipeline
        from sklearn.svm import SVC

        heard, labels = self._labelled(task, "train")
        if len(set(labels)) < 2:
            raise InputError(f"svm: {self._data}: all of its train split is {labels[0]!r}; two labels are needed")
        dev_heard, dev_labels = self._labelled(task, "dev")
        found = []
        for cost in COSTS:
            for gamma in GAMMAS:
                svm = SVC(C=cost, gamma=gamma / heard.shape[1], class_weight="balanced")
                machine = make_pipeline(preprocessing.StandardScaler(), svm).fit(heard, labels)
                recall = balanced_accuracy_score(dev_labels, machine.predict(dev_heard))
                found.append((recall, machine))
        return max(found, key=lambda one: one[0])[1]  # of equals the first, whose border is the smoothest

    def _labelled(self, task: Task, split: Split) -> tuple[np.ndarray, list[str]]:
        """Features ``[clips, SIZE]`` and labels of the clips whose label is known."""
        items, heard = _heard(self._data, split)
        places = {item.utterance.id: place for place, item in enumerate(items)}
        questions = pose(items, task)
        if not questions:
            raise _unlabelled(self.name, self._data, task, split)
        labels = [str(task.read(question.answer).label) for question in questions]
        return heard[[places[question.item.utterance.id] for question in questions]], labels


def _unlabelled(name: str, data: Path, task: Task, split: Split) -> InputError:
    return InputError(f"{name}: {data}: no {split} clip has a label of the task {task.name}; leave the baseline out")


@cache
def _heard(data: Path, split: Split) -> tuple[list[Item], np.ndarray]:
    """The clips of a split and their features, float32 ``[clips, SIZE]``; kept, for another task on the same set."""
    items = read_corpus([data], split)
    return items, np.stack([features(item.wav(RATE)).numpy() for item in items])
