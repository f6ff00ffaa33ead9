"""Tasks: wordings, answers written and read back, malformed answers, and finding a task from what a user types."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechllm.tasks import (
    TASKS,
    Facts,
    ParsedAnswer,
    Segment,
    Speaker,
    Task,
    Time,
    base,
    find_task,
    normalize_instruction,
)
from speechllm.tasks.answer import Part, shown
from speechllm.tasks.base import PHRASED, bare
from speechllm.tasks.labels import EMOTIONS, read_intent, write_intent
from speechllm.tasks.phrases import CHOICE, drawn

FILLED = {"is_emotion": "angry", "spoken_word": "dog"}  # what else fills a gap: any text
EVERY = [
    (task, wording.replace("{}", FILLED.get(task.name, "A dog runs")))
    for task in TASKS.values()
    for wording in task.wordings
]
TURNS = (
    Segment("bob", 0.32, 1.2, "hello  there"),
    Segment("ann", 1.0, 2.12, "hi"),
    Segment("bob", 2.4, 3.0, "bye"),
)
PARTS = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.builds(Time, st.floats(-1, 40, allow_nan=False)),
        st.builds(Speaker, st.integers(1, 8)),
    ),
    max_size=12,
).map(tuple)
WORD = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=8)
each_task = pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)


@each_task
def test_wordings_are_enough_distinct_and_disjoint(task: Task) -> None:
    trained, held_out = set(map(bare, task.wordings)), set(map(bare, task.held_out))
    assert len(task.wordings) == len(set(task.wordings))
    assert len(trained) >= 20
    assert len(held_out) == len(task.held_out) >= 5
    assert not trained & held_out
    assert len({"{}" in wording for wording in task.wordings + task.held_out}) == 1
    assert all(normalize_instruction(wording) == wording for wording in task.wordings + task.held_out)


@each_task
def test_phrases_ask_for_their_task_and_keep_away_from_held_out_wordings(task: Task) -> None:
    rng, said = Random(0), {choice for phrase in task.phrases for choice in each_choice(phrase)}
    said |= {drawn(rng.choice(task.phrases), rng) for _ in range(100)}
    for text in said:
        assert normalize_instruction(text) == text and not set(text) & set("()|")
        asked = text.replace("{}", FILLED.get(task.name, "A dog runs"))
        assert [other.name for other in TASKS.values() if other.match(asked) is not None] == [task.name], asked
        assert all(distance(bare(text), bare(wording)) > 1 for wording in task.held_out), text


@each_task
def test_held_out_wordings_are_known_as_no_task(task: Task) -> None:
    assert [find_task(w.replace("{}", FILLED.get(task.name, "A dog runs"))) for w in task.held_out] == [None] * 5
    assert all(distance(bare(w), bare(known)) > 1 for w in task.held_out for known in task.wordings)


def each_choice(phrase: str) -> set[str]:
    """What a phrase says with any one choice made each way, the others being the first."""
    first = CHOICE.sub(lambda found: found[1].split("|")[0], phrase)
    texts = {first}
    for found in CHOICE.finditer(phrase):
        for choice in found[1].split("|"):
            before, after = phrase[: found.start()], phrase[found.end() :]
            texts.add(CHOICE.sub(lambda other: other[1].split("|")[0], f"{before}{choice}{after}"))
    return {normalize_instruction(text) for text in texts}


def distance(one: str, other: str) -> int:
    """In words."""
    row = list(range(len(other.split()) + 1))
    for number, word in enumerate(one.split(), 1):
        last, row[0] = row[0], number
        for place, its in enumerate(other.split(), 1):
            last, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, last + (word != its))
    return row[-1]


def test_training_asks_in_wordings_and_phrases_and_tests_do_not() -> None:
    task, facts = TASKS["transcribe"], Facts(1.0, "A dog.")
    asked = [(task.pose(facts, Random(seed)) or ("",))[0] for seed in range(400)]
    assert sum(one in task.wordings for one in asked) / len(asked) == pytest.approx(1 - PHRASED, abs=0.1)
    assert {*asked} >= {*task.wordings}
    assert {(task.pose(facts, Random(seed), task.held_out) or ("",))[0] for seed in range(99)} == {*task.held_out}


@pytest.mark.parametrize(("task", "wording"), EVERY)
def test_every_wording_finds_its_task_only(task: Task, wording: str) -> None:
    for typed in (wording, f"\n  {wording.upper()} ?! ", wording.rstrip(".?").replace(" ", "  ")):
        assert find_task(typed) is task
        assert [other.name for other in TASKS.values() if other.match(typed) is not None] == [task.name]


@pytest.mark.parametrize(
    "text", ["", " . ", "Translate this audio", "Translate this audio to Maori", "Transcribe", "Is the speaker tall?"]
)
def test_unknown_instructions_find_nothing(text: str) -> None:
    assert find_task(text) is None


def test_a_task_looks_at_a_long_instruction_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each of its wordings."""
    looks: list[str] = []
    monkeypatch.setattr(base, "bare", lambda text: looks.append(text) or bare(text))
    assert TASKS["transcribe"].match("What is this?" * 1000) is None
    assert len(looks) == 1


