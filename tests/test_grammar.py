"""Grammars let through exactly what the tasks write and read: all short answers, random walks, random facts."""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import product
from random import Random
from typing import TypeVar

import pytest
import torch
from conftest import TEXT_MODEL
from hypothesis import given, settings
from hypothesis import strategies as st

from speechllm.errors import InputError
from speechllm.grammar import Grammar, Grammars
from speechllm.prompt import Example, answer_parts, render
from speechllm.tasks import TASKS, Facts, ParsedAnswer, Part, Parts, Segment, Speaker, Task, Time, shown
from speechllm.tasks.labels import Choice, Label
from speechllm.tasks.timed import NO_SPEECH, Timed
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary

T = TypeVar("T")
TEXT = TextTokenizer.load(TEXT_MODEL)
VOCABULARY = Vocabulary(TEXT.size + 3, n_q=2, card=16, times=101)  # rows without a piece; marks up to 4 s
GRAMMARS = Grammars(VOCABULARY, TEXT)
IDS = torch.arange(VOCABULARY.size)
END = VOCABULARY.end
WORD, SPACE = TEXT.encode("a")[0], TEXT.encode(" ")[-1]
TIMED = [task for task in TASKS.values() if isinstance(task, Timed)]
MARKED = [task for task in TASKS.values() if task.marks]
LABELLED = [task for task in TASKS.values() if isinstance(task, Label) and task.answers]
PLAIN = [task for task in TASKS.values() if not task.marks and not isinstance(task, Label)]


def written(parts: str | Parts) -> list[int]:
    """The ids of an answer, its end too, as in training."""
    rendered = render(Example(torch.zeros(2, 0, dtype=torch.int64), "?", parts), VOCABULARY, TEXT)
    return rendered.ids[rendered.prompt_length :].tolist()


def accepts(grammar: Grammar, ids: Sequence[int]) -> bool:
    """Whether these ids may come, one after the other."""
    state = grammar.start
    for index in ids:
        if not grammar.allowed(state)[index]:
            return False
        state = grammar.next(state, index)
    return True


def all_short(alphabet: Iterable[T], longest: int) -> Iterator[tuple[T, ...]]:
    symbols = tuple(alphabet)
    return (word for length in range(longest + 1) for word in product(symbols, repeat=length))


