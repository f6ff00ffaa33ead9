"""A user's own rows as utterances: what their values mean, how long the audio is, which part of it is meant."""

from __future__ import annotations

import errno
import io
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from speechllm.audio import read_audio, to_samples, to_seconds, write_audio
from speechllm.data.audio_files import audio_rate, audio_seconds, audio_suffix
from speechllm.data.columns import Columns
from speechllm.data.languages import language_code
from speechllm.data.manifest import SLACK, Gender, Split, Utterance
from speechllm.data.sources import Row, Source
from speechllm.errors import InputError, first_problem

_GENDERS: dict[str, Gender] = {
    **dict.fromkeys(("m", "male", "man", "masculine", "male_masculine"), "male"),
    **dict.fromkeys(("f", "w", "female", "woman", "feminine", "female_feminine"), "female"),
}
# What is known by one value: words, or a number.
_SINGLE = ("id", "text", "speaker", "gender", "language", "intent", "emotion", "split")
_SPLITS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "development", "validation", "valid", "val"), "dev"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def split_of(name: object) -> Split | None:
    """train, dev or test for the many names of splits ("validation", "train.clean.100"); None for any other."""
    return _SPLITS.get(re.split(r"[^a-z]", str(name).strip().lower())[0])


@dataclass(frozen=True)
class Span:
    """The part of a recording that a row is about, in seconds; no end: all that follows."""

    start: float
    end: float | None

    def of(self, seconds: float) -> tuple[float, float] | None:
        """Start and end within a recording; None when they are all of it. InputError when they are not within it."""
        end = seconds if self.end is None else self.end
        if not 0 <= self.start < end <= seconds + SLACK:
            raise InputError(
                f"start {self.start:g} and end {end:g} (seconds) are not within the {seconds:g} s of the recording"
            )
        return None if self.start == 0 and end >= seconds - SLACK else (self.start, min(end, seconds))