def test_the_gap_is_read_back() -> None:
    assert TASKS["spoken_word"].match('Did you hear "dog" in this clip?') is None  # nor is that a word
    assert TASKS["spoken_word"].match('is the word "Dog" spoken?') == "dog"
    assert TASKS["translate_text_de"].match("Translate to German: a man runs.") == "a man runs"


def test_normalising_keeps_case_and_punctuation() -> None:
    assert normalize_instruction(" Transcribe \n\t this  audio. ") == "Transcribe this audio."


def test_words() -> None:
    facts = Facts(1.0, " A  dog.\n", translations={"de": " Ein  Hund. "})
    assert TASKS["transcribe"].write(facts) == ("A dog.",)
    assert TASKS["translate_de"].write(facts) == ("Ein Hund.",)
    assert TASKS["translate_fr"].write(facts) is None
    assert TASKS["translate_de"].write(Facts(1.0, translations={"de": "Ja."})) == ("Ja.",)
    assert TASKS["transcribe"].write(Facts(1.0)) is None
    assert TASKS["transcribe"].read(("A dog.",)) == ParsedAnswer("A dog.")
    assert TASKS["transcribe"].read(("A dog.", Time(1))).faults


def test_silence() -> None:
    silence = Facts(2.0, "")
    for name in ("transcribe", "translate_de", "transcribe_times", "diarize", "turns"):
        assert TASKS[name].write(silence) == ()
        assert TASKS[name].read(()) == ParsedAnswer("")
    assert TASKS["activity"].write(silence) == ("no speech",)
    assert TASKS["activity"].read(("no speech",)) == ParsedAnswer("no speech")
    assert TASKS["speakers"].write(silence) == ("none",)
    assert TASKS["spoken_word"].write(silence, "dog") == ("no",)
    for name in ("language", "emotion", "gender", "accent", "intent", "next_text", "spoken_word"):
        assert TASKS[name].pose(silence, Random(0)) is None


def test_segments() -> None:
    facts = Facts(4.0, segments=TURNS)
    parts = TASKS["diarize"].write(facts)
    assert parts is not None
    assert shown(parts) == (
        "<|spk1|> <|0.32|> hello there <|1.20|> <|spk2|> <|1.00|> hi <|2.12|> <|spk1|> <|2.40|> bye <|3.00|>"
    )
    segments = TASKS["diarize"].read(parts).segments
    assert [(s.speaker, s.start, s.end, s.text) for s in segments] == [
        ("spk1", 0.32, 1.2, "hello there"),
        ("spk2", 1.0, 2.12, "hi"),
        ("spk1", 2.4, 3.0, "bye"),
    ]
    assert shown(TASKS["transcribe_times"].write(facts) or ()).startswith("<|0.32|> hello there <|1.20|> <|1.00|> hi")
    turns = TASKS["turns"].write(facts)
    assert turns is not None
    assert shown(turns).startswith("<|spk1|> <|0.32|> <|1.20|> <|spk2|> <|1.00|> <|2.12|>")
    assert TASKS["turns"].read(turns).segments[1] == Segment("spk2", 1.0, 2.12)
    assert TASKS["activity"].write(facts) == (Time(0.32), Time(2.12), Time(2.4), Time(3.0))
    assert TASKS["speakers"].write(facts) == ("two",)
    silent = Facts(4.0, segments=(Segment("ann", 0, 1),))
    assert TASKS["diarize"].write(silent) is None  # the words are not known
    assert TASKS["turns"].write(silent) == (Speaker(1), Time(0), Time(1))