def ids_of(mask: torch.Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def after(grammar: Grammar, parts: Parts) -> list[int]:
    """What may come after the beginning of an answer."""
    ids = written(parts)[:-1]
    assert accepts(grammar, ids)
    state = grammar.start
    for index in ids:
        state = grammar.next(state, index)
    return ids_of(grammar.allowed(state))


def times(first: float, last: float) -> list[int]:
    return list(range(VOCABULARY.time(first), VOCABULARY.time(last) + 1))


def language(grammar: Grammar, state: Hashable, ids: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """All answers, where they are finite."""
    for index in ids_of(grammar.allowed(state)):
        if index == END:
            assert grammar.next(state, END) == state
            yield (*ids, END)
        else:
            yield from language(grammar, grammar.next(state, index), (*ids, index))


def as_written(parsed: ParsedAnswer, speakers: bool) -> Parts:
    """Segments as they were read, each with all its parts."""
    parts: list[Part] = []
    for segment in parsed.segments:
        parts += [Speaker(int(str(segment.speaker).removeprefix("spk")))] if speakers else []
        parts += [Time(segment.start), *filter(None, [segment.text]), Time(segment.end)]
    return tuple(parts)


@pytest.mark.parametrize("task", PLAIN, ids=lambda task: task.name)
def test_plain_text_is_any_text_that_may_be_said(task: Task) -> None:
    grammar = GRAMMARS.of(task, seconds=2.0)
    mask = grammar.allowed(grammar.start)
    assert mask.dtype == torch.bool and mask.shape == (VOCABULARY.size,)
    said = set(range(TEXT.size)) - set(TEXT.hidden_ids)
    assert 2900 < len(said) < TEXT.size
    assert set(ids_of(mask)) == said | {END}
    assert grammar.allowed(grammar.next(grammar.start, WORD)) is mask
    assert accepts(grammar, written("Two dogs: 3 \u5b57 \U0001f600 <unk>"))


@pytest.mark.parametrize(
    ("name", "answer", "whole"),
    [
        ("spoken_word", "two dogs: yes", True),
        ("spoken_word", "no", True),
        ("spoken_word", "two dogs:", False),
        ("spoken_word", "", False),
        ("spoken_word", "yes: dogs", False),
    ],
)
def test_an_open_answer_ends_once_it_can_be_read(name: str, answer: str, whole: bool) -> None:
    task = TASKS[name]
    grammar, ids = GRAMMARS.of(task, seconds=2.0), written(answer)
    assert accepts(grammar, ids[:-1]) and accepts(grammar, ids) == whole
    assert bool(task.read((answer,)).faults) != whole
    mask = grammar.allowed(grammar.start)
    assert set(ids_of(mask)) == set(range(TEXT.size)) - set(TEXT.hidden_ids)


@pytest.mark.parametrize("task", LABELLED, ids=lambda task: task.name)
def test_labels_are_the_only_answers(task: Label) -> None:
    grammar = GRAMMARS.of(task, seconds=2.0)
    answers = list(language(grammar, grammar.start))
    assert sorted(answers) == sorted(tuple(written((answer,))) for answer in task.answers)
    parsed = [task.read(answer_parts(ids, VOCABULARY, TEXT)) for ids in answers]
    assert {one.label for one in parsed} == set(task.labels)


def choice(*labels: str) -> Choice:
    return Choice("choice", "accuracy", (), (), labels=labels)


def test_labels_given_may_begin_one_another() -> None:
    labels = ("on", "one hundred", "one", "one hundred dogs", "off", "\u5b57", "U+\U0001f600", "stop(what=light)")
    grammar = GRAMMARS.of(choice(*labels))
    assert set(language(grammar, grammar.start)) == {tuple(written(label)) for label in labels}
    assert END not in after(grammar, ()) and END in after(grammar, ("one",))
    assert set(after(grammar, ("one",))) == {END, written("one hundred")[len(written("one")) - 1]}


def test_a_label_that_is_no_text() -> None:
    with pytest.raises(InputError, match="label '\\\\ud800': text holds a lone surrogate"):
        GRAMMARS.of(choice("no", "\ud800"))


def test_every_short_answer_of_segments() -> None:
    """Let through is what is read without faults, if it is written as the task does: a speaker's mark each."""
    speakers, marks = (Speaker(1), Speaker(2)), (Time(0), Time(0.04), Time(0.08))
    through = Counter[str]()
    for task in TIMED:
        grammar = GRAMMARS.of(task, seconds=0.08)
        alphabet: tuple[Part, ...] = (*speakers, *marks, *(["a"] if task.words else []))
        ids = {part: written((part,))[0] for part in alphabet}
        for parts in all_short(alphabet, 6):
            parsed = task.read(parts)
            names = list(dict.fromkeys(segment.speaker for segment in parsed.segments))
            fits = not parsed.faults and shown(parts) == shown(as_written(parsed, task.speakers))
            fits = fits and (names == ["spk1", "spk2"][: len(names)] or not task.speakers)
            assert accepts(grammar, [*map(ids.__getitem__, parts), END]) == fits, parts
            through[task.name] += fits
    assert through == {"transcribe_times": 1 + 3 * 4 + 7, "diarize": 1 + 3 * 3, "turns": 1 + 3 + 2 * 7}


def test_every_short_answer_of_stretches() -> None:
    task = TASKS["activity"]
    grammar = GRAMMARS.of(task, seconds=0.16)
    alphabet = [*times(0, 0.16), *written(NO_SPEECH)[:-1]]
    through = []
    for ids in all_short(alphabet, 5):
        parts = answer_parts(ids, VOCABULARY, TEXT)
        fits = not task.read(parts).faults
        assert accepts(grammar, [*ids, END]) == fits, parts
        through += [parts] * fits
    assert (NO_SPEECH,) in through and (Time(0), Time(0.04), Time(0.04), Time(0.16)) in through
    assert len(through) == 1 + 10 + 15


def test_white_space_is_no_words() -> None:
    task = TASKS["transcribe_times"]
    grammar = GRAMMARS.of(task)
    spelt = TEXT.encode("\u00a0\u3000")  # byte by byte
    assert len(spelt) > 4
    through = Counter[bool]()
    for ids in all_short({SPACE, WORD, *spelt}, 4):
        answer = [VOCABULARY.time(0), *ids, VOCABULARY.time(1), END]
        fits = not task.read(answer_parts(answer, VOCABULARY, TEXT)).faults
        assert accepts(grammar, answer) == fits, ids
        through[fits] += 1
    assert min(through.values()) > 10


def walked(grammar: Grammar, length: int, rng: Random) -> list[int]:
    """A random answer that makes for its end from so many ids on."""
    likely = {WORD, SPACE, *TEXT.encode("\u00a0\u3000\u5b57A man runs.")}
    state, ids = grammar.start, list[int]()
    while END not in ids:
        mask = grammar.allowed(state)
        assert grammar.allowed(state) is mask
        may_end = bool(mask[END])
        assert not may_end or grammar.next(state, END) == state
        text, marks = (ids_of(mask & kind(IDS)) for kind in (VOCABULARY.is_text, VOCABULARY.is_mark))
        assert set(ids_of(mask)) == {*text, *marks, *([END] if may_end else [])}
        if may_end and (len(ids) >= length or rng.random() < 0.1 or not (text or marks)):
            choices = [END]
        elif len(ids) >= length:
            assert len(ids) < length + len(NO_SPEECH)
            choices = marks or ([WORD] if mask[WORD] else text)
        else:
            choices = rng.choice([kind for kind in (text, marks) if kind])
            choices = rng.choice([choices, choices[:3], [index for index in choices if index in likely] or choices])
        ids.append(rng.choice(choices))
        state = grammar.next(state, ids[-1])
    return ids


def test_random_walks_end_and_are_read() -> None:
    seen = Counter[str]()

    @settings(deadline=None, max_examples=200)
    @given(st.sampled_from(MARKED), st.none() | st.floats(0, 5), st.integers(0, 30), st.integers(0, 2**32))
    def walk(task: Task, seconds: float | None, length: int, seed: int) -> None:
        parts = answer_parts(walked(GRAMMARS.of(task, seconds), length, Random(seed)), VOCABULARY, TEXT)
        parsed = task.read(parts)
        assert parsed.faults == ()
        starts = [segment.start for segment in parsed.segments]
        assert starts == sorted(starts)
        assert sum(isinstance(part, Time) for part in parts) == 2 * len(starts)
        assert all(s.end < (4 if seconds is None else seconds) + 0.04 for s in parsed.segments)
        seen[f"{task.name}, {min(len(starts), 2)}"] += 1

    walk()
    assert all(seen[f"{task.name}, {count}"] for task in MARKED for count in (0, 2)), seen


@st.composite
def facts(draw: st.DrawFn) -> Facts:
    """Segments of two steps or more, so that no two marks of one fall together."""
    duration = draw(st.floats(0.2, 4))
    segments = []
    for _ in range(draw(st.integers(0, 12))):
        start = draw(st.floats(0, duration - 0.1))
        end = draw(st.floats(start + 0.08, duration))
        text = draw(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip))
        segments.append(Segment(draw(st.sampled_from("abcdefgh")), start, end, text))
    return Facts(duration, None if segments else "", segments=tuple(segments))


@settings(deadline=None, max_examples=100)
@given(facts())
def test_what_tasks_write_is_let_through(truth: Facts) -> None:
    for task in MARKED:
        parts = task.write(truth)
        assert parts is not None
        assert accepts(GRAMMARS.of(task, truth.duration), written(parts)), parts


def test_times_end_with_the_audio() -> None:
    for seconds, last in ((1.2, 1.2), (1.21, 1.24), (1.2399999999, 1.24), (4.0, 4.0), (99.0, 4.0), (None, 4.0)):
        grammar = GRAMMARS.of(TASKS["turns"], seconds)
        assert after(grammar, (Speaker(1),)) == times(0, last - 0.04)
        assert after(grammar, (Speaker(1), Time(0.4))) == times(0.44, last)
    assert after(GRAMMARS.of(TASKS["turns"], 0.0), ()) == [END]
    assert after(GRAMMARS.of(TASKS["transcribe_times"], 0.0), ()) == [END]
    assert after(GRAMMARS.of(TASKS["activity"], 0.0), ()) == written(NO_SPEECH)[:1]
    assert after(GRAMMARS.of(TASKS["activity"], 1.0), (Time(0), Time(1))) == [END]


def test_speakers_come_in_order() -> None:
    grammar = GRAMMARS.of(TASKS["turns"], 4.0)
    marks = [VOCABULARY.speaker(number) for number in range(1, 9)]
    parts: Parts = ()
    for number in range(1, 9):
        assert after(grammar, parts) == sorted([END, *marks[:number]])
        parts += (Speaker(number), Time(0.4 * number), Time(4.0))
    assert after(grammar, parts) == sorted([END, *marks])
    assert after(grammar, (*parts, Speaker(3))) == times(3.2, 3.96)


def test_the_same_situation_is_the_same_mask() -> None:
    masks, states = [], []
    for text in ("Two dogs run.", "Hello there!"):
        grammar = GRAMMARS.of(TASKS["diarize"], 4.0)
        state, seen = grammar.start, []
        for index in written((Speaker(1), Time(1), text, Time(1.4)))[:-1]:
            seen.append(grammar.allowed(state))
            state = grammar.next(state, index)
        masks.append({id(mask) for mask in seen})
        states.append(state)
        assert len(seen) > len(masks[-1]) == 4  # a speaker, a start, words, words or an end
    assert masks[0] == masks[1]
    assert states[0] == states[1] and hash(states[0]) == hash(states[1])


def test_a_vocabulary_without_marks_of_time() -> None:
    vocabulary = Vocabulary(TEXT.size, n_q=1, card=512)
    grammars = Grammars(vocabulary, TEXT)
    for name in ("transcribe", "translate_de"):
        grammar = grammars.of(TASKS[name], 2.0)
        assert ids_of(~grammar.allowed(grammar.start))[:2] == [TEXT.hidden_ids[0], vocabulary.pad]
        assert int(grammar.allowed(grammar.start).sum()) == TEXT.size - len(TEXT.hidden_ids) + 1
    for task in MARKED:
        with pytest.raises(InputError, match=f"the task {task.name} is .* this checkpoint has no marks of time"):
            grammars.of(task, 2.0)
