"""Which tasks an utterance has an answer for, and what it is."""

from __future__ import annotations

from collections.abc import Iterable

from speechllm.data.manifest import Utterance
from speechllm.tasks import TASKS, Task


def answers(utterance: Utterance, tasks: Iterable[Task] = tuple(TASKS.values())) -> dict[Task, str]:
    """The tasks among `tasks` whose answer the utterance's data hold, with the answer as it is trained."""
    written = {task: task.write(utterance.text, utterance.translations) for task in tasks}
    return {task: answer for task, answer in written.items() if answer is not None}
