"""How commands end: what a user can cause is one line on standard error and an exit code, never a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from speechllm.errors import InputError

USER_ERROR, INTERRUPTED = 2, 130  # exit codes; the latter as a shell counts SIGINT


@contextmanager
def plain_errors(stopped: str = "stopped") -> Iterator[None]:
    """For the body of a command. stopped: what Ctrl-C is answered with, where whoever it interrupts does not say."""
    try:
        yield
    except InputError as error:
        typer.echo(f"error: {' '.join(str(error).splitlines())}", err=True)
        raise typer.Exit(USER_ERROR) from error
    except KeyboardInterrupt as stop:
        typer.echo(str(stop) or stopped, err=True)
        raise typer.Exit(INTERRUPTED) from stop
