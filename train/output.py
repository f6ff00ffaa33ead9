"""Where commands write to: a folder made before the work, faults there in one line, files whole or not there."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from speechllm.errors import InputError


@contextmanager
def output_folder(out: Path) -> Iterator[None]:
    """The folder ``--out``, for as long as the block lasts. Raises InputError where it cannot be made or written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be made ({error.strerror}); give another folder") from error
    try:
        yield
    except OSError as error:
        named = isinstance(error.filename, str) and Path(error.filename).is_relative_to(out)
        if not named and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"{error.filename if named else out}: cannot be written ({error.strerror})") from error


def write_whole(path: Path, text: str) -> None:
    """The file is replaced as a whole, so that an interruption leaves the old one, or none."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
