"""Under which licences is what a model was trained on, and what follows for the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from speechllm.errors import InputError, first_problem
from train.config import Settings

TABLE = Path(__file__).parent / "configs" / "licences.yaml"

Use = Literal["free", "research", "noncommercial"]


class Entry(Settings):
    """A source with its licence, or a corpus made of other entries."""

    title: str = ""
    licence: str = ""
    use: Use | None = None
    of: list[str] = Field(default_factory=list)
    language: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Entry:
        if bool(self.of) == bool(self.title and self.licence and self.use):
            raise ValueError("give title, licence and use; or of, when it is made of others")
        return self


@dataclass(frozen=True)
class Licences:
    """The entries of a table."""

    path: Path
    entries: dict[str, Entry]

    def entry(self, name: str) -> Entry:
        """Raises InputError when there is none."""
        if name not in self.entries:
            raise InputError(f"{self.path}: no licence of {name}, which was trained on: add it there")
        return self.entries[name]

    def sources(self, names: Iterable[str]) -> list[str]:
        """What the corpora consist of in the end, each once. Raises InputError when an entry is missing."""
        found: dict[str, None] = {}
        for name in names:
            entry = self.entry(name)
            found |= dict.fromkeys(self.sources(entry.of) if entry.of else [name])
        return list(found)

    def languages(self, names: Iterable[str]) -> list[str]:
        """What is spoken in the corpora; of one that does not tell, in what it is made of."""
        found: dict[str, None] = {}
        for name in names:
            entry = self.entry(name)
            found |= dict.fromkeys(entry.language or self.languages(entry.of))
        return list(found)

    def used(self, names: Iterable[str], use: Use) -> list[str]:
        """Those of the sources of the corpora that allow this use."""
        return [name for name in self.sources(names) if self.entry(name).use == use]


def read_licences(path: Path = TABLE) -> Licences:
    """Raises InputError when the table is missing, or an entry of it is no entry."""
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Licences(path, {name: Entry.model_validate(entry) for name, entry in dict(table).items()})
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}") from error
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a table of licences ({' '.join(str(error).split())})") from error
