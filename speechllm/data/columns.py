"""Which column of a user's table is what."""

from __future__ import annotations

import re
from dataclasses import dataclass

from speechllm.data.languages import language_code
from speechllm.data.sources import Source
from speechllm.errors import InputError

# What is known of an utterance -> the names its column goes by, the likeliest first.
NAMES: dict[str, tuple[str, ...]] = {
    "audio": (
        *("audio", "path", "file", "wav", "file_name", "filename", "file_path", "filepath"),
        *("audio_path", "audio_file", "audio_filepath", "audio_filename", "wav_path", "wav_file"),
    ),
    "id": ("id", "utt_id", "utterance_id"),
    "start": ("start", "start_time", "start_seconds", "offset"),
    "end": ("end", "end_time", "end_seconds"),
    "duration": ("duration", "duration_seconds"),
    "text": ("text", "sentence", "transcription", "transcript"),
    "speaker": ("speaker", "speaker_id", "client_id", "speaker_name", "spk", "spk_id"),
    "gender": ("gender", "sex"),
    "language": ("language", "locale", "lang"),
    "intent": ("intent", "intent_class", "intent_name", "intent_label"),
    "emotion": ("emotion", "emotion_name", "emotion_label"),
    "split": ("split",),
    "segments": ("segments",),
    "slots": ("slots",),
    "translations": ("translations", "translation"),
}
# What the audio tells itself, and no task asks for.
AUDIO_FACTS = frozenset(
    (
        *NAMES["duration"],
        *("duration_ms", "audio_duration", "clip_duration", "audio_length", "length_ms", "num_seconds"),
        *("sample_rate", "sampling_rate", "samplerate", "num_samples", "n_samples", "num_frames", "n_frames"),
        *("channels", "num_channels", "n_channels", "bit_depth", "bits_per_sample", "bitrate", "file_size"),
    )
)
_TRANSLATION = re.compile(r"translations?[_.:]+(.+)")


@dataclass(frozen=True)
class Columns:
    """Which column is what. known: a key of NAMES -> column. translations: language -> column. labels: label -> column.

    unused: what is left out; facts: what is left out as the audio itself tells it.
    """

    known: dict[str, str]
    translations: dict[str, str]
    labels: dict[str, str]
    unused: tuple[str, ...]
    facts: tuple[str, ...]


def parse_columns(words: str) -> dict[str, str]:
    """ "audio=path,text=sentence" -> what is known: its column; an empty column means that none is to be used."""
    given: dict[str, str] = {}
    for pair in filter(None, (part.strip() for part in words.split(","))):
        name, equals, column = (part.strip() for part in pair.partition("="))
        if not equals or not name:
            raise InputError(f"--columns {pair}: write it as NAME=COLUMN, for instance text=sentence")
        name = "translations" if name == "translation" else name
        if name in given:
            raise InputError(f"--columns: {name} is given twice")
        given[name] = column
    return given


def _plain(column: str) -> str:
    return re.sub(r"[ -]", "_", column.strip().lower())


def _translated(name: str) -> str | None:
    """The language of a column named translation_de, translation.German …; None for any other."""
    match = _TRANSLATION.fullmatch(_plain(name))
    try:
        return language_code(match[1]) if match else None
    except InputError:
        return None


def _dropped(source: Source, given: dict[str, str]) -> set[str]:
    """The columns that go by the names of what is not to be used. InputError when there is no such column."""
    columns: set[str] = set()
    for name in (name for name, column in given.items() if not column):
        words = NAMES.get(name, (_plain(name),))
        found = {column for column in source.columns if _plain(column) in words}
        if not found and name not in NAMES:
            there = ", ".join(source.columns) or "none"
            raise InputError(f"--columns {name}=: no column {name} in {source.name} to leave out; there are: {there}")
        columns |= found
    return columns


def find_columns(source: Source, given: dict[str, str]) -> Columns:
    """The columns as `given`, else by common names; audio by its type first. Others become labels, but facts of audio.

    Raises InputError, naming the columns there are, when a column given is not there or no audio is found.
    """
    there = ", ".join(source.columns) or "none"
    for name, column in given.items():
        if column and column not in source.columns:
            raise InputError(f"--columns {name}={column}: no such column in {source.name}; there are: {there}")
    used = {name: column for name, column in given.items() if column}
    known = {name: column for name, column in used.items() if name in NAMES}
    translations = {language: column for name, column in used.items() if (language := _translated(name))}
    labels = {name: column for name, column in used.items() if name not in NAMES and not _translated(name)}
    dropped = _dropped(source, given) - set(used.values())
    taken = dropped | set(used.values())
    by_name = {_plain(column): column for column in reversed(source.columns)}
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
    if "duration" in known and ("start" not in known or "end" in known):  # else it tells where an excerpt ends
        if "duration" in used:
            raise InputError(
                "--columns duration=: tells the end of an excerpt that has a start and no end; leave it out"
            )
        taken.discard(known.pop("duration"))
    paths = {by_name.get(word) for word in NAMES["audio"]}  # other names of the same files
    left = [column for column in source.columns if column not in taken]
    facts = tuple(column for column in left if _plain(column) in AUDIO_FACTS)
    unused = tuple(column for column in left if not column or column in paths or column in source.audio)
    for column in left:
        if column in facts or column in unused:
            continue
        language = _translated(column)
        if language is None:
            labels[column] = column
        elif translations.setdefault(language, column) != column:
            raise InputError(
                f"{source.name}: {translations[language]!r} and {column!r} are both translations to {language}: "
                f"leave one out by --columns {column}="
            )
    in_order = [column for column in source.columns if column in unused or column in dropped]
    return Columns(known, translations, labels, tuple(in_order), facts)
