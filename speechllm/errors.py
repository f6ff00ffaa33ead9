"""The one error a user can cause."""

from pydantic import ValidationError
from pydantic_core import ErrorDetails


class InputError(ValueError):
    """Something a user gave cannot be used. The message is one line: the file or setting, the fault, the way out."""


def first_error(error: ValidationError) -> ErrorDetails:
    """The first complaint of pydantic: an unknown field before one that is missing, which it may be misspelt for."""
    return min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")


def message_of(problem: ErrorDetails) -> str:
    """What it says, without pydantic's prefix."""
    return problem["msg"].removeprefix("Value error, ")


def first_problem(error: ValidationError, whole: str = "record") -> str:
    """That complaint as `field: message`.

    Of several fields that do not go together it is the message alone, which names them; of something that has no fields
    at all, `whole: message`.
    """
    problem = first_error(error)
    field = ".".join(str(part) for part in problem["loc"])
    message = message_of(problem)
    if not field:
        return message if problem["type"] == "value_error" else f"{whole}: {message}"
    return f"{field}: {message}"
