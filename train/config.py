"""Reading a YAML file into a typed, validated configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from speechllm.errors import InputError, first_problem

Config = TypeVar("Config", bound="Settings")


class Settings(BaseModel):
    """Base of all configurations: unknown names are refused, values cannot be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_config(path: Path, kind: type[Config]) -> Config:
    """``path`` as ``kind``.

    Raises:
        InputError: the file is missing, is not YAML, or a setting is unknown, missing or out of range.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error, whole='the file')}") from error
