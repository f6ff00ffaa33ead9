"""Episodes: what the shots of a question are, which answers are trained on, and what stays out of training."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from datasets import Dataset

from speechllm.data.encoded import row_facts, write_facts
from speechllm.data.episodes import EXCERPT, MAX_SHOTS, MAX_TRANSCRIPTS, ROOM, Kin, Turn, excerpt, label_turns
from speechllm.data.label_names import HELD_OUT_NAMES, listed, names
from speechllm.data.mixture import Draw, Mixture
from speechllm.prompt import IGNORE_INDEX
from speechllm.tasks import FEW_SHOT, TASKS, Facts, find_task
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary
from train.encode import FEATURES

TEXT = TextTokenizer.load(Path(__file__).parents[1] / "tokenizers" / "text.model")
VOCABULARY = Vocabulary(TEXT.size, n_q=2, card=16, acoustic_stride=3)
SPEAKERS = ("ann", "bob", "eve")
WORDS = ("left", "right", "stop")
SENTENCES = (
    "The giraffe sleeps.",
    "A giraffe eats.",
    "The man sleeps.",
    "Someone eats a giraffe now.",
    "The man eats.",
)


def row(name: str, text: str | None, speaker: str, seconds: float, number: int) -> dict:
    frames = round(25 * seconds)
    codes = torch.randint(16, (2, frames), generator=torch.Generator().manual_seed(number))
    facts = Facts(seconds, text, "en", {"ann": "female", "bob": "male"}.get(speaker))
    return {
        "id": name,
        "split": "train",
        "source": "made",
        "speaker": speaker,
        "facts": write_facts(facts),
        "n_q": 2,
        "codes": codes.flatten().tolist(),
    }


def corpus(texts: tuple[str, ...], seconds: float, each: int = 3) -> Dataset:
    told = [(text, speaker, n) for n in range(each) for speaker in SPEAKERS for text in texts]
    rows = [
        row(f"{text} {speaker} {n}", text, speaker, seconds + 0.04 * place, place)
        for place, (text, speaker, n) in enumerate(told)
    ]
    return Dataset.from_list(rows, features=FEATURES)


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    corpora = {"words": corpus(WORDS, 0.6), "sentences": corpus(SENTENCES, 3.0), "noise": corpus(("",), 1.0)}
    return Mixture(corpora, VOCABULARY, TEXT, [*FEW_SHOT, "transcribe"])


def episodes(mixture: Mixture, task: str, count: int = 120) -> list[list[Turn]]:
    rows = [int(row) for pool in mixture.pools[task].values() for row in pool.rows]
    return [mixture.turns(Draw(task, Random(n).choice(rows)), Random(n)) for n in range(count)]


def text_of(mixture: Mixture, row: int) -> str | None:
    return row_facts(mixture.rows[row]).text


CLASS_OF: dict[str, Callable[[Mixture, int], str | None]] = {
    "few_shot_word": text_of,
    "few_shot_speaker": lambda mixture, row: mixture.rows[row]["speaker"],
    "few_shot_gender": lambda mixture, row: row_facts(mixture.rows[row]).gender,
    "few_shot_speech": lambda mixture, row: "somebody" if text_of(mixture, row) else "nobody",
}


@pytest.mark.parametrize("task", CLASS_OF)
def test_labels_are_told_by_the_shots_alone(mixture: Mixture, task: str) -> None:
    seen_counts, seen_labels = set(), set()
    for turns in episodes(mixture, task):
        classes = [CLASS_OF[task](mixture, turn.row) for turn in turns]
        labels = [turn.answer[0] for turn in turns]
        assert len(set(zip(classes, labels, strict=True))) == len(set(classes)) == len(set(labels))  # one for one
        assert classes[-1] in classes[:-1]
        assert [turn.learnt for turn in turns] == [c in classes[:n] for n, c in enumerate(classes)]
        assert len({turn.instruction for turn, own in zip(turns, classes, strict=True) if turn.instruction != own}) <= 1
        assert all(turn.whole == FEW_SHOT[task].whole for turn in turns)
        seen_counts.add(len(turns) - 1)
        seen_labels |= set(labels)
    assert len(seen_counts) > 5
    assert seen_counts <= set(range(2, MAX_SHOTS + 1))
    assert len(seen_labels) > 60
    assert not seen_labels & set(HELD_OUT_NAMES)


def test_counting_tells_no_label() -> None:
    """Neither the one seen least so far, which comes next where classes take turns, nor the one seen most."""
    rows = range(80)
    kin = Kin(FEW_SHOT["few_shot_word"], rows, ["a"] * 80, [[f"word {row % 4}"] for row in rows], [30.0] * 80)
    chance, guessed = 0.0, Counter[str]()
    for number in range(4000):
        seen = Counter[tuple]()
        for turn in label_turns(kin, number % 80, (), Random(number), ("?",)):
            if turn.learnt:
                chance += 1 / len(seen)
                for name, some in (("least", min(seen.values())), ("most", max(seen.values()))):
                    alike = [answer for answer, count in seen.items() if count == some]
                    guessed[name] += (turn.answer in alike) / len(alike)
            seen[turn.answer] += 1
    assert all(abs(right / chance - 1) < 0.03 for right in guessed.values()), (guessed, chance)


def test_no_shot_is_told_twice(mixture: Mixture) -> None:
    for task in CLASS_OF:
        for turns in episodes(mixture, task):
            shots = [turn.row for turn in turns[:-1]]
            assert len(shots) == len(set(shots)) >= 2


def test_varied_copies_are_nobody_and_no_shots_of_their_words() -> None:
    texts = ("The giraffe sleeps.", "My giraffe eats.", "The giraffe eats.")
    rows = [row(f"{n}{mark}", text, "ann", 1.0, n) for n, text in enumerate(texts) for mark in ("", "#1", "#2")]
    rows += [row("3", "A man.", "bob", 1.0, 3), row("4", "Two men.", "bob", 1.0, 4)]
    tasks = ["few_shot_speaker", "few_shot_hot_words", "few_shot_same_speaker", "few_shot_language"]
    data = Dataset.from_list(rows, features=FEATURES)
    pools = Mixture({"c": data}, VOCABULARY, TEXT, ["transcribe", *tasks]).pools
    assert len(pools["transcribe"]["c"].rows) == len(rows)
    for task in tasks[:3]:
        assert {"#" in data[int(number)]["id"] for number in pools[task]["c"].rows} == {False}, task


def test_recordings_of_an_episode_are_of_one_corpus_unless_they_may_be_of_all(mixture: Mixture) -> None:
    ends = {"words": 27, "sentences": 27 + 45, "noise": 27 + 45 + 9}

    def corpora(turns: list[Turn]) -> set[str]:
        return {next(name for name, end in ends.items() if turn.row < end) for turn in turns}

    assert all(len(corpora(turns)) == 1 for turns in episodes(mixture, "few_shot_gender"))
    assert any(len(corpora(turns)) == 3 for turns in episodes(mixture, "few_shot_speech"))


def test_now_and_then_a_shot_is_the_recording_itself(mixture: Mixture) -> None:
    again = [turns[-1].row in {turn.row for turn in turns[:-1]} for turns in episodes(mixture, "few_shot_word", 400)]
    assert 0.2 < sum(again) / len(again) < 0.4


def test_names_of_labels() -> None:
    rng = Random(1)
    drawn = [names(4, ["cat", "dog", "sun", "sea", *HELD_OUT_NAMES], rng) for _ in range(500)]
    assert all(len(set(some)) == 4 for some in drawn)
    assert not {name for some in drawn for name in some} & set(HELD_OUT_NAMES)
    assert sum(set(some) == {"cat", "dog", "sun", "sea"} for some in drawn) > 100
    assert any(len(name) == 1 for some in drawn for name in some)
    assert [listed(some) for some in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a or b", "a, b or c"]


def test_too_few_words_name_nothing() -> None:
    for some in (["yes", "no"], ["yes"] * 9, [*HELD_OUT_NAMES], []):
        assert all(len(set(names(3, some, Random(n)))) == 3 for n in range(50))


def test_transcripts_have_related_ones_before_them(mixture: Mixture) -> None:
    lengths = set()
    for turns in episodes(mixture, "few_shot_same_speaker"):
        assert len({mixture.rows[turn.row]["speaker"] for turn in turns}) == 1
        assert [turn.answer for turn in turns] == [(text_of(mixture, turn.row),) for turn in turns]
        assert 1 <= len(turns) == len({text_of(mixture, turn.row) for turn in turns}) <= MAX_TRANSCRIPTS + 1
        lengths.add(len(turns))
        assert all(turn.learnt and turn.whole for turn in turns)
        assert turns[0].instruction in TASKS["transcribe"].wordings
    assert lengths >= {2, 3, 4}


def test_words_alone_are_no_hot_words() -> None:
    texts = ("giraffe", "giraffe", "A giraffe sleeps.", "The giraffe eats.")
    rows = [row(str(n), text, "ann", 1.0, n) for n, text in enumerate(texts)]
    mixture = Mixture({"c": Dataset.from_list(rows, features=FEATURES)}, VOCABULARY, TEXT, ["few_shot_hot_words"])
    assert mixture.pools["few_shot_hot_words"]["c"].rows.tolist() == [2, 3]


def test_shots_are_of_the_corpora_of_their_task() -> None:
    rows = [row(f"{text} {n}", text, "ann", 0.6, n) for n in range(3) for text in WORDS]
    data = Dataset.from_list(rows, features=FEATURES)
    corpora, tasks = {"one": data, "two": data, "three": data}, ["few_shot_speech", "few_shot_word", "transcribe"]
    noise = Dataset.from_list([row(f"noise {n}", "", "bob", 0.6, n) for n in range(3)], features=FEATURES)
    mixture = Mixture(
        corpora | {"noise": noise}, VOCABULARY, TEXT, tasks, task_corpora={"few_shot_speech": ("two", "noise")}
    )
    assert mixture.pools["few_shot_speech"].keys() == {"two", "noise"}
    assert mixture.pools["few_shot_word"].keys() == {"one", "two", "three"}
    assert {turn.row for turns in episodes(mixture, "few_shot_speech") for turn in turns} == {
        *range(9, 18),
        *range(27, 30),
    }


def test_hot_words_are_rare_and_shared() -> None:
    texts = ("The giraffe sleeps.", "My giraffe eats.", "The people sleep.", *["The people walk."] * 30)
    rows = [row(str(n), text, "ann", 1.0, n) for n, text in enumerate(texts)]
    mixture = Mixture({"c": Dataset.from_list(rows, features=FEATURES)}, VOCABULARY, TEXT, ["few_shot_hot_words"])
    assert mixture.pools["few_shot_hot_words"]["c"].rows.tolist() == [0, 1]  # "sleeps" once, "people" 31 times
    for turns in episodes(mixture, "few_shot_hot_words", 10):
        assert sorted(turn.row for turn in turns) == [0, 1]


def test_who_has_no_relative_is_not_asked() -> None:
    task = FEW_SHOT["few_shot_word"]
    kin = Kin(task, [1, 2, 3, 4, 5], ["a", "a", "a", "b", "b"], [["x"], ["x"], ["y"], ["z"], ["z"]], [30.0] * 5)
    assert kin.own == {}  # two words at least must be told apart, each said twice
    kin = Kin(task, [1, 2, 3, 4, 5], ["a"] * 5, [["x"], ["x"], ["y"], ["z"], ["z"]], [30.0] * 5)
    assert [*kin.own] == [1, 2, 4, 5]
    found = [kin.relatives(1, ["z", "x", "x", "z"], Random(n)) for n in range(20)]
    assert all([key for key, _ in some] == ["z", "x", "z"] for some in found), "the only other x once"
    assert {tuple(row for _, row in some) for some in found} == {(4, 2, 5), (5, 2, 4)}


def test_a_batch_trains_on_what_has_been_told(mixture: Mixture) -> None:
    draws = [Draw(task, int(next(iter(mixture.pools[task].values())).rows[0])) for task in (*CLASS_OF, "transcribe")]
    batch = mixture.batch(draws, 1, Random(5))
    assert len(batch.draws) == len(draws) < len(batch.audio_lengths)
    assert int(batch.audio_mask.sum()) == int(batch.audio_lengths.sum())
    assert len(batch.transcript_lengths) == len(batch.traits) == len(batch.audio_lengths)
    for number, draw in enumerate(batch.draws):
        own = batch.example_ids == number
        ids = batch.lm.input_ids[own]
        answers = int((ids == VOCABULARY.answer).sum())
        ends = (batch.lm.labels[own] == VOCABULARY.end).sum()
        assert ends >= 1
        assert (answers == 1) == (draw.task == "transcribe")
        assert (ids == VOCABULARY.end).sum() == answers
        assert (batch.lm.labels[own] != IGNORE_INDEX).sum() < (ids != 0).sum() / 3
    heard = batch.transcript_lengths > 0
    assert heard.any()
    assert not heard.all()  # of an excerpt the words are not known


def test_answers_that_no_shot_has_told_are_not_trained_on(mixture: Mixture) -> None:
    for number, draws in enumerate(
        [Draw("few_shot_word", int(n))] for n in mixture.pools["few_shot_word"]["words"].rows
    ):
        turns = mixture.turns(draws[0], Random(number))
        batch = mixture.batch(draws, 1, Random(number))
        labels = batch.lm.labels[batch.lm.labels != IGNORE_INDEX]
        learnt = [[*VOCABULARY.text_ids(TEXT.encode(t.answer[0])).tolist(), VOCABULARY.end] for t in turns if t.learnt]
        assert labels.tolist() == [index for answer in learnt for index in answer]
        assert 0 < len(learnt) < len(turns)


def test_the_same_random_state_makes_the_same_batch(mixture: Mixture) -> None:
    draws = [Draw("few_shot_speaker", int(mixture.pools["few_shot_speaker"]["words"].rows[n])) for n in range(4)]
    first, again, other = (mixture.batch(draws, 1, Random(seed)).lm.input_ids for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_excerpts() -> None:
    codes = torch.arange(100).expand(2, 100)
    found = [excerpt(codes, 4.0, Random(seed)) for seed in range(200)]
    assert {round(seconds * 25) for seconds in EXCERPT} <= {part.shape[1] for part in found}
    assert {int(part[0, 0]) for part in found} >= {0, 40, 70}
    assert all(torch.equal(part[0], torch.arange(int(part[0, 0]), int(part[0, -1]) + 1)) for part in found)
    assert excerpt(codes[:, :20], 0.8, Random(0)).shape == (2, 20)


def test_lengths_are_about_what_is_planned(mixture: Mixture) -> None:
    for task in (*CLASS_OF, "few_shot_same_speaker"):
        for pool in mixture.pools[task].values():
            draws = [Draw(task, int(row)) for row in pool.rows.tolist() * 6]
            real = [len(mixture.sequence(draw, Random(n)).ids) for n, draw in enumerate(draws)]
            assert 0.6 < sum(real) / (6 * pool.lengths.sum()) < 1.5, task


def test_no_wording_of_an_episode_asks_for_a_task() -> None:
    for task in FEW_SHOT.values():
        if task.metric == "accuracy":
            assert not [w for w in (*task.wordings, *task.held_out) if find_task(w.replace("{}", "dax or wug"))]
            assert not set(task.wordings) & set(task.held_out)


def test_labels_come_from_the_words_of_others() -> None:
    kin = Kin(FEW_SHOT["few_shot_word"], range(8), ["a"] * 8, [["x"], ["x"], ["y"], ["y"]] * 2, [30.0] * 8)
    answers = {
        turn.answer for n in range(300) for turn in label_turns(kin, 0, ["sea", "sun", "fog"], Random(n), ("?",))
    }
    assert {("sea",), ("sun",), ("fog",)} <= answers


def test_nothing_is_made_easier_in_tests(mixture: Mixture) -> None:
    named = [turn.instruction == text_of(mixture, turn.row) for ts in episodes(mixture, "few_shot_word") for turn in ts]
    assert 0.45 < sum(named) / len(named) < 0.55
    for row in mixture.pools["few_shot_word"]["words"].rows.tolist():
        turns = mixture.turns(Draw("few_shot_word", row), Random(row), ("Which is it?",))
        assert {turn.instruction for turn in turns} == {"Which is it?"}
        assert row not in {turn.row for turn in turns[:-1]}


def test_words_on_paper_are_asked_for_themselves(mixture: Mixture) -> None:
    for turns in episodes(mixture, "few_shot_text"):
        assert [turn.instruction for turn in turns] == [text_of(mixture, turn.row) for turn in turns]
        assert len({(turn.instruction, turn.answer) for turn in turns}) == len({turn.instruction for turn in turns})
    draw = Draw("few_shot_text", int(mixture.pools["few_shot_text"]["words"].rows[0]))
    assert not any(example.codes.numel() for example in mixture.episode(draw, Random(0)))
    assert not mixture.vocabulary.is_audio(mixture.sequence(draw, Random(0)).ids).any()


def test_long_recordings_have_fewer_shots_or_are_none() -> None:
    task = FEW_SHOT["few_shot_intent"]
    ids = [50.0, 50.0, 399.0, 399.0, 401.0, 401.0] * 2
    kin = Kin(task, range(12), ["a"] * 12, [["x"], ["y"]] * 6, ids)
    assert sorted(kin.own) == [0, 1, 2, 3, 6, 7, 8, 9]
    for row in kin.own:
        for seed in range(30):
            turns = label_turns(kin, row, (), Random(seed), ("?",))
            assert sum(ids[turn.row] for turn in turns) <= ROOM
