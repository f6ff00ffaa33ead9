"""A user's own rows as utterances: which column is what, what values mean, how long the audio is, who is held out."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import torch
from pydantic import ValidationError

from speechllm.audio import to_seconds, write_audio
from speechllm.data.manifest import Gender, Split, Utterance
from speechllm.data.sources import Row, Source, audio_seconds, audio_suffix
from speechllm.errors import InputError, first_problem

# What is known of an utterance -> the names its column goes by, the likeliest first.
NAMES: dict[str, tuple[str, ...]] = {
    "audio": (
        *("audio", "path", "file", "wav", "file_name", "filename", "file_path", "filepath"),
        *("audio_path", "audio_file", "audio_filepath", "audio_filename", "wav_path", "wav_file"),
    ),
    "text": ("text", "sentence", "transcription", "transcript"),
    "speaker": ("speaker", "speaker_id", "client_id", "speaker_name", "spk", "spk_id"),
    "gender": ("gender", "sex"),
    "language": ("language", "locale", "lang"),
    "intent": ("intent", "intent_class", "intent_name", "intent_label"),
    "emotion": ("emotion", "emotion_name", "emotion_label"),
    "split": ("split",),
    "segments": ("segments",),
    "slots": ("slots",),
    "translations": ("translations",),
}
_GENDERS: dict[str, Gender] = {
    **dict.fromkeys(("m", "male", "man", "masculine", "male_masculine"), "male"),
    **dict.fromkeys(("f", "w", "female", "woman", "feminine", "female_feminine"), "female"),
}
_SPLITS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "development", "validation", "valid", "val"), "dev"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def parse_columns(words: str) -> dict[str, str]:
    """ "audio=path,text=sentence" -> what is known: its column; an empty column means that none is to be used."""
    given: dict[str, str] = {}
    for pair in filter(None, (part.strip() for part in words.split(","))):
        name, equals, column = (part.strip() for part in pair.partition("="))
        if not equals or not name:
            raise InputError(f"--columns {pair}: write it as NAME=COLUMN, for instance text=sentence")
        if name in given:
            raise InputError(f"--columns: {name} is given twice")
        given[name] = column
    return given


@dataclass(frozen=True)
class Columns:
    """Which column is what. known: a key of NAMES -> column. labels: label -> column. unused: what is left out."""

    known: dict[str, str]
    labels: dict[str, str]
    unused: tuple[str, ...]


def find_columns(source: Source, given: dict[str, str]) -> Columns:
    """The columns as `given`, else by common names; audio by its type first. All others become labels.

    Raises InputError, naming the columns there are, when a column given is not there or no audio is found.
    """
    there = ", ".join(source.columns) or "none"
    for name, column in given.items():
        if column and column not in source.columns:
            raise InputError(f"--columns {name}={column}: no such column in {source.name}; there are: {there}")
    known = {name: column for name, column in given.items() if column and name in NAMES}
    labels = {name: column for name, column in given.items() if column and name not in NAMES}
    taken = set(given.values())
    by_name = {re.sub(r"[ -]", "_", column.strip().lower()): column for column in reversed(source.columns)}
    for name, usual in NAMES.items():
        if name in given:
            continue
        named = [by_name[word] for word in usual if word in by_name]
        typed = sorted(source.audio, key=lambda column: column not in named) if name == "audio" else []
        free = [column for column in (*typed, *named) if column not in taken]
        if free:
            known[name] = free[0]
            taken.add(free[0])
    if "audio" not in known:
        raise InputError(
            f"{source.name}: no column of audio found; name it by --columns audio=NAME; there are: {there}"
        )
    paths = {by_name.get(word) for word in NAMES["audio"]}  # other names of the same files
    left = [column for column in source.columns if column not in taken]
    unused = tuple(column for column in left if not column or column in paths or column in source.audio)
    labels |= {column: column for column in left if column not in unused}
    return Columns(known, labels, unused)


def split_of(name: object) -> Split | None:
    """train, dev or test for the many names of splits ("validation", "train.clean.100"); None for any other."""
    return _SPLITS.get(re.split(r"[^a-z]", str(name).strip().lower())[0])


def language_of(name: str) -> str:
    """ "en-US", "en_US" -> "en"; what is no such code stays as it is."""
    match = re.fullmatch(r"([a-z]{2,3})([-_][a-z0-9-_]+)?", name.strip(), re.IGNORECASE)
    return match[1].lower() if match else name.strip()


class Importer:
    """Makes utterances of rows; audio that is no file of the user's is written to `out`/audio.

    Until `finish`, what is written is in `out`/audio.new, which `discard` removes.
    """

    def __init__(self, source: Source, columns: Columns, out: Path, language: str | None, split: Split | None):
        self.source, self.columns, self.out, self.language, self.split = source, columns, out, language, split
        self.name = out.resolve().name
        self.root = Path(os.path.realpath(out))
        self.not_scalar: set[str] = set()  # columns with values that cannot be labels
        self.staging = out / "audio.new"
        self.discard()

    def discard(self) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)

    def finish(self) -> None:
        if self.staging.exists():
            self.staging.replace(self.out / "audio")

    def utterance(self, index: int, row: Row) -> Utterance:
        """Row number `index` as an utterance. Raises InputError, without the row's name, when it cannot be one."""
        if row.problem:
            raise InputError(row.problem)
        known = {name: row.values.get(column) for name, column in self.columns.known.items()}
        labels = {name: row.values.get(column) for name, column in self.columns.labels.items()}
        gender = _word(known.get("gender"))
        if gender and gender.lower() not in _GENDERS:
            labels["gender"] = gender  # stays readable
        if "emotion" in known:
            labels["emotion"] = known["emotion"]
        split = self.split or split_of(known.get("split", row.split))
        if split is None:
            raise InputError(f"its split is {known.get('split')!r}; there are train, validation (or dev) and test")
        language = _word(known.get("language"))
        text = known.get("text")
        audio, duration = self._audio(index, known["audio"])
        try:
            return Utterance(
                id=f"{self.name}/{index}",
                audio=audio,
                duration=duration,
                text=text if isinstance(text, str) else _word(text),
                language=language_of(language) if language else self.language,
                speaker=_word(known.get("speaker")),
                gender=_GENDERS.get((gender or "").lower()),
                intent=_word(known.get("intent")),
                segments=[{"speaker": None} | _filled(segment) for segment in known.get("segments") or ()],
                slots=_filled(known.get("slots")),
                translations=_filled(known.get("translations")),
                labels=self._labels(labels),
                split=split,
                source=self.name,
            )
        except ValidationError as error:
            raise InputError(first_problem(error)) from error

    def _labels(self, values: dict[str, Any]) -> dict[str, str | int | float]:
        """The scalar values: true and false as 1 and 0, unknown ones left out."""
        labels: dict[str, str | int | float] = {}
        for name, value in values.items():
            if isinstance(value, bool):
                labels[name] = int(value)
            elif isinstance(value, int) or (isinstance(value, str) and value.strip()):
                labels[name] = value
            elif isinstance(value, float):
                if math.isfinite(value):
                    labels[name] = value
            elif value is not None and not isinstance(value, str):
                self.not_scalar.add(name)
        return labels

    def _audio(self, index: int, value: Any) -> tuple[str, float]:
        """The audio's path relative to the manifest's folder, and its length in seconds."""
        if isinstance(value, dict) and value.get("array") is not None:
            rate = value.get("sampling_rate")
            samples = np.atleast_2d(np.asarray(value["array"], dtype=np.float32))  # [channels, samples]
            if not samples.size or not rate:
                raise InputError("holds 0 samples of audio" if rate else "holds samples without a sampling_rate")
            path = self._new(index, ".flac")
            write_audio(path, torch.from_numpy(samples), rate)
            return self._relative(path), to_seconds(samples.shape[1], rate)
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes):
            seconds = audio_seconds(value)
            path = self._new(index, audio_suffix(value))
            path.write_bytes(value)
            return self._relative(path), seconds
        if not isinstance(value, str) or not value.strip():
            raise InputError("names no audio" if not value else f"{type(value).__name__} is no path of an audio file")
        found = self._find(value.strip())
        seconds = audio_seconds(found)
        if _in_cache(found):
            path = self._new(index, found.suffix)
            shutil.copyfile(found, path)
            return self._relative(path), seconds
        return self._relative(found), seconds

    def _find(self, name: str) -> Path:
        """The file of that name; where there is none, where it should have been."""
        names = (name, name.replace("\\", "/"))  # as written on Windows
        # Common Voice keeps the files in clips/ and names them without it.
        places = [self.source.folder / folder / name for name in names for folder in ("", "clips")]
        return next((place for place in places if place.is_file()), places[0])

    def _new(self, index: int, suffix: str) -> Path:
        if (self.out / "audio").exists():
            raise FileExistsError(errno.EEXIST, "it is there already", str(self.out / "audio"))
        path = self.staging / f"{index // 1000:03d}" / f"{index:07d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _relative(self, path: Path) -> str:
        if path.is_relative_to(self.staging):
            return (Path("audio") / path.relative_to(self.staging)).as_posix()
        # Not through a link to the file itself: its name may be the only one with a suffix.
        return Path(os.path.relpath(Path(os.path.realpath(path.parent)) / path.name, self.root)).as_posix()


