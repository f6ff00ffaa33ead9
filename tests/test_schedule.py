"""What is drawn when: shares, curriculum, every recording in its turn, the same for any ranks and after a resume."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from speechllm.data.mixture import Draw
from speechllm.data.pools import Pool
from speechllm.data.schedule import WINDOW, Pools, Schedule


def pool(size: int, first_row: int = 0, low: float = 50.0, high: float = 150.0) -> Pool:
    """Recordings in rows one after another, evenly from the shortest to the longest."""
    return pool_of(first_row, np.linspace(low, high, size))


def pool_of(first_row: int, lengths: np.ndarray, further: float = np.inf) -> Pool:
    return Pool(np.arange(first_row, first_row + len(lengths)), lengths, np.full(len(lengths), further))


POOLS: Pools = {
    "transcribe": {"read": pool(90), "talks": pool(27, 90)},
    "emotion": {"acted": pool(40, 117)},
    "diarize": {"talks": pool(27, 90, 100, 200)},
}
WEIGHTS = {"transcribe": 1.0, "emotion": 0.5, "diarize": 0.5}


def make(pools: Pools = POOLS, weights: Any = WEIGHTS, batch_tokens: float = 400.0, **settings: Any) -> Schedule:
    return Schedule(pools, weights, batch_tokens, **settings)


def plan(schedule: Schedule, steps: range) -> list[list[list[Draw]]]:
    """[step][lane][example]; with a schedule of its own for each lane, as in a run of several processes."""
    lanes = [list(replace(schedule).steps(steps, range(lane, lane + 1))) for lane in range(schedule.lanes)]
    together = list(replace(schedule).steps(steps, range(schedule.lanes)))
    assert together == [[lane for (lane,) in step] for step in zip(*lanes, strict=True)], "as one process would have it"
    return together


def flat(plans: Sequence[Sequence[Sequence[Draw]]]) -> list[Draw]:
    return [draw for step in plans for lane in step for draw in lane]


def lengths(draws: Sequence[Draw], pools: Pools = POOLS) -> list[float]:
    known = {
        Draw(task, int(row)): float(length)
        for task, corpora in pools.items()
        for pool in corpora.values()
        for row, length in zip(pool.rows, pool.lengths, strict=True)
    }
    return [known[draw] for draw in draws]


def test_shares_by_hand() -> None:
    pools = {"a": {"x": pool(8)}, "b": {"x": pool(60), "y": pool(4)}, "c": {"x": pool(1000)}}
    weights = {"a": 1.0, "b": 3.0, "c": 0.5}
    for temperature, scores in (
        (1.0, (8, 3 * 64, 0.5 * 1000)),
        (3.0, (2, 3 * 4, 0.5 * 10)),
        (1e9, (1, 3, 0.5)),
    ):
        shares = make(pools, weights, temperature=temperature).shares(7)
        assert shares == pytest.approx({name: s / sum(scores) for name, s in zip("abc", scores, strict=True)})


def test_what_is_drawn_has_the_shares_asked_for() -> None:
    pools = {"a": {"x": pool(8), "y": pool(64, 8)}, "b": {"x": pool(30, 72)}, "c": {"z": pool(72, 102)}}
    schedule = make(pools, {"a": 2.0, "b": 1.0, "c": 1.0}, 5000.0, temperature=3.0, corpus_weights={"x": 4.0}, seed=3)
    draws = flat(plan(schedule, range(300)))
    assert len(draws) > 12_000
    tasks = Counter(draw.task for draw in draws)
    asked = schedule.shares(0)
    for task in "abc":
        assert tasks[task] / len(draws) == pytest.approx(asked[task], abs=0.02)
    # of a: 4 · 8^(1/3) from x and 64^(1/3) from y
    corpora = Counter("x" if draw.row < 8 else "y" for draw in draws if draw.task == "a")
    assert corpora["x"] / tasks["a"] == pytest.approx(8 / 12, abs=0.02)


def test_a_task_may_have_weights_of_its_own() -> None:
    pools = {"a": {"y": pool(30, 30), "z": pool(30, 60)}, "b": {"x": pool(30)}}
    weights = {"a": 1.0, "b": 1.0}
    schedule = make(
        pools, weights, 5000.0, temperature=1.0, corpus_weights={"y": 9.0}, task_corpora={"a": {"y": 1, "z": 3}}
    )
    draws = flat(plan(schedule, range(100)))
    rows = Counter(draw.row // 30 for draw in draws if draw.task == "a")
    assert rows.keys() == {1, 2}
    assert rows[2] / rows.total() == pytest.approx(0.75, abs=0.02)
    assert rows.total() / len(draws) == pytest.approx(60 / 90, abs=0.02)
    assert schedule.chances(0)["b", "x"] == pytest.approx(1 / 3)


def test_a_task_enters_with_the_window_after_its_step() -> None:
    enters = {"emotion": WINDOW, "diarize": WINDOW + 10}
    schedule = make(enters=enters)
    seen = [{draw.task for lane in step for draw in lane} for step in plan(schedule, range(4 * WINDOW))]
    windows = [set.union(*seen[start : start + WINDOW]) for start in range(0, 4 * WINDOW, WINDOW)]
    assert windows == [{"transcribe"}, {"transcribe", "emotion"}, WEIGHTS.keys(), WEIGHTS.keys()]
    assert [set(schedule.shares(step)) for step in (0, 49, 50, 99, 100)] == [
        *(windows[0], windows[0], windows[1], windows[1], windows[2])
    ]
    assert sum(schedule.shares(70).values()) == pytest.approx(1)


@pytest.mark.parametrize("lanes", [1, 3])
def test_every_recording_once_before_any_again(lanes: int) -> None:
    """In all lanes together; the pools last for a fraction of a window, or for several."""
    pools = {"a": {"x": pool(23), "y": pool(1500, 23)}, "b": {"x": pool(90)}}
    schedule = make(pools, {"a": 1.0, "b": 2.0}, lanes=lanes)
    counts = {(task, corpus): Counter[int]() for task, corpora in pools.items() for corpus in corpora}
    for step, drawn_here in enumerate(plan(schedule, range(6 * WINDOW)), 1):
        for draw in flat([drawn_here]):
            counts[draw.task, "y" if draw.task == "a" and draw.row >= 23 else "x"][draw.row] += 1
        if step % WINDOW == 0:
            for (task, corpus), drawn in counts.items():
                times = [drawn[row] for row in pools[task][corpus].rows.tolist()]
                assert max(times) - min(times) <= 1, f"{task} {corpus}, step {step}"
    assert min(counts["b", "x"].values()) > 3
    assert min(counts["a", "x"].values()) > 3


def test_the_plan_follows_from_the_seed() -> None:
    steps = range(3 * WINDOW)
    first, again, other = (plan(make(seed=seed), steps) for seed in (1, 1, 2))
    assert first == again
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 3
    assert sum(a in first[:WINDOW] for a in first[WINDOW:]) < 0.1 * 2 * WINDOW, "every window is another"
    windows = [flat(first[start : start + WINDOW]) for start in range(0, 3 * WINDOW, WINDOW)]
    assert len({sum(draw.task == "emotion" for draw in draws) for draws in windows}) > 1
    large: Pools = {"a": {"x": pool(5000)}}
    turns = [set(flat(plan(make(large, {"a": 1.0}, seed=seed), range(WINDOW)))) for seed in (1, 2)]
    assert len(turns[0] & turns[1]) < 0.1 * len(turns[0]), "nor do recordings come in the same order"
    schedule = make(seed=1)
    for _ in range(2):  # asked for again
        assert list(schedule.steps(steps, range(1))) == first
    assert plan(make(seed=1), range(70, 90)) == first[70:90], "what came before is gone through"


@pytest.mark.parametrize("step", [0, 17, WINDOW - 1, WINDOW, 2 * WINDOW + 1, 3 * WINDOW])
@pytest.mark.parametrize("ahead", [0, 1, WINDOW, 2 * WINDOW + 30])
def test_a_resumed_schedule_goes_on_as_if_it_had_not_been_stopped(step: int, ahead: int) -> None:
    """Even when windows after the one that was being trained on had been planned, in the midst of epochs."""
    settings: dict[str, Any] = {"enters": {"diarize": WINDOW + 1}, "short": WINDOW, "lanes": 2, "seed": 4}
    end = 6 * WINDOW
    for lane in (range(1), range(1, 2), range(2)):
        whole = list(make(**settings).steps(range(end), lane))
        stopped = make(**settings)
        running = stopped.steps(range(end), lane)
        assert [next(running) for _ in range(step + ahead)] == whole[: step + ahead]
        state = json.loads(json.dumps(stopped.state(step)))
        resumed = make(**settings)
        resumed.restore(state)
        assert resumed.state(step) == state
        assert list(resumed.steps(range(step, end), lane)) == whole[step:]
        assert list(running) == whole[step + ahead :], "reading the state changes nothing"


@pytest.mark.parametrize("batch_tokens", [1.0, 170.0, 1000.0])
def test_batches_are_of_like_size(batch_tokens: float) -> None:
    """And every lane has something to do at each step, however little may be in a batch."""
    number, longest = 4, 200.0
    steps = plan(make(batch_tokens=batch_tokens, lanes=number), range(4 * WINDOW))
    sizes = np.array([[sum(lengths(draws)) for draws in lanes] for lanes in steps])
    assert sizes.min() > 0
    for window in np.split(sizes, 4):
        if batch_tokens > longest:
            assert np.abs(window - window.mean()).max() <= longest  # a batch ends where an example does
            assert window.mean() == pytest.approx(batch_tokens, rel=0.03)
        else:
            assert window.max() <= 2 * longest
    for lanes in steps:
        shortest, longest = (limit(lengths(flat([lanes]))) for limit in (min, max))
        assert longest <= 1.1 / 0.9 * shortest + 15  # jitter, and how far apart neighbours lie


@pytest.mark.parametrize("known", [[10.0] * 19 + [5000.0], [10.0] * 15 + [400.0] * 5])
def test_recordings_longer_than_a_batch(known: list[float]) -> None:
    pools = {"a": {"x": pool_of(0, np.array(known))}}
    steps = plan(make(pools, {"a": 1.0}, 250.0, lanes=2), range(2 * WINDOW))
    assert all(draws for lanes in steps for draws in lanes), "every lane has something to do"


def test_what_is_heard_is_asked_about_further() -> None:
    """Within a corpus by the tasks' shares, up to always; where a row has an answer; nothing where nothing is heard."""
    sizes = np.linspace(50, 150, 60)
    pools = {
        "often": {"x": pool_of(0, sizes, 20.0), "y": pool_of(100, sizes, 20.0)},
        "seldom": {"x": pool_of(0, sizes, 10.0)},
        "half": {"x": pool_of(0, sizes[:30], 30.0), "y": pool_of(100, sizes, 30.0)},
        "read": {"x": pool_of(0, sizes)},
    }
    weights = {"often": 6.0, "seldom": 1.0, "half": 2.0, "read": 1.0}
    assert not any(draw.also for draw in flat(plan(make(pools, weights), range(WINDOW))))
    read = make({"read": pools["read"]}, {"read": 1.0}, questions=3)  # of nothing that is heard
    assert not any(draw.also for draw in flat(plan(read, range(WINDOW))))
    schedule = make(pools, weights, 2000.0, temperature=1e9, questions=3)
    chances = schedule.chances(0)
    steps = plan(schedule, range(4 * WINDOW))
    draws = flat(steps)
    for task, names in pools.items():
        assert not any(task in draw.also for draw in draws if draw.task == task)
        for corpus in names:
            rows = range(100) if corpus == "x" else range(100, 200)
            here = [draw for draw in draws if draw.task == task and draw.row in rows]
            shares = {other: chances.get((other, corpus), 0.0) for other in ("often", "seldom", "half")}
            for other, share in shares.items():
                able = [draw for draw in here if draw.row < 30 or draw.row >= 100 or other != "half"]
                wanted = min(1, 2 * share / sum(shares.values())) if task not in (other, "read") else 0.0
                found = sum(other in draw.also for draw in able) / len(able)
                assert found == pytest.approx(wanted, abs=0.06)
            assert not any("half" in draw.also for draw in here if 30 <= draw.row < 100)
    cost = {"often": 20, "seldom": 10, "half": 30}
    leads = lengths([replace(draw, also=()) for draw in draws], pools)
    total = sum(leads) + sum(cost[task] for draw in draws for task in draw.also)
    assert total / len(steps) == pytest.approx(2000, rel=0.05)


