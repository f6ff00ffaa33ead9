"""Long work cut into units: the result of each is kept in a file, and a second call does only what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechllm.errors import InputError
from train.loop import progress_bar
from train.output import write_whole

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Unit:
    """One result: the name it is kept under, the length of its progress bar, and how to get it (ready for JSON)."""

    key: str
    total: int
    run: Callable[[Advance], dict[str, Any]]


class Store:
    """The results of one kind of work in ``path``, beside what they are ``of``: the settings they depend on.

    Raises:
        InputError: the file holds results of other settings, or is damaged.
    """

    def __init__(self, path: Path, of: dict[str, Any]):
        self.path = path
        of = json.loads(json.dumps(of, default=str))
        kept: dict[str, Any] = {"of": {}, "results": {}}
        if path.exists():
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                kept = {"of": dict(kept["of"]), "results": dict(kept["results"])}
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}: damaged ({error}); delete it to measure again") from error
        if changed := [name for name, value in of.items() if kept["of"].get(name, value) != value]:
            what = ", ".join(changed)
            raise InputError(f"{path}: measured with other {what}: delete it to measure again, or set another 'out'")
        self.of: dict[str, Any] = kept["of"] | of
        self.results: dict[str, Any] = kept["results"]

    def keep(self, key: str, result: dict[str, Any]) -> None:
        """Add one result; the file is replaced as a whole, so that an interruption leaves the old one."""
        self.results[key] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps({"of": self.of, "results": self.results}, indent=1) + "\n")

    def fill(self, name: str, units: Iterable[Unit]) -> None:
        """Do the units whose results are missing, each with a progress bar of its own."""
        with progress_bar() as bar:
            for unit in units:
                if unit.key in self.results:
                    continue
                line = bar.add_task(f"{name} {unit.key}", total=unit.total)
                self.keep(unit.key, unit.run(lambda n: bar.advance(line, n)))  # noqa: B023
                bar.update(line, completed=unit.total)
