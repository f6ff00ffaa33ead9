"""The replay's share of the examples."""

import json
from collections import Counter

import numpy as np
import pytest

from speechllm.data.pools import Pool
from speechllm.data.replay import ReplaySchedule
from speechllm.data.schedule import Schedule


def test_replay_has_its_share() -> None:
    pools = [Pool(np.arange(n, n + 40), np.full(40, 50.0), np.full(40, np.inf)) for n in (0, 40, 80)]
    own = Schedule({"transcribe": {"mine": pools[0]}}, {"transcribe": 1.0}, 800.0, seed=1)
    old = {"transcribe": {"old": pools[1]}, "emotion": {"old": pools[1], "older": pools[2]}}
    for share in (0.0, 0.25):
        older = Schedule(old, {"transcribe": 3.0, "emotion": 1.0}, 800.0, corpus_weights={"old": 4.0})
        schedule = ReplaySchedule(own, older, share)
        drawn = [draw for (lane,) in schedule.steps(range(200), range(1)) for draw in lane]
        assert len(drawn) > 3000
        found = Counter((draw.task, draw.row // 40) for draw in drawn)
        if not share:
            assert found.keys() == {("transcribe", 0)}
            continue
        chances = schedule.chances(0)
        assert chances["transcribe", "mine"] == pytest.approx(0.75)
        assert chances["emotion", "old"] == pytest.approx(4 * chances["emotion", "older"])
        assert schedule.shares(0) == pytest.approx(
            {task: sum(c for (of, _), c in chances.items() if of == task) for task in ("transcribe", "emotion")}
        )
        for (task, corpus), chance in chances.items():
            number = {"mine": 0, "old": 1, "older": 2}[corpus]
            assert found[task, number] / len(drawn) == pytest.approx(chance, abs=0.03)
        with pytest.raises(AssertionError, match="own and older at once"):
            ReplaySchedule(older, older, share)
        again = ReplaySchedule(own, older, share)
        again.restore(json.loads(json.dumps(schedule.state(120))))
        resumed = [draw for (lane,) in again.steps(range(120, 200), range(1)) for draw in lane]
        assert resumed == drawn[-len(resumed) :]