@pytest.mark.parametrize(
    ("parts", "kept", "fault"),
    [
        ((Speaker(1), Time(1), "a", Time(0.5)), 0, "ends before"),
        ((Speaker(1), Time(1), "a", Time(2), Speaker(2), Time(0.5), "b", Time(3)), 1, "starts before"),
        ((Time(1), "a", Time(2)), 0, "no speaker"),
        ((Speaker(1), Time(1), "a"), 0, "no end"),
        ((Speaker(1), Time(1), "a", Speaker(2), Time(2), "b", Time(3)), 1, "no end"),
        ((Speaker(1), Time(1), Time(2)), 0, "no words"),
        (("a",), 0, "outside"),
        ((Speaker(1),), 0, "nothing of spk1 after the mark"),
        ((Speaker(1), Speaker(2), Time(1), "a", Time(2)), 1, "nothing of spk1"),
        ((Speaker(1), Time(0.1), "a", Time(1), Time(1.2), "b", Time(2)), 1, "from 1.20 to 2.00 s has no speaker"),
    ],
)
def test_malformed_segments(parts: tuple[Part, ...], kept: int, fault: str) -> None:
    parsed = TASKS["diarize"].read(parts)
    assert len(parsed.segments) == kept
    assert [fault in told for told in parsed.faults] == [True]


def test_whoever_speaks_is_not_told_where_it_is_not_asked() -> None:
    parsed = TASKS["transcribe_times"].read((Speaker(1), Time(0.12), "hi", Time(1), Speaker(2)))
    assert parsed.segments == (Segment(None, 0.12, 1.0, "hi"),)
    assert parsed.faults == ("a speaker's mark", "a speaker's mark")


def test_labels() -> None:
    facts = Facts(1.0, "hi", "de", "female", labels={"emotion": "anger", "accent": "GRC/Greek"})
    for name, label in {"emotion": "angry", "language": "German", "gender": "female", "accent": "Greek"}.items():
        assert TASKS[name].write(facts) == (label,)
        assert TASKS[name].read((f" {label.upper()}. ",)).label == label
        wrong = TASKS[name].read(("banana",))
        assert wrong.label is None
        assert wrong.faults
        assert TASKS[name].pose(Facts(1.0), Random(0)) is None


def test_speakers_are_counted() -> None:
    task = TASKS["speakers"]
    again = Segment("ann", 2.2, 2.4, "so")
    assert task.write(Facts(4.0, segments=(*TURNS, again))) == ("two",)
    assert task.write(Facts(1.0, segments=(again,))) == ("one",)
    assert task.write(Facts(1.0, "", segments=(again,))) == ("none",)
    assert task.write(Facts(1.0, segments=(Segment(None, 0, 1),))) is None
    for answer, label in (("two", "two"), ("Two.", "two"), ("1 2 1: two", None), ("many", None)):
        parsed = task.read((answer,))
        assert (parsed.text, parsed.label, bool(parsed.faults)) == (answer, label, label is None)


def test_accents_by_name_or_by_first_language() -> None:
    accent = TASKS["accent"]
    for labels, label in (
        ({"accent": "British"}, "British"),
        ({"native_language": "Marathi"}, "Indian"),
        ({"native_language": "Mandarin"}, "Chinese"),
        ({"accent": "USA/neutral", "native_language": "German"}, "American"),
    ):
        assert accent.write(Facts(1.0, labels=labels)) == (label,)
    assert accent.write(Facts(1.0, labels={"native_language": "Klingon"})) is None
    assert len(set(accent.labels)) == len(accent.labels) > 10  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["sadness", "sad", "Sad", " Sadness. "])
def test_emotions_by_their_names_or_ours(name: str) -> None:
    facts = Facts(1.0, labels={"emotion": name})
    assert TASKS["emotion"].write(facts) == ("sad",)
    assert TASKS["is_emotion"].write(facts, "sad") == ("sad: yes",)
    assert TASKS["emotion"].write(Facts(1.0, labels={"emotion": "un" + name.strip()})) is None


def test_questions_with_a_gap_are_asked_both_ways() -> None:
    facts = Facts(1.0, "Two dogs run.", "en", labels={"emotion": "anger"})
    other = Facts(1.0, "Two cats sleep, so.", "en", labels={"emotion": "fear"})
    same = Facts(1.0, "Two. Dogs run!", "en", labels={"emotion": "anger"})
    for name, own, theirs in (
        ("is_emotion", {"angry"}, {"afraid"}),
        ("spoken_word", {"dogs", "run"}, {"cats", "sleep"}),  # nothing that both say, or that is short
    ):
        task, seen = TASKS[name], set()
        for seed in range(200):
            rng = Random(seed)
            asked = task.pose(facts, rng, None, lambda rng=rng: rng.choice([same, same, other]))  # type: ignore[misc]
            assert asked is not None
            about = task.match(asked[0])
            (answer,) = asked[1]
            label = task.read(asked[1]).label
            assert label == ("yes" if about in own else "no")
            assert answer == f"{'angry' if name == 'is_emotion' else 'two dogs run'}: {label}"
            assert task.read((f"{label}.",)).label == label and task.read((f"{label} and more",)).faults
            seen.add((about, label))
        assert seen == {(a, "yes") for a in own} | {(a, "no") for a in theirs}
        alone = task.pose(facts, Random(1), None, lambda: same)
        assert alone is not None and task.read(alone[1]).label == "yes"
    assert set(EMOTIONS) == set(TASKS["emotion"].labels)  # type: ignore[attr-defined]