def hold_out(utterances: Sequence[Utterance], share: float) -> list[Utterance]:
    """The same utterances, those of a share of the speakers in dev; of the sentences, where no speaker is known.

    Who is held out depends on the names alone. Raises InputError when there is one speaker or sentence only.
    """
    held: set[tuple[str, str]] = set()
    for kind in ("speaker", "sentence"):
        groups = sorted({_group(u) for u in utterances if _group(u)[0] == kind}, key=_shuffled)
        if len(groups) > 1:
            held.update(groups[: min(len(groups) - 1, max(1, round(share * len(groups))))])
    if not held:
        one_speaker = any(u.speaker for u in utterances)
        way_out = (
            "one speaker only: add --columns speaker= to hold out sentences" if one_speaker else "one sentence only"
        )
        raise InputError(f"--held-out: there is {way_out}")
    return [u.model_copy(update={"split": "dev"}) if _group(u) in held else u for u in utterances]


def _group(utterance: Utterance) -> tuple[str, str]:
    if utterance.speaker is not None:
        return "speaker", utterance.speaker
    return "sentence", " ".join((utterance.text or "").lower().split()) or utterance.id


def _shuffled(group: tuple[str, str]) -> str:
    return hashlib.sha256(" ".join(group).encode()).hexdigest()


def _word(value: Any) -> str | None:
    """A name, be it written as a number; None for an empty one."""
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    return (str(value).strip() or None) if value is not None else None


def _filled(value: Any) -> Any:
    """A mapping without the keys that other rows have and this one does not."""
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value or {}


def _in_cache(path: Path) -> bool:
    """Whether the file belongs to the cache of downloads, which may be emptied any time."""
    caches = (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    return any(path.absolute().is_relative_to(Path(cache).absolute()) for cache in caches)
