"""The one error a user can cause."""

from pydantic import ValidationError
from pydantic_core import ErrorDetails


class InputError(ValueError):
    """Something a user gave cannot be used. The message is one line: the file or setting, the fault, the way out."""


def first_error(error: ValidationError) -> ErrorDetails:
    """The first complaint of pydantic: an unknown field before one that is missing, which it may be misspelt for."""
    return min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")


def first_problem(error: ValidationError) -> str:
    """That complaint as `field: message`."""
    problem = first_error(error)
    field = ".".join(str(part) for part in problem["loc"]) or "record"
    return f"{field}: {problem['msg']}"