def test_a_question_with_a_gap_does_not_tell_its_own_answer() -> None:
    """Whatever is asked about is there as often as it is not, though some words are said more often than others."""
    texts = ["the man runs", "the man sleeps", "the man sings", "the dog runs", "dogs sleep"]
    emotions = ["anger", "fear", "sadness", "calm", "disgust"]
    corpus = [Facts(1.0, text, labels={"emotion": e}) for text, e in zip(texts, emotions, strict=True)]
    rng = Random(0)
    for name, seldom in (("is_emotion", 5), ("spoken_word", 8)):
        task, asked, yes = TASKS[name], Counter[str](), Counter[str]()
        for _ in range(8000):
            posed = task.pose(rng.choice(corpus), rng, None, lambda: rng.choice(corpus))
            assert posed is not None
            about = task.match(posed[0])
            assert about is not None
            asked[about] += 1
            yes[about] += task.read(posed[1]).label == "yes"
        assert len(asked) == seldom
        assert all(yes[about] / count == pytest.approx(0.5, abs=0.07) for about, count in asked.items())


def test_text_tasks_hold_everything_in_the_instruction() -> None:
    facts = Facts(1.0, "Two dogs run fast.", "en", translations={"de": "Zwei Hunde."})
    asked = TASKS["translate_text_de"].pose(facts, Random(1))
    assert asked is not None
    assert asked[0].endswith("Two dogs run fast.")
    assert asked[1] == ("Zwei Hunde.",)
    asked = TASKS["next_text"].pose(facts, Random(1))
    assert asked is not None
    begun = TASKS["next_text"].match(asked[0])
    assert f"{begun} {asked[1][0]}".lower() == "two dogs run fast."
    assert not any(TASKS[name].listens for name in ("translate_text_de", "next_text"))


def test_intents() -> None:
    facts = Facts(1.0, intent="orderDrink", slots={"size": "twelve, (ounce)", "drink": "mocha"})
    assert TASKS["intent"].write(facts) == ("orderDrink(drink=mocha, size=twelve ounce)",)
    parsed = TASKS["intent"].read(("orderDrink(drink=mocha, size=twelve ounce)",))
    assert (parsed.label, parsed.slots, parsed.faults) == ("orderDrink", {"drink": "mocha", "size": "twelve ounce"}, ())
    assert read_intent("stop()") == ("stop", {}, ())
    assert write_intent("stop", {"x": "()", "=": "y", "z": "w"}) == "stop(z=w)"
    intent, slots, faults = read_intent("order(size=big, drink, size=small")
    assert (intent, slots, len(faults)) == ("order", {"size": "big"}, 3)
    assert read_intent("order")[0] is None


@given(WORD, st.dictionaries(WORD, WORD, max_size=4))
def test_any_intent_is_read_back(intent: str, slots: dict[str, str]) -> None:
    assert read_intent(write_intent(intent, slots)) == (intent, slots, ())


@given(PARTS)
def test_readers_survive_everything(parts: tuple[Part, ...]) -> None:
    for task in TASKS.values():
        parsed = task.read(parts)
        starts = [segment.start for segment in parsed.segments]
        assert starts == sorted(starts)
        assert all(segment.start < segment.end for segment in parsed.segments)
        assert parsed.label is None or parsed.label in getattr(task, "labels", [parsed.label])


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 500), st.integers(1, 100), WORD), min_size=1, max_size=6)
)
def test_any_conversation_is_read_back(turns: list[tuple[str, int, int, str]]) -> None:
    segments = tuple(
        Segment(speaker, start / 25, (start + length) / 25, word)
        for speaker, start, length, word in sorted(turns, key=lambda t: t[1:3])
    )
    for name in ("diarize", "transcribe_times", "turns"):
        parts = TASKS[name].write(Facts(40.0, segments=segments))
        assert parts is not None
        parsed = TASKS[name].read(parts)
        assert not parsed.faults
        assert [(s.start, s.end) for s in parsed.segments] == [(s.start, s.end) for s in segments]
        assert TASKS[name].write(Facts(40.0, segments=parsed.segments)) == parts or name == "transcribe_times"
