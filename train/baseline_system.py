"""What answers the questions of an evaluation: our model, or something to compare it with."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

from speechllm.errors import InputError
from speechllm.tasks import ParsedAnswer, Task
from train.questions import Advance, Question


class System(Protocol):
    """Answers questions of one task, in order; tells ``advance`` how many more are answered.

    Raises InputError, in one line, for a task that it does not do.
    """

    name: str

    def answer(self, questions: Sequence[Question], task: Task, advance: Advance) -> list[ParsedAnswer]: ...


def needed(name: str, module: str, package: str) -> Any:
    """The module of a package that a baseline stands on. Raises InputError with the command that installs it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            f"baseline {name}: {package} is not installed (pip install -e '.[train]'), or leave it out"
        ) from error
