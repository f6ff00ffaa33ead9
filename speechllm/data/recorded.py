"""Readers for sets of recorded speech (a folder with `manifest.jsonl`) and for files of sentences to speak."""

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from speechllm.data.manifest import Gender, Utterance, read_json_lines
from speechllm.errors import InputError, first_problem

_OWN_KEYS = (
    *("audio", "tar", "tar_offset", "tar_size", "duration", "split"),
    *("text", "language", "speaker", "segments", "intent", "slots"),
)
_TRANSLATIONS = ("de", "fr", "cs")


@dataclass(frozen=True)
class Sentence:
    """One English sentence, its translations (language code -> text), and what who says it wants, where known."""

    id: str
    text: str
    translations: Mapping[str, str] = field(default_factory=dict)
    intent: str | None = None
    slots: Mapping[str, str] = field(default_factory=dict)


def _label(value: object) -> str | int | float:
    """Lists and objects become JSON text, true and false become 1 and 0."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str | int | float):
        return value
    return json.dumps(value, ensure_ascii=False)


def read_recorded(folder: str | Path) -> list[Utterance]:
    """The utterances of a recorded set, in file order; audio paths stay relative to `folder`.

    Ids are `<set>/<audio>`, `source` is the set's name, its `translation` becomes `translations`, and every key the
    manifest schema does not have becomes a label. Raises InputError naming file and line.
    """
    folder = Path(folder)
    path = folder / "manifest.jsonl"
    if not path.is_file():
        raise InputError(f"{folder}: no manifest.jsonl in this folder")
    name = folder.resolve().name
    utterances = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, record in read_json_lines(path, lines):
                known = {key: record.pop(key) for key in _OWN_KEYS if key in record}
                translations = record.pop("translation", {})
                # A gender other than the two of the schema stays readable as a label.
                segments = known.get("segments") or []
                if not (isinstance(segments, list) and all(isinstance(segment, dict) for segment in segments)):
                    raise InputError(f"{path}, line {number}: segments are a list of objects with start and end")
                known["segments"] = [{"speaker": None} | segment for segment in segments]
                gender = record.pop("gender") if record.get("gender") in get_args(Gender) else None
                labels = {key: _label(value) for key, value in record.items() if value is not None}
                try:
                    utterance = Utterance(
                        id=f"{name}/{known.get('audio')}",
                        source=name,
                        gender=gender,
                        translations=translations,
                        labels=labels,
                        **known,
                    )
                except ValidationError as error:
                    raise InputError(f"{path}, line {number}: {first_problem(error)}") from error
                utterances.append(utterance)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file") from error
    return utterances


def read_sentences(path: str | Path) -> list[Sentence]:
    """Sentences of a gzipped JSON Lines file.

    Keys of a line: id; en or text; de, fr, cs where there are translations; intent, and slots as a list of type and
    value. Values of slots of one type are joined by "and". Raises InputError naming file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file of sentences")
    sentences = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for number, record in read_json_lines(path, lines):
                text = record.get("en") or record.get("text")
                if not record.get("id") or not isinstance(text, str) or not text:
                    raise InputError(f"{path}, line {number}: a sentence needs 'id', and 'en' or 'text'")
                translations = {language: record[language] for language in _TRANSLATIONS if record.get(language)}
                slots = _slots(record.get("slots") or [], f"{path}, line {number}")
                sentences.append(Sentence(record["id"], text, translations, record.get("intent"), slots))
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a gzipped JSON Lines file ({error})") from error
    if not sentences:
        raise InputError(f"{path}: holds no sentences")
    return sentences


def _slots(pairs: list[dict[str, str]], where: str) -> dict[str, str]:
    values: dict[str, str] = {}
    try:
        for pair in pairs:
            name, value = pair["type"], str(pair["value"])
            values[name] = f"{values[name]} and {value}" if name in values else value
    except (KeyError, TypeError) as error:
        raise InputError(f"{where}: slots are a list of objects with 'type' and 'value'") from error
    return values