def test_nothing_further_is_asked_before_its_task_enters_or_beside_its_corpora() -> None:
    sizes = np.linspace(50, 150, 60)
    pools = {task: {"x": pool_of(0, sizes, 20.0), "y": pool_of(60, sizes, 20.0)} for task in "abc"}
    del pools["c"]["x"]
    schedule = make(pools, dict.fromkeys("abc", 1.0), 2000.0, questions=9, enters={"b": WINDOW})
    draws = flat(plan(schedule, range(2 * WINDOW)))
    early, late = (flat(plan(schedule, steps)) for steps in (range(WINDOW), range(WINDOW, 2 * WINDOW)))
    assert early + late == draws
    assert {task for draw in early for task in draw.also if draw.row < 60} == set()
    assert {task for draw in early for task in draw.also} == {"a", "c"}
    assert {task for draw in late for task in draw.also if draw.row < 60} == {"a", "b"}
    assert {draw.also for draw in late if draw.row >= 60} == {("b", "c"), ("a", "c"), ("a", "b")}


def test_short_recordings_come_first() -> None:
    pools = {"a": {"x": pool(400)}, "b": {"x": pool(3)}}
    schedule = make(pools, {"a": 1.0, "b": 1.0}, 5000.0, short=120)
    steps = plan(schedule, range(5 * WINDOW))
    for window, part in enumerate((0.1, 0.1 + 0.9 * 50 / 120, 0.1 + 0.9 * 100 / 120, 1.0, 1.0)):
        draws = flat(steps[window * WINDOW : (window + 1) * WINDOW])
        rows = {task: [draw.row for draw in draws if draw.task == task] for task in "ab"}
        assert round(part * 400) - 10 < max(rows["a"]) < round(part * 400)
        assert min(rows["a"]) < 10
        assert max(rows["b"]) == max(1, round(part * 3)) - 1
    assert list(schedule.steps(range(4 * WINDOW), range(1))) == steps[: 4 * WINDOW]
    assert schedule.state(2 * WINDOW)["drawn"] == schedule.state(3 * WINDOW)["drawn"] == {}, "out of turn"
    assert schedule.state(4 * WINDOW)["drawn"].keys() == {"a/x", "b/x"}
