"""Prompt files: an instruction and solved examples of it, in YAML, written by people."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from speechllm.errors import InputError, first_error, first_problem

SUFFIX = ".yaml"
CLIPS_TABLE = "clips.yaml"  # in a folder of prompt files: how their clips are made, by train/prompt_clips.py


class _Shot(BaseModel):
    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    audio: str = Field(min_length=1)
    answer: str


class _Prompt(BaseModel):
    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    instruction: str = Field(min_length=1)
    description: str = ""
    labels: tuple[str, ...] = ()
    task: str | None = None
    shots: tuple[_Shot, ...] = ()


@dataclass(frozen=True)
class PromptFile:
    """What a prompt file says.

    instruction: of the shots. labels: the answers there are; empty where any will do. shots: paths of clips, and the
    answer to each. description: a line for people. task: name of the task whose answers these are, whatever the
    instruction's words; None where they decide. lines: of the file, on which the shots begin.
    """

    path: Path
    instruction: str
    labels: tuple[str, ...]
    shots: tuple[tuple[Path, str], ...]
    description: str
    task: str | None
    lines: tuple[int, ...]

    def error(self, number: int, message: object) -> InputError:
        """What is wrong with shot ``number``, counted from 0."""
        return InputError(f"{self.path}, line {self.lines[number]}: shots.{number}: {message}")

    def check_clips(self) -> None:
        """Raises InputError for the first clip that does not exist."""
        for number, (clip, _) in enumerate(self.shots):
            if not os.path.isfile(clip):  # which takes any name, as Path.is_file does not
                raise self.error(number, f"{clip}: no such file; clips are named from the folder of the prompt file")


def read_prompt_file(path: str | Path) -> PromptFile:
    """Clips are named from the folder of the file; whether they exist is asked by :meth:`PromptFile.check_clips`.

    Raises InputError, with the line, when it is missing, no YAML, or not as it should be.
    """
    path = Path(path)
    root, values = _parsed(path)
    try:
        told = _Prompt.model_validate(values)
    except ValidationError as error:
        location = first_error(error)["loc"]
        raise InputError(f"{path}, line {_line(root, location)}: {first_problem(error)}") from error
    if wrong := _contradiction(told):
        location, message = wrong
        where = ".".join(map(str, location))
        raise InputError(f"{path}, line {_line(root, location)}: {where}: {message}")
    return PromptFile(
        path,
        instruction=_collapsed(told.instruction),
        labels=tuple(map(_collapsed, told.labels)),
        shots=tuple((path.parent / shot.audio, _collapsed(shot.answer)) for shot in told.shots),
        description=told.description,
        task=told.task,
        lines=tuple(_line(root, ("shots", number)) for number in range(len(told.shots))),
    )


def prompts_folder() -> Path:
    """Where prompt files are found by name: ``prompts`` of the repository; of an installed package, ``./prompts``."""
    root = Path(__file__).resolve().parent.parent
    return (root if (root / "pyproject.toml").is_file() else Path()) / "prompts"


def prompt_files(folder: Path) -> list[Path]:
    """The prompt files in a folder, by name. Raises InputError where there are none."""
    files = sorted(file for file in folder.glob(f"*{SUFFIX}") if file.name != CLIPS_TABLE)
    if not files:
        problem = "holds no prompt files" if folder.is_dir() else "no such folder"
        raise InputError(f"{folder}: {problem}; name a folder of prompt files (NAME{SUFFIX})")
    return files


def find_prompt_file(name: str | Path) -> Path:
    """The file of this name; where there is none, the one called so in the folder of prompt files.

    Raises InputError for a bare name that is neither.
    """
    path = Path(name)
    if os.path.isfile(path) or path.name != str(name) or path.suffix:
        return path
    folder = prompts_folder()
    if os.path.isfile(found := folder / f"{name}{SUFFIX}") and found.name != CLIPS_TABLE:
        return found
    raise InputError(f"{name}: no such prompt file, and none is called so in {folder}; see speechllm prompts list")


def _parsed(path: Path) -> tuple[yaml.Node | None, object]:
    """The nodes of the YAML, which know their lines, and its values. Raises InputError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot read the prompt file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a prompt file: not UTF-8 text") from error
    try:
        loader = yaml.BaseLoader(text)  # all is text: yes, no, 42
        root = loader.get_single_node()
        values = {} if root is None else loader.construct_document(root)  # of an empty file nothing is there
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise InputError(f"{path}, line {line}: not YAML ({error.problem or error.context})") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(f"{path}, line {line}: not YAML (a character that is not allowed)") from error
    except RecursionError as error:
        raise InputError(f"{path}: not a prompt file: there are lists in lists in lists") from error
    if not isinstance(values, dict):
        raise InputError(f'{path}, line 1: not a prompt file: write "instruction: …" and what else there is, by name')
    assert root is None or isinstance(root, yaml.MappingNode)
    mappings: list[yaml.Node] = [root] if root else []
    for key, value in root.value if root else ():
        if key.value == "shots" and isinstance(value, yaml.SequenceNode):
            mappings += value.value
    for mapping in mappings:
        if isinstance(mapping, yaml.MappingNode) and (twice := _twice(mapping)):
            raise InputError(f"{path}, line {twice.start_mark.line + 1}: {twice.value}: is there already")
    return root, values


def _twice(mapping: yaml.MappingNode) -> yaml.Node | None:
    """The first key that was there before."""
    seen: set[str] = set()
    for key, _ in mapping.value:
        if key.value in seen:
            return key
        seen.add(key.value)
    return None


def _line(node: yaml.Node | None, location: Sequence[str | int]) -> int:
    """Where a part of the file is, counted from 1; of what is missing, where it should be in."""
    line = node.start_mark.line + 1 if node else 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = next((pair for pair in node.value if pair[0].value == part), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _collapsed(text: str) -> str:
    return " ".join(text.split())


def _contradiction(told: _Prompt) -> tuple[tuple[str | int, ...], str] | None:
    """Where, and what does not go together."""
    from speechllm.tasks import TASKS  # with numpy, for which a command's --help does not wait

    labels = list(map(_collapsed, told.labels))
    if "\n" in told.description:
        return ("description",), "must be one line"
    if told.task is not None and told.task not in TASKS:
        return ("task",), f"there is no task {told.task!r}; there are {', '.join(TASKS)}"
    if told.task is not None and labels:
        return ("task",), "labels say what the answers are, and so does a task: leave one of them out"
    for number, label in enumerate(labels):
        if not label or label in labels[:number]:
            return ("labels", number), "is there already" if label else "is empty"
    for number, shot in enumerate(told.shots):
        if labels and _collapsed(shot.answer) not in labels:
            return ("shots", number, "answer"), f"{shot.answer!r} is none of the labels {', '.join(labels)}"
    return None
