"""Which id comes next: greedy, draws and beams on distributions made by hand, within grammars."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from random import Random

import pytest
import torch
from conftest import TEXT_MODEL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serve.search import LONGEST_REPEAT, REPEATED_IDS, REPEATS, Beams, Hypothesis, Search, Single, make_search, repeated
from speechllm.grammar import Grammar, Grammars
from speechllm.options import GREEDY, Options
from speechllm.tasks import TASKS
from speechllm.text import TextTokenizer
from speechllm.vocabulary import Vocabulary

SIZE, END = 4, 3  # of the tiny vocabulary
Model = Callable[[tuple[int, ...]], Tensor]  # ids so far -> logits [vocabulary]


class Anything(Grammar[None]):
    """Every id, any time."""

    start = None

    def __init__(self, size: int = SIZE) -> None:
        self._mask = torch.ones(size, dtype=torch.bool)

    def allowed(self, state: None) -> Tensor:
        return self._mask

    def next(self, state: None, index: int) -> None:
        return None


class OneOf(Grammar[tuple[int, ...]]):
    """Some answers, each without its end; a state is what has been said."""

    start = ()

    def __init__(self, *answers: tuple[int, ...], size: int = SIZE, end: int = END) -> None:
        self._answers, self._size, self._end = answers, size, end

    def allowed(self, state: tuple[int, ...]) -> Tensor:
        following = {(*answer, self._end)[len(state)] for answer in self._answers if answer[: len(state)] == state}
        return torch.tensor([index in following for index in range(self._size)])

    def next(self, state: tuple[int, ...], index: int) -> tuple[int, ...]:
        return (*state, index)


def random_model(seed: int, size: int = SIZE, spread: float = 1.5) -> Model:
    """A distribution for every beginning."""

    def logits(ids: tuple[int, ...]) -> Tensor:
        rng = Random(repr((seed, ids)))
        return torch.tensor([rng.gauss(0, spread) for _ in range(size)])

    return logits


def constantly(*probs: float) -> Model:
    """The same probabilities whatever was said."""
    return lambda ids: torch.tensor(probs).log()


def run(search: Search, model: Model) -> Hypothesis:
    """To its end; checks what holds of every step."""
    for _ in range(1000):
        assert 1 <= len(search.hypotheses) <= search.width
        assert search.finish is None
        allowed = torch.stack(search.allowed())
        assert allowed.any(1).all(), "a dead end"
        logits = torch.stack([model(hypothesis.ids) for hypothesis in search.hypotheses])
        log_probs = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
        before = search.hypotheses
        parents = search.advance(log_probs)
        assert len(parents) == len(search.hypotheses)
        for parent, hypothesis in zip(parents, search.hypotheses, strict=True):
            assert hypothesis.ids[:-1] == before[parent].ids
            assert hypothesis.logprobs[:-1] == before[parent].logprobs
            assert hypothesis.logprobs[-1] == log_probs[parent, hypothesis.ids[-1]]
        if not search.hypotheses:
            assert search.finish
            return search.best
    raise AssertionError("it does not end")


def logprobs_of(model: Model, ids: Sequence[int], grammar: Grammar) -> list[float]:
    """Of each id, by the model restricted to the grammar."""
    state, found = grammar.start, []
    for number, index in enumerate(ids):
        logits = model(tuple(ids[:number])).masked_fill(~grammar.allowed(state), -torch.inf)
        found.append(float(logits.log_softmax(-1)[index]))
        state = grammar.next(state, index) if index != END else state
    return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def test_greedy_takes_the_likeliest_until_the_end() -> None:
    def model(ids: tuple[int, ...]) -> Tensor:
        wanted = (2, 0, 0, 1, END)
        return torch.eye(SIZE)[wanted[len(ids)]] * 2

    search = make_search(Anything(), END, 9, GREEDY)
    best = run(search, model)
    assert (best.ids, search.finish) == ((2, 0, 0, 1), "stop")
    likeliest = math.log(math.exp(2) / (math.exp(2) + 3))
    assert best.logprobs == pytest.approx([likeliest] * 5), "of the end id too"
    assert best.score == pytest.approx(likeliest)


@pytest.mark.parametrize("options", [GREEDY, Options(beams=2), Options(temperature=1.0)])
@pytest.mark.parametrize(("limit", "asked", "longest"), [(5, None, 5), (5, 3, 3), (5, 9, 5), (1, None, 1), (5, 1, 1)])
def test_the_shorter_limit_ends_an_answer(options: Options, limit: int, asked: int | None, longest: int) -> None:
    options = Options(temperature=options.temperature, beams=options.beams, max_tokens=asked)
    search = make_search(Anything(), END, limit, options)
    assert search.max_tokens == longest
    best = run(search, constantly(0.4, 0.4, 0.2, 0.0))
    assert (len(best.ids), len(best.logprobs), search.finish) == (longest, longest, "length")


@pytest.mark.parametrize("options", [GREEDY, Options(beams=3), Options(temperature=2.0, top_p=0.5)])
def test_an_answer_that_alone_is_allowed_is_given_and_is_certain(options: Options) -> None:
    search = make_search(OneOf((2, 2, 0)), END, 9, options)
    best = run(search, random_model(1))
    assert (best.ids, search.finish) == ((2, 2, 0), "stop")
    assert best.logprobs == (0.0,) * 4
    empty = make_search(OneOf(()), END, 9, options)
    assert (run(empty, random_model(1)).ids, empty.finish) == ((), "stop")


def drawn(model: Model, grammar: Grammar | None = None, **options: float) -> Counter[tuple[int, ...]]:
    """Answers of one id, or none, over many seeds."""
    found = (
        run(make_search(grammar or Anything(), END, 1, Options(seed=seed, **options)), model).ids  # type: ignore[arg-type]
        for seed in range(2000)
    )
    return Counter(found)


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.79), (1.0, 0.81), (0.5, 0.9)]
)
def test_draws_follow_the_distribution(temperature: float, top_p: float) -> None:
    probs = (0.1, 0.5, 0.1, 0.3)
    sharpened = {index: p ** (1 / temperature) for index, p in enumerate(probs)}
    total, kept = sum(sharpened.values()), 0.0
    expected: dict[int, float] = {}
    for index in sorted(sharpened, key=lambda index: -sharpened[index]):
        if kept < top_p - 1e-6:
            expected[index] = sharpened[index] / total
            kept += expected[index]
    found = drawn(constantly(*probs), temperature=temperature, top_p=top_p)
    assert {ids[0] if ids else END for ids in found} == set(expected)
    for index, p in expected.items():
        count = found[() if index == END else (index,)]
        deviation = math.sqrt(2000 * (p / kept) * (1 - p / kept))
        assert abs(count - 2000 * p / kept) < 4.5 * deviation


def test_draws_stay_within_the_grammar() -> None:
    found = drawn(constantly(0.1, 0.2, 0.6, 0.1), OneOf((0,), (1,)), temperature=1.0)
    assert set(found) == {(0,), (1,)}
    assert 0.28 < found[(0,)] / 2000 < 0.39


def test_log_probabilities_are_the_models_at_any_temperature() -> None:
    model = random_model(2)
    for options in (GREEDY, Options(temperature=0.3), Options(temperature=2.0, top_p=0.7), Options(beams=3)):
        search = make_search(Anything(), END, 6, options)
        best = run(search, model)
        ids = [*best.ids, END] if search.finish == "stop" else list(best.ids)
        assert best.logprobs == pytest.approx(logprobs_of(model, ids, Anything()), abs=1e-6)


@pytest.mark.parametrize("top_p", [1e-9, 0.3])
def test_top_p_keeps_the_likeliest_at_least(top_p: float) -> None:
    assert set(drawn(constantly(0.25, 0.4, 0.2, 0.15), temperature=2.0, top_p=top_p)) == {(1,)}


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 5e-324])
def test_next_to_no_temperature_is_greedy(temperature: float) -> None:
    model = random_model(3)
    greedy = run(make_search(Anything(), END, 8, GREEDY), model)
    for seed in range(3):
        assert run(make_search(Anything(), END, 8, Options(temperature=temperature, seed=seed)), model) == greedy


def test_a_seed_draws_the_same_answer_again() -> None:
    model = constantly(0.3, 0.25, 0.35, 0.1)
    answers = [run(make_search(Anything(), END, 12, Options(temperature=1.0, seed=s)), model) for s in range(30)]
    again = [run(make_search(Anything(), END, 12, Options(temperature=1.0, seed=s)), model) for s in range(30)]
    assert answers == again
    assert len(set(answers)) > 20


def all_answers(grammar: Grammar, longest: int) -> list[tuple[int, ...]]:
    """Every answer that ends with up to so many ids."""
    found = []
    for length in range(longest + 1):
        for ids in product(range(SIZE - 1), repeat=length):
            state, fits = grammar.start, True
            for index in ids:
                fits = fits and bool(grammar.allowed(state)[index])
                state = grammar.next(state, index) if fits else state
            if fits and grammar.allowed(state)[END]:
                found.append(ids)
    return found


LABELS = OneOf((0, 1, 2), (0, 2, 2), (0, 0, 1), (1, 1, 0), (2, 0, 0), (2, 1, 2), (1, 0, 2))


@pytest.mark.parametrize("seed", range(20))
def test_beams_enough_for_all_find_the_best_of_answers_of_one_length(seed: int) -> None:
    """Where all end after as many ids, nothing can end too early: by brute force."""
    model = random_model(seed)
    answers = all_answers(LABELS, 4)
    assert len(answers) == 7
    expected = max(answers, key=lambda ids: sum(logprobs_of(model, [*ids, END], LABELS)))
    search = make_search(LABELS, END, 9, Options(beams=7))
    best = run(search, model)
    assert (best.ids, search.finish) == (expected, "stop")
    assert best.logprobs == pytest.approx(logprobs_of(model, [*expected, END], LABELS), abs=1e-5)


def plain_beam_search(model: Model, grammar: Grammar, width: int, longest: int) -> tuple[tuple[int, ...], bool]:
    """Beam search in the plainest way: the best answer, and whether it ends."""
    beams: list[tuple[tuple[int, ...], list[float]]] = [((), [])]
    ended: list[tuple[tuple[int, ...], list[float]]] = []
    while True:
        grown = []
        for ids, scores in beams:
            state = grammar.start
            for index in ids:
                state = grammar.next(state, index)
            mask = grammar.allowed(state)
            log_probs = model(ids).masked_fill(~mask, -torch.inf).log_softmax(-1)
            grown += [((*ids, i), [*scores, float(log_probs[i])]) for i in range(SIZE) if mask[i]]
        grown.sort(key=lambda one: -sum(one[1]))
        beams = []
        for ids, scores in grown[: 2 * width]:
            if len(beams) == width:
                break
            if ids[-1] == END:
                ended.append((ids[:-1], scores))
            else:
                beams.append((ids, scores))
        best = max(ended + beams, key=lambda one: mean(one[1]))
        if best in ended:
            return best[0], True
        if len(best[0]) == longest:
            return best[0], False


@pytest.mark.parametrize("width", [2, 3, 5, 16])
def test_beams_are_a_plain_beam_search(width: int) -> None:
    different = 0
    for seed in range(25):
        model = random_model(100 + seed)
        for grammar in (Anything(), LABELS, OneOf((0,), (0, 0), (1, 2, 1), (2,), ())):
            search = make_search(grammar, END, 6, Options(beams=width))
            best = run(search, model)
            assert (best.ids, search.finish == "stop") == plain_beam_search(model, grammar, width, 6)
            different += best.ids != run(make_search(grammar, END, 6, GREEDY), model).ids
    assert different > 5


def test_beams_find_what_greedy_misses() -> None:
    def model(ids: tuple[int, ...]) -> Tensor:
        probs = {(): (0.6, 0.4, 0, 0), (0,): (0.3, 0.3, 0.3, 0.1), (1,): (0, 0, 0.01, 0.99)}
        return torch.tensor(probs.get(ids, (0.0, 0.0, 0.0, 1.0))).log()

    assert run(make_search(Anything(), END, 4, GREEDY), model).ids[0] == 0
    assert run(make_search(Anything(), END, 4, Options(beams=2)), model).ids == (1,)


@pytest.mark.parametrize("seed", range(10))
def test_a_single_beam_is_greedy(seed: int) -> None:
    model = random_model(200 + seed)
    for grammar in (Anything(), LABELS):
        beams, single = Beams(grammar, END, 6, 1), make_search(grammar, END, 6, Options(beams=1))
        assert isinstance(single, Single)
        found, expected = run(beams, model), run(single, model)
        if single.finish == beams.finish == "length" or len(found.ids) == len(expected.ids):
            assert found.ids == expected.ids
        else:  # an end that was second, and whose answer was likelier by id
            assert found.score > expected.score


def test_more_beams_than_there_are_answers() -> None:
    search = make_search(OneOf((0,), (1,)), END, 6, Options(beams=5))
    assert run(search, random_model(5)).ids in {(0,), (1,)}


def test_an_unlikely_end_does_not_hide_that_an_answer_was_cut() -> None:
    search = make_search(Anything(), END, 3, Options(beams=3))
    best = run(search, constantly(0.9, 0.03, 0.02, 0.05))
    assert (best.ids, search.finish) == ((0, 0, 0), "length")


@pytest.mark.parametrize(("beams", "temperature"), [(1, 0.0), (1, 1.0), (3, 0.0)])
def test_an_answer_that_only_repeats_itself_is_stopped_and_cut_to_once(beams: int, temperature: float) -> None:
    for loop in ((1,), (2, 0), (0, 2, 1), (2, 1, 0, 0, 1)):
        wanted = (0, 2, 2, *loop * 40)

        def model(ids: tuple[int, ...], wanted: tuple[int, ...] = wanted) -> Tensor:
            return torch.eye(SIZE)[wanted[len(ids)]] * 40

        search = make_search(Anything(), END, 200, Options(beams=beams, temperature=temperature))
        best = run(search, model)
        assert search.finish == "repetition"
        assert best.ids == (0, 2, 2, *loop)
        assert len(best.logprobs) == len(best.ids)


def test_what_people_say_again_is_not_cut() -> None:
    text = TextTokenizer.load(TEXT_MODEL)
    for said in (
        "eight eight eight eight eight eight eight eight",
        "88888888",
        "0000 0000",
        "no no no no no no no",
        "one two three one two three one two three one two three",
        "ha ha ha ha ha ha ha ha",
    ):
        ids = text.encode(said)
        assert not any(repeated(ids[:end]) for end in range(len(ids) + 1)), said


@given(
    st.lists(st.integers(0, 9), max_size=12),
    st.lists(st.integers(10, 19), min_size=1, max_size=LONGEST_REPEAT, unique=True),
    st.integers(0, 400),
)
@settings(max_examples=200, deadline=None)
def test_a_loop_is_seen_when_it_is_long_enough_and_not_before(before: list[int], loop: list[int], more: int) -> None:
    endless = before + loop * 40
    needed = len(before) + max(REPEATS * len(loop), math.ceil(REPEATED_IDS / len(loop)) * len(loop))
    assert not any(repeated(endless[:length]) for length in range(needed))
    left = endless[: needed - repeated(endless[:needed])]
    assert left == before + loop
    assert repeated(endless[: needed + more % 60]) > 0
    assert repeated([*endless, 20]) == 0, "it has gone on"


@pytest.mark.parametrize(
    "task", ["transcribe", "transcribe_times", "diarize", "turns", "activity", "emotion", "is_emotion"]
)
@pytest.mark.parametrize(
    "options", [GREEDY, Options(temperature=2.0, seed=3), Options(beams=4)], ids=["greedy", "drawn", "beams"]
)
def test_no_grammar_leads_into_a_dead_end(task: str, options: Options) -> None:
    """With a model that says anything: the answer ends, or is cut; `run` checks that something may always come."""
    text = TextTokenizer.load(TEXT_MODEL)
    vocabulary = Vocabulary(text.size, n_q=1, card=16, times=26)
    grammar = Grammars(vocabulary, text).of(TASKS[task], 1.0)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        rows = 3 * torch.randn(64, vocabulary.size, generator=generator)
        search = make_search(grammar, vocabulary.end, 24, options)
        best = run(search, lambda ids, rows=rows: rows[hash(ids) % 64])  # type: ignore[misc]
        state = grammar.start
        for index in best.ids:
            assert grammar.allowed(state)[index]
            state = grammar.next(state, index)
        if search.finish == "stop":
            assert grammar.allowed(state)[vocabulary.end]
