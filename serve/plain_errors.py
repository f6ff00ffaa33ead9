"""How commands end: what a user can cause is one line on standard error and an exit code, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from speechllm.errors import InputError

USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141  # exit codes; the last two as a shell counts SIGINT and SIGPIPE


@contextmanager
def plain_errors() -> Iterator[None]:
    """What a user can cause ends in one line and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # JSON is UTF-8 whatever the locale, and a file name that is not UTF-8 must not stop the printing.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        yield
    except InputError as error:
        complain(f"error: {error}")
        raise typer.Exit(USER_ERROR) from None
    except BrokenPipeError:
        # Whoever read the answers has gone; Python's last flush must not complain about it either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def complain(message: str) -> None:
    """One line on standard error, whatever the file's name holds."""
    print(" ".join(message.splitlines()), file=sys.stderr, flush=True)
