"""A schedule of new examples with a fixed share of older ones among them, against forgetting.

Examples of what a model was trained on before, mixed into what it is trained on next, keep it from forgetting
(experience replay, Rolnick et al. 2019).
"""

from __future__ import annotations

from collections import Counter

from speechllm.data.schedule import Schedule


class ReplaySchedule(Schedule):
    """Draws by the chances of ``older`` for ``share`` of all examples, and by those of ``own`` for the rest.

    Both have corpora of their own, and draw all recordings and one question about each from the beginning; the rest of
    the settings are those of ``own``.
    """

    def __init__(self, own: Schedule, older: Schedule, share: float):
        corpora, others = ({name for found in part.pools.values() for name in found} for part in (own, older))
        assert not corpora & others, f"own and older at once: {corpora & others}"
        assert all(part.short == 0 and part.questions == 1 for part in (own, older))
        pools = {task: {**own.pools.get(task, {}), **older.pools.get(task, {})} for task in [*own.pools, *older.pools]}
        super().__init__(pools, {}, own.batch_tokens, own.seed, own.lanes)
        self._parts = ((own, 1 - share), (older, share))

    def shares(self, step: int) -> dict[str, float]:
        """Task -> its probability at ``step``, of both together."""
        total: Counter[str] = Counter()
        for (task, _), chance in self.chances(step).items():
            total[task] += chance  # type: ignore[assignment]  # a Counter of floats
        return dict(total)

    def chances(self, step: int) -> dict[tuple[str, str], float]:
        """Task and corpus -> their probability at ``step``."""
        return {pool: share * chance for part, share in self._parts for pool, chance in part.chances(step).items()}
