"""Prompt files: an instruction and solved examples of it, in YAML, written by people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from speechllm.errors import InputError, first_problem


class _Shot(BaseModel):
    model_config = ConfigDict(extra="forbid")

    audio: str = Field(min_length=1)
    answer: str


class _Prompt(BaseModel):
    model_config = ConfigDict(extra="forbid")

    instruction: str = Field(min_length=1)
    labels: tuple[str, ...] = ()
    shots: tuple[_Shot, ...] = ()


@dataclass(frozen=True)
class PromptFile:
    """What a prompt file says.

    instruction: of the shots. labels: the answers there are; empty where any will do. shots: paths of clips, and the
    answer to each.
    """

    instruction: str
    labels: tuple[str, ...]
    shots: tuple[tuple[Path, str], ...]


def read_prompt_file(path: str | Path) -> PromptFile:
    """Clips are named from the folder of the file.

    Raises InputError when it is missing, no YAML, or not as it should be.
    """
    path = Path(path)
    try:
        # all is text: yes, no, 42; of an empty file nothing is there
        told = _Prompt.model_validate(yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader) or {})
    except OSError as error:
        raise InputError(f"{path}: cannot read the prompt file ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        raise InputError(f"{path}: not a prompt file: {first_problem(error)}") from error
    return PromptFile(
        told.instruction, told.labels, tuple((path.parent / shot.audio, shot.answer) for shot in told.shots)
    )
