"""Batches follow from (seed, step), hold what they may, and every second of the corpus is as likely as any other."""

import threading
from collections import Counter
from random import Random

import pytest

from speechllm.data.sampling import LengthSampler, prefetch, short_first

LENGTHS = [Random(n).uniform(1, 10) for n in range(300)]
BUDGET, MOST = 40.0, 12
JITTERED = (1 + LengthSampler.JITTER) / (1 - LengthSampler.JITTER)  # how far lengths in a row may be apart


def sampler(seed: int = 1, budget: float = BUDGET, most: int = MOST) -> LengthSampler:
    return LengthSampler(LENGTHS, budget, most, seed)


def test_a_batch_follows_from_seed_and_step_alone() -> None:
    steps = list(range(0, 350, 7))  # several reshuffles
    expected = {step: sampler()(step) for step in steps}
    shared = sampler()
    Random(0).shuffle(steps)
    assert {step: shared(step) for step in steps} == expected
    assert len({tuple(batch) for batch in expected.values()}) > 0.9 * len(steps)
    others = {step: sampler(seed=2)(step) for step in steps}
    assert sum(others[step] == expected[step] for step in steps) < 3


def test_ranks_see_different_batches() -> None:
    """Rank r of w takes number step * w + r: neighbouring numbers must not share their start."""
    draw = sampler()
    assert sum(draw(2 * step) == draw(2 * step + 1) for step in range(100)) < 3


@pytest.mark.parametrize(("budget", "most"), [(40.0, 12), (40.0, 300), (1e9, 5), (9.0, 12)])
def test_budget_and_most_hold_and_neighbours_are_alike(budget: float, most: int) -> None:
    draw = sampler(budget=budget, most=most)
    sizes: Counter[int] = Counter()
    for step in range(200):
        batch = draw(step)
        assert len(set(batch)) == len(batch) <= most
        assert len(batch) == 1 or sum(LENGTHS[i] for i in batch) <= budget
        lengths = [LENGTHS[i] for i in batch]
        assert max(lengths) <= min(lengths) * JITTERED + 1.5  # and the spread of neighbours
        sizes[len(batch)] += 1
    if budget == 1e9:
        assert sizes[5] > 150  # only the very end of the order holds fewer
    if budget == 40.0:
        assert len(sizes) > 3


def test_an_item_longer_than_the_budget_comes_alone() -> None:
    draw = LengthSampler([50.0, 60.0], 40.0, 8, 0)
    assert {tuple(draw(step)) for step in range(40)} == {(0,), (1,)}


def test_starts_are_drawn_in_proportion_to_their_length() -> None:
    lengths = [1.0, 2.0, 4.0, 8.0]
    draw = LengthSampler(lengths, 1.0, 1, 3)
    counts = Counter(draw(step)[0] for step in range(6000))
    for index, length in enumerate(lengths):
        assert counts[index] / 6000 == pytest.approx(length / 15, abs=0.02)


def test_every_second_of_the_corpus_is_about_as_likely() -> None:
    """In batches that the budget fills, an item comes along as often as any other, whatever its length."""
    draw, steps = sampler(most=10**6), 10000
    counts = Counter(index for step in range(steps) for index in draw(step))
    # A start lies anywhere in the corpus, and a batch is what the budget holds, but for the item it breaks off at.
    expected = steps * (BUDGET - sum(LENGTHS) / len(LENGTHS) / 2) / sum(LENGTHS)
    groups = sorted(range(len(LENGTHS)), key=LENGTHS.__getitem__)
    for start in range(60, 240, 60):  # batches that start near an end of the order are shorter
        group = groups[start : start + 60]
        assert sum(counts[i] for i in group) / len(group) == pytest.approx(expected, rel=0.15)
    assert all(counts[i] > 0 for i in range(len(LENGTHS)))


def test_a_batch_starts_among_the_shortest_share() -> None:
    draw = sampler()
    shortest = sorted(LENGTHS)[: len(LENGTHS) // 4]
    firsts = [LENGTHS[draw(step, share=0.25)[0]] for step in range(300)]
    assert max(firsts) <= shortest[-1] * JITTERED
    assert len(set(firsts)) > 30
    assert len(draw(0, share=0.0)) >= 1  # at least the very shortest


def test_short_first_grows_to_everything() -> None:
    assert [short_first(step, 10) for step in (0, 5, 10, 99)] == pytest.approx([0.1, 0.55, 1.0, 1.0])
    assert short_first(0, 0) == 1.0


def test_prefetch_works_ahead_by_no_more_than_asked() -> None:
    made: list[int] = []
    done = threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if len(made) == 3:
            done.set()
        return step

    items = prefetch(make, range(10), ahead=3)
    assert made == []
    assert next(items) == 0
    assert done.wait(10)
    assert max(made) <= 3
    items.close()  # type: ignore[attr-defined]


def test_prefetch_passes_an_error_on_in_its_place() -> None:
    def make(step: int) -> int:
        if step == 4:
            raise KeyError("clip 4")
        return step

    seen: list[int] = []
    with pytest.raises(KeyError, match="clip 4"):
        seen.extend(prefetch(make, range(10)))
    assert seen == [0, 1, 2, 3]
