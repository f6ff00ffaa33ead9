"""The one error a user can cause."""


class InputError(ValueError):
    """Something a user gave cannot be used. The message is one line: the file or setting, the fault, the way out."""
