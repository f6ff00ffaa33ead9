"""What tests is new to what trains, told by hand-made utterances."""

from typing import Any

import pytest

from speechllm.data.manifest import Utterance
from speechllm.data.overlap import (
    Heard,
    Trial,
    answering,
    heard,
    hold_out_sentences,
    persons,
    sentences,
    trials,
    untested,
)
from speechllm.errors import InputError
from speechllm.tasks import TASKS

WHOLE: dict[str, Any] = {  # has an answer for every task
    "text": "Is it far to the sea?",
    "translations": {language: f"{language}: far?" for language in ("de", "fr", "cs", "en")},
    "language": "en",
    "gender": "female",
    "segments": [{"speaker": "carla", "start": 0.1, "end": 0.9, "text": "Is it far to the sea?"}],
    "intent": "ask",
    "labels": {"emotion": "anger", "accent": "British"},
}


def said(speaker: str | None, text: str | None, **known: object) -> Utterance:
    facts = {"id": f"{speaker}-{text}", "audio": "a.wav", "source": "made", "split": "train", "duration": 1.0}
    return Utterance.model_validate(facts | {"speaker": speaker, "text": text} | known)


def talk(*turns: tuple[str | None, str]) -> Utterance:
    places = [{"speaker": speaker, "start": 0.1, "end": 0.9, "text": text} for speaker, text in turns]
    return said(None, None, segments=places)


def test_speakers_are_the_persons_behind_voices() -> None:
    assert persons([said("flite-slt", "a"), said("rhvoice-slt", "b"), said("anna", "c")]) == {"slt", "anna"}
    assert persons([talk(("anna", "a"), ("flite-awb", "b"))]) == {"anna", "awb"}
    assert persons([said(None, "a")]) == {None} == persons([talk((None, "a"))])
    assert persons([said("anna", "a b", segments=[{"speaker": None, "start": 0, "end": 1}])]) == {"anna"}
    assert persons([said(None, "")]) == frozenset(), "nobody speaks"


def test_sentences_are_compared_by_their_words() -> None:
    assert sentences([said("anna", "Two DOGS, run!"), said("ben", "two dogs run")]) == {"two dogs run"}
    assert sentences([talk(("anna", "Hi."), ("ben", "Yes?"))]) == {"hi", "yes"}
    assert sentences([talk(("anna", "Hi."), ("ben", ""))]) == {"hi", None}
    assert sentences([said("anna", None)]) == {None}
    assert sentences([said(None, "")]) == sentences([said("anna", "...")]) == frozenset()
    whole = said("anna", "a b", segments=[{"speaker": None, "start": 0, "end": 1, "text": words} for words in "ab"])
    assert sentences([whole]) == {"a b", "a", "b"}
    german = said("anna", "A dog.", translations={"de": "Ein Hund."})
    assert sentences([german]) == {"a dog"} and sentences([german], written=True) == {"a dog", "ein hund"}


def test_what_is_unknown_is_never_shared() -> None:
    some, others = heard([said("anna", "a"), said(None, None)]), heard([said("anna", "b"), said(None, None)])
    assert some & others == Heard(frozenset({"anna"}), frozenset())
    assert some | others == Heard(frozenset({"anna", None}), frozenset({"a", "b", None}))


def test_recordings_answer_the_tasks_they_hold_answers_for() -> None:
    whole, silence, unknown = said("carla", **WHOLE), said(None, ""), said("dora", None)
    found = answering([whole, silence, unknown])
    assert found.keys() == TASKS.keys() and all(whole in recordings for recordings in found.values())
    assert {name for name, recordings in found.items() if silence in recordings} == {
        *("activity", "speakers"),  # "no speech" and "none"; all the others say nothing at all
    }
    assert not any(unknown in recordings for recordings in found.values())


def test_a_task_needs_a_set_with_new_speakers_and_new_sentences() -> None:
    train = [said("anna", "Two dogs run."), said("flite-slt", "She sings.", translations={"de": "Sie singt."})]
    trained = heard(train, written=True)

    def newness(*utterances: Utterance, task: str = "transcribe") -> tuple[str, str, bool]:
        (trial,) = [trial for trial in trials(trained, {"set": utterances}) if trial.task == task]
        assert (trial.test, trial.recordings) == ("set", len(utterances))
        return trial.speakers, trial.sentences, trial.unseen

    assert newness(said("ben", "A boy jumps.")) == ("new", "new", True)
    assert newness(said("ben", "two dogs run")) == ("new", "shared", False)
    assert newness(said("ben", "Sie singt!")) == ("new", "shared", False)
    assert newness(said("rhvoice-slt", "A boy jumps.")) == ("shared", "new", False)
    assert newness(said("ben", "A boy jumps."), said("anna", "A girl.")) == ("shared", "new", False)
    assert newness(said(None, "A boy jumps.")) == ("unknown", "new", False)
    assert newness(said("ben", None, gender="male"), task="gender") == ("new", "unknown", False)
    assert newness(said(None, ""), task="speakers") == ("unknown", "unknown", False)
    assert newness(said("anna", "A boy jumps."), task="next_text") == ("shared", "new", True)


def test_only_recordings_with_an_answer_count() -> None:
    known, unknown = said("ben", "A boy jumps.", gender="male"), said("anna", "Two dogs run.")
    found = {trial.task: trial for trial in trials(heard([unknown]), {"set": [known, unknown]})}
    assert found["gender"] == Trial("gender", "set", 1, "new", "new")
    assert found["transcribe"] == Trial("transcribe", "set", 2, "shared", "shared")


def test_untested_tasks() -> None:
    everything = said("carla", **WHOLE)
    assert untested([]) == list(TASKS)
    assert untested(trials(Heard(), {"quiet": [said(None, "")], "whole": [everything]})) == []
    calm = everything.model_copy(update={"labels": {"accent": "British"}})
    assert untested(trials(Heard(), {"whole": [calm]})) == ["emotion", "is_emotion"]
    by_text = [name for name, task in TASKS.items() if task.listens]
    assert untested(trials(Heard(frozenset({"carla"})), {"whole": [everything]})) == by_text


def test_held_out_sentences_are_tested_alone_and_speakers_stay() -> None:
    speakers = {"train": ("anna", "ben"), "dev": ("carla",), "test": ("dora", "emil")}
    everyone = [
        said(speaker, f"Sentence number {number}.", split=split)
        for split, names in speakers.items()
        for speaker in names
        for number in range(10)
    ]
    left = hold_out_sentences(everyone, 0.3)
    assert left == hold_out_sentences(everyone[::-1], 0.3)[::-1]
    by_split = {split: [utterance for utterance in left if utterance.split == split] for split in speakers}
    assert {split: persons(utterances) for split, utterances in by_split.items()} == {
        split: set(names) for split, names in speakers.items()
    }
    tested = sentences(by_split["test"])
    assert len(tested) == 3 and len(by_split["test"]) == 6
    assert len(by_split["train"]) == 14 and not tested & sentences(by_split["train"] + by_split["dev"])


def test_what_cannot_be_held_out() -> None:
    everyone = [said("anna", "a"), said("ben", "b", split="test")]
    with pytest.raises(InputError, match="ben-None: has no text"):
        hold_out_sentences([*everyone, said("ben", None)], 0.5)
    for share, split in ((0.1, "test"), (0.9, "train")):
        with pytest.raises(InputError, match=f"2 sentences leaves no {split} recording"):
            hold_out_sentences(everyone, share)