class Importer:
    """Makes utterances of rows; audio that is no file of the user's is written to `out`/audio.

    Until `finish`, what is written is in `out`/audio.new, which `discard` removes.
    """

    def __init__(self, source: Source, columns: Columns, out: Path, language: str | None, split: Split | None):
        self.source, self.columns, self.out, self.language, self.split = source, columns, out, language, split
        self.name = out.resolve().name
        self.root = Path(os.path.realpath(out))
        self.not_scalar: set[str] = set()  # columns with values that cannot be labels
        self.without_split = 0  # rows whose cell for it is empty
        self._rows: dict[str, str] = {}  # id -> the row that has it
        self._decoded: tuple[Path, Tensor] | None = None  # the last recording that was cut
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
        single = {name: _single(name, known.get(name)) for name in _SINGLE}
        gender = (single["gender"] or "").lower()
        if gender and gender not in _GENDERS:
            labels["gender"] = single["gender"]  # stays readable
        if single["emotion"]:
            labels["emotion"] = single["emotion"]
        text = known.get("text")
        language = language_code(single["language"]) if single["language"] else self.language
        identity, split = self._id(index, single["id"]), self._split(row, single["split"])
        translations = self._translations(known.get("translations"), row)
        segments = known.get("segments") or ()
        if not (isinstance(segments, list | tuple) and all(isinstance(segment, dict) for segment in segments)):
            raise InputError("segments are a list of objects with start and end")
        span = _span(known)
        if segments and span:
            raise InputError("segments do not go with the start and end of an excerpt: give the whole recording")
        audio, duration = self._audio(index, known["audio"], span)
        try:
            utterance = Utterance(
                id=identity,
                audio=audio,
                duration=duration,
                text=text if isinstance(text, str) else single["text"],
                language=language,
                speaker=single["speaker"],
                gender=_GENDERS.get(gender),
                intent=single["intent"],
                segments=[{"speaker": None} | _filled(segment) for segment in segments],
                slots=_filled(known.get("slots")),
                translations=translations,
                labels=self._labels(labels),
                split=split,
                source=self.name,
            )
        except ValidationError as error:
            raise InputError(first_problem(error)) from error
        self._rows[identity] = row.where
        self.without_split += "split" in known and not single["split"]
        return utterance

    def _id(self, index: int, given: str | None) -> str:
        """`<set>/<id>`, the number of the row where there are no ids."""
        if "id" not in self.columns.known:
            return f"{self.name}/{index}"
        if given is None:
            raise InputError("has no id; give it one, or number all rows by --columns id=")
        identity = f"{self.name}/{given}"
        if identity in self._rows:
            first = self._rows[identity]
            raise InputError(f"id {given!r} is that of {first} too; mend one, or number all rows by --columns id=")
        return identity

    def _split(self, row: Row, given: str | None) -> Split:
        """Of all rows, or of this one; train where it does not say."""
        split = self.split or (split_of(given or "train") if "split" in self.columns.known else split_of(row.split))
        if split is None:
            raise InputError(f"its split is {given!r}; there are train, validation (or dev) and test")
        return split

    def _translations(self, mapping: Any, row: Row) -> dict[str, str]:
        """Language -> text, of a column of all translations and of those of single ones."""
        if not isinstance(mapping, dict | None):
            raise InputError(
                "translations are an object of language and text; say which language a column of text is in: "
                "--columns translation_de=COLUMN"
            )
        found = {language_code(str(name)): text for name, text in _filled(mapping).items()}
        found |= {language: row.values.get(column) for language, column in self.columns.translations.items()}
        texts = {language: _single(f"translation to {language}", text) for language, text in found.items()}
        return {language: text for language, text in texts.items() if text}

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

    def _audio(self, index: int, value: Any, span: Span | None) -> tuple[str, float]:
        """The audio's path relative to the manifest's folder, and its length in seconds; `span` alone is cut out."""
        if isinstance(value, dict) and value.get("array") is not None:
            rate = value.get("sampling_rate")
            samples = np.atleast_2d(np.asarray(value["array"], dtype=np.float32))  # [channels, samples]
            if not samples.size or not rate:
                raise InputError("holds 0 samples of audio" if rate else "holds samples without a sampling_rate")
            part = span.of(to_seconds(samples.shape[1], rate)) if span else None
            return self._cut(index, torch.from_numpy(samples), rate, part)
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes):
            seconds = audio_seconds(value)
            if part := span.of(seconds) if span else None:
                rate = audio_rate(value)
                return self._cut(index, read_audio(io.BytesIO(value), rate), rate, part)
            path = self._new(index, audio_suffix(value))
            path.write_bytes(value)
            return self._relative(path), seconds
        if not isinstance(value, str) or not value.strip():
            raise InputError("names no audio" if not value else f"{type(value).__name__} is no path of an audio file")
        found = self._find(value.strip())
        seconds = audio_seconds(found)
        if part := span.of(seconds) if span else None:
            rate = audio_rate(found)
            if self._decoded is None or self._decoded[0] != found:  # rows of one recording mostly follow each other
                self._decoded = found, read_audio(found, rate)
            return self._cut(index, self._decoded[1], rate, part)
        if _in_cache(found):
            path = self._new(index, found.suffix)
            shutil.copyfile(found, path)
            return self._relative(path), seconds
        return self._relative(found), seconds

    def _cut(self, index: int, wav: Tensor, rate: int, part: tuple[float, float] | None) -> tuple[str, float]:
        """Write all of wav [channels, samples], or the part between two times in seconds."""
        if part is not None:
            wav = wav[:, to_samples(part[0], rate) : to_samples(part[1], rate)]
            if not wav.shape[1]:
                raise InputError(f"start {part[0]:g} and end {part[1]:g} are less than a sample apart")
        path = self._new(index, ".flac")
        write_audio(path, wav, rate)
        return self._relative(path), to_seconds(wav.shape[1], rate)

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


def _word(value: Any) -> str | None:
    """A name, be it written as a number; None for an empty one."""
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    return (str(value).strip() or None) if value is not None else None


def _single(name: str, value: Any) -> str | None:
    """A value of words or a number, as text; None for an empty one. InputError for any other type."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        raise InputError(f"its {name} is of type {type(value).__name__}, and must be text")
    return _word(value)


def _span(known: dict[str, Any]) -> Span | None:
    """Where in its recording a row's excerpt is; None when the row is about all of it."""
    times: dict[str, float] = {}
    for name in ("start", "end", "duration"):
        word = _single(name, known.get(name))
        if word is None:
            continue
        try:
            times[name] = float(word)
        except ValueError:
            times[name] = math.nan
        if not math.isfinite(times[name]):
            raise InputError(
                f"its {name} is {word!r}, and must be in seconds; if it is no time in the audio, add --columns {name}="
            )
    if "start" not in times and "end" not in times:
        return None
    start = times.get("start", 0.0)
    return Span(start, times.get("end", start + times["duration"] if "duration" in times else None))


def _filled(value: Any) -> Any:
    """A mapping without the keys that other rows have and this one does not."""
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value or {}


def _in_cache(path: Path) -> bool:
    """Whether the file belongs to the cache of downloads, which may be emptied any time."""
    caches = (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    return any(path.absolute().is_relative_to(Path(cache).absolute()) for cache in caches)
