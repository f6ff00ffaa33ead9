"""Readers for manifests of recorded speech, whose rows have no ids, and for files of sentences to speak."""

import gzip
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from speechllm.data.manifest import Gender, Utterance, read_json_lines, read_records
from speechllm.errors import InputError, first_problem

_OWN_KEYS = (
    *("audio", "tar", "tar_offset", "tar_size", "duration", "split"),
    *("text", "language", "speaker", "segments", "intent", "slots"),
)
_TRANSLATIONS = ("de", "fr", "cs")


@dataclass(frozen=True)
class Sentence:
    """One sentence, its translations (language code -> text), and what who says it wants, where known."""

    id: str
    text: str
    translations: Mapping[str, str] = field(default_factory=dict)
    intent: str | None = None
    slots: Mapping[str, str] = field(default_factory=dict)
    language: str = "en"

    def texts(self) -> dict[str, str]:
        """Language code -> text."""
        return {self.language: self.text, **self.translations}


def _label(value: object) -> str | int | float:
    """Lists and objects become JSON text, true and false become 1 and 0."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str | int | float):
        return value
    return json.dumps(value, ensure_ascii=False)


def read_recorded(manifest: str | Path) -> list[Utterance]:
    """The utterances of a recorded set, in file order; audio paths stay relative to the manifest's folder.

    Ids are `<set>/<audio>`, where a set is called by its folder, `source` is the set's name, its `translation` becomes
    `translations`, and every key the manifest schema does not have becomes a label. Raises InputError naming file and
    line, also where two rows name the same audio.
    """
    manifest = Path(manifest)
    name = manifest.parent.resolve().name
    utterances = []
    first_seen: dict[str, int] = {}
    for number, record in read_records(manifest):
        if "id" in record or "translations" in record or isinstance(record.get("labels"), dict):
            raise InputError(f"{manifest}, line {number}: rows like this one need ids, the first row of the file too")
        known = {key: record.pop(key) for key in _OWN_KEYS if key in record}
        if not known.get("audio"):
            raise InputError(f"{manifest}, line {number}: audio: names no file")
        translations = record.pop("translation", {})
        segments = known.get("segments") or []
        if not (isinstance(segments, list) and all(isinstance(segment, dict) for segment in segments)):
            raise InputError(f"{manifest}, line {number}: segments are a list of objects with start and end")
        known["segments"] = [{"speaker": None} | segment for segment in segments]
        # A gender other than the two of the schema stays readable as a label.
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
            raise InputError(f"{manifest}, line {number}: {first_problem(error)}") from error
        first = first_seen.setdefault(utterance.id, number)
        if first != number:
            raise InputError(
                f"{manifest}, line {number}: audio {utterance.audio!r} is already on line {first}; rows of one file "
                "need ids of their own: python -m train.import_data gives them"
            )
        utterances.append(utterance)
    return utterances


def read_sentences(path: str | Path, language: str = "en") -> list[Sentence]:
    """Sentences of a JSON Lines file, or of a text file (.txt) with one of `language` a line; either may be gzipped.

    Keys of a JSON line: id; en or text, which are English; de, fr, cs where there are translations; intent, and slots
    as a list of type and value. Values of slots of one type are joined by "and". Sentences of a text file are called by
    their line. Raises InputError naming file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file of sentences")
    plain = ".txt" in path.suffixes[-2:]
    sentences = []
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rt", encoding="utf-8-sig") if packed else path.open(encoding="utf-8-sig") as lines:
            if plain:
                spoken = ((str(number), line.strip()) for number, line in enumerate(lines, start=1))
                sentences = [Sentence(name, text, language=language) for name, text in spoken if text]
            else:
                sentences = [_sentence(record, f"{path}, line {n}") for n, record in read_json_lines(path, lines)]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: a gzipped file that is damaged ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file; save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if not sentences:
        raise InputError(f"{path}: holds no sentences")
    return sentences


def _sentence(record: dict, where: str) -> Sentence:
    text = record.get("en") or record.get("text")
    if record.get("id") in (None, "") or not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: a sentence needs 'id', and 'en' or 'text'")
    translations = {language: record[language] for language in _TRANSLATIONS if record.get(language)}
    intent = record.get("intent")
    for name, value in {**translations, "intent": "" if intent is None else intent}.items():
        if not isinstance(value, str):
            raise InputError(f"{where}: {name} is no text: {value!r}")
    translations = {language: value for language, value in translations.items() if value.strip()}
    return Sentence(record["id"], text, translations, intent, _slots(record.get("slots") or [], where))


def _slots(pairs: list[dict[str, str]], where: str) -> dict[str, str]:
    values: dict[str, str] = {}
    try:
        for pair in pairs:
            name, value = pair["type"], str(pair["value"])
            values[name] = f"{values[name]} and {value}" if name in values else value
    except (KeyError, TypeError) as error:
        raise InputError(f"{where}: slots are a list of objects with 'type' and 'value'") from error
    return values
