"""Manifests: JSON Lines files that describe one utterance a line, and the way from a line to its audio."""

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from speechllm.audio import read_audio
from speechllm.errors import InputError, first_problem
from speechllm.tasks import Facts, Segment

Split = Literal["train", "dev", "test"]
Gender = Literal["male", "female"]
SLACK = 0.05  # seconds: durations and times are often rounded apart
WRONG = 0.5  # seconds: a duration further from the file's is another file's, or the file was cut since


class Utterance(BaseModel):
    """One recording and what is known about it; or a text alone, with neither audio nor duration.

    `audio` is a path relative to the manifest's folder or, when `tar` is set, the name of a member of that tar file,
    whose bytes `[tar_offset, tar_offset + tar_size)` are the audio file. `duration` is in seconds. `language` is an
    ISO 639-1 code, or the set's own name for a language that has none. `translations` maps language codes to text.
    `segments` are in order of their start, in seconds, within the recording; they may overlap. `intent` and `slots`
    (slot name -> words) say what the speaker wants.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(min_length=1)
    audio: str = ""
    tar: str | None = None
    tar_offset: int | None = Field(default=None, ge=0)
    tar_size: int | None = Field(default=None, gt=0)
    duration: float = Field(default=0.0, ge=0)
    text: str | None = None
    language: str | None = None
    speaker: str | None = None
    gender: Gender | None = None
    translations: dict[str, str] = Field(default_factory=dict)
    segments: tuple[Segment, ...] = ()
    intent: str | None = None
    slots: dict[str, str] = Field(default_factory=dict)
    labels: dict[str, str | int | float] = Field(default_factory=dict)
    split: Split
    source: str

    @property
    def is_text(self) -> bool:
        """Whether it is a text alone."""
        return not self.audio

    @property
    def verbatim(self) -> bool:
        """Whether what is said is known: a label ``text_note`` tells that the text is something else."""
        return self.text is not None and "text_note" not in self.labels

    def facts(self) -> Facts:
        """What tasks may know about it; the text only where it is what is said."""
        known = {field.name: getattr(self, field.name) for field in fields(Facts)}
        return Facts(**known | {"text": self.text if self.verbatim else None})

    @model_validator(mode="after")
    def _something_is_there(self) -> "Utterance":
        if self.audio and not self.duration:
            raise ValueError("duration: is missing, or 0: say how many seconds the audio has")
        if self.is_text and (self.duration or self.tar is not None or self.segments):
            raise ValueError("audio: is missing, and what else is said of it is there")
        if self.is_text and not self.text:
            raise ValueError("audio and duration are missing, and there is no text that could train alone")
        return self

    @model_validator(mode="after")
    def _tar_is_complete(self) -> "Utterance":
        given = [value is not None for value in (self.tar, self.tar_offset, self.tar_size)]
        if any(given) and not all(given):
            raise ValueError("tar, tar_offset and tar_size go together: give all three or none")
        return self

    @model_validator(mode="after")
    def _segments_fit(self) -> "Utterance":
        earlier = 0.0
        for number, segment in enumerate(self.segments, start=1):
            if not earlier <= segment.start < segment.end <= self.duration + SLACK:
                raise ValueError(
                    f"segment {number} ({segment.start}-{segment.end} s): segments start in order, end after they "
                    f"start, and lie within the {self.duration} s of the recording"
                )
            earlier = segment.start
        return self


def read_records(path: str | Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) for each line of a manifest that is not blank.

    Raises InputError, naming file and line, when the file is missing, is no UTF-8 text or a line is no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such manifest; python -m train.import_data makes one")
    try:
        with path.open(encoding="utf-8") as lines:
            yield from read_json_lines(path, lines)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def read_json_lines(path: str | Path, lines: Iterable[str]) -> Iterable[tuple[int, dict]]:
    """(line number from 1, object) for each line that is not blank; InputError names `path` and the line."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            fault = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise InputError(f"{path}, line {number}: not JSON ({fault})") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}: a JSON object is expected, not {type(record).__name__}")
        yield number, record


def read_manifest(path: str | Path) -> list[Utterance]:
    """All utterances of a manifest, in file order.

    Raises InputError, naming file and line, when the file is missing, a line does not fit the schema or an id occurs
    twice.
    """
    utterances: list[Utterance] = []
    first_seen: dict[str, int] = {}
    for number, record in read_records(path):
        try:
            utterance = Utterance.model_validate(record)
        except ValidationError as error:
            raise InputError(f"{path}, line {number}: {first_problem(error)}") from error
        if utterance.id in first_seen:
            raise InputError(
                f"{path}, line {number}: id {utterance.id!r} is already on line {first_seen[utterance.id]}"
            )
        first_seen[utterance.id] = number
        utterances.append(utterance)
    return utterances


def _line(utterance: Utterance) -> str:
    told = utterance.model_dump(mode="json", exclude={"audio", "duration"} if utterance.is_text else None)
    known = {key: value for key, value in told.items() if value not in (None, {}, [])}
    return json.dumps(known, ensure_ascii=False) + "\n"


def append(path: str | Path, utterance: Utterance) -> None:
    """Add one line to a manifest (made when absent) and hand it to the operating system at once."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(_line(utterance))


def write_manifest(path: str | Path, utterances: Iterable[Utterance]) -> None:
    """Write a whole manifest, replacing what was there."""
    with Path(path).open("w", encoding="utf-8") as file:
        file.writelines(_line(utterance) for utterance in utterances)


def audio_bytes(utterance: Utterance, root: str | Path) -> bytes:
    """The utterance's audio file as it is, from its path or its tar; `root` is the manifest's folder.

    Raises InputError when a file cannot be read or the tar ends before the member does.
    """
    path = Path(root) / (utterance.audio if utterance.tar is None else utterance.tar)
    try:
        with path.open("rb") as file:
            file.seek(utterance.tar_offset or 0)
            content = file.read(-1 if utterance.tar_size is None else utterance.tar_size)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if utterance.tar_size is not None and len(content) < utterance.tar_size:
        raise InputError(f"{path}: ends before member {utterance.audio} does; fetch the file again")
    return content


def load_wav(utterance: Utterance, root: str | Path, sample_rate: int) -> Tensor:
    """The utterance's audio, float32 [1, samples] at `sample_rate`; `root` is the manifest's folder.

    Raises InputError when the file is missing, the tar ends before the member does, or the bytes are not audio; or the
    utterance is a text alone.
    """
    root = Path(root)
    if utterance.is_text:
        raise InputError(f"{utterance.id}: is a text alone, and audio is needed here: leave it out of the manifest")
    if utterance.tar is None:
        return read_audio(root / utterance.audio, sample_rate)
    content = audio_bytes(utterance, root)
    try:
        return read_audio(io.BytesIO(content), sample_rate)
    except InputError as error:
        raise InputError(f"{root / utterance.tar}, member {utterance.audio}: {error}") from error
