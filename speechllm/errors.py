"""The one error a user can cause."""

from pydantic import ValidationError


class InputError(ValueError):
    """Something a user gave cannot be used. The message is one line: the file or setting, the fault, the way out."""


def first_problem(error: ValidationError) -> str:
    """The first complaint of pydantic as `field: message`."""
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"]) or "record"
    return f"{field}: {problem['msg']}"
