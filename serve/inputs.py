"""What a user names, as files: folders, patterns, shots, the microphone; and where the answers about files go."""

from __future__ import annotations

import glob
import io
import math
import os
import re
import select
import sys
import time
import unicodedata
import wave
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn
from uuid import uuid4

from serve.plain_errors import complain
from speechllm.errors import InputError

STDIN = "-"  # as in speechllm.audio, which is not imported for its torch
NO_AUDIO = ""  # in place of a file: what is asked is about text alone, which the instruction holds
# fmt: off
READABLE = frozenset((
    ".wav", ".wave", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".rf64",
    ".w64", ".sph", ".nist", ".voc",
))
# fmt: on
UNREADABLE = frozenset((".m4a", ".aac", ".amr", ".wma"))  # audio, but not for libsndfile
POLL_SECONDS = 0.05


def collect(arguments: Sequence[str]) -> list[str]:
    """The files to answer about, in the order named, each once: where it is named again, it is left out.

    A folder stands for all audio files below it, by their suffixes, in natural order (2.wav before 10.wav); hidden
    ones are left out, as by a shell. Audio that has to be converted first is among them, so that it is told about,
    unless a file of the same name that can be read lies beside it. A pattern (*, **, ?, [...]) that no file is named
    like stands for what it matches. "-" is standard input. Other names are kept as they are, if they exist or not.
    Raises InputError for an empty name, a folder without audio, and a pattern that matches nothing.
    """
    files: dict[tuple[str, str], str] = {}
    real = cache(os.path.realpath)
    for argument in arguments:
        for file in _expanded(argument):
            # Links to folders are followed, those to files are files of their own.
            folder, name = os.path.split(file)
            files.setdefault((STDIN if file == STDIN else real(folder), name), file)
    return list(files.values())


def on_text_alone(instruction: str) -> bool:
    """Whether it is a wording of a task that needs no audio, e.g. "Translate this text to German: Two dogs run."."""
    from speechllm.tasks import find_task  # slow to import, and --help is not to wait

    task = find_task(instruction)
    return task is not None and not task.listens


def unique_names(files: Iterable[str]) -> dict[str, str]:
    """A name for each file: without folders and suffix if no other file has the same.

    Those that have keep their folders (below the one that all files share), and where that does not tell them apart,
    their suffix too; then they are numbered. Names differ by more than case and white space. "-" is named stdin.
    """
    files = list(dict.fromkeys(files))
    paths = {file: Path(os.path.abspath(file)) for file in files if file != STDIN}
    shared = os.path.commonpath([path.parent for path in paths.values()]) if paths else ""

    def name(file: str, detail: int) -> str:
        if file == STDIN:
            return "stdin"
        if detail == 0:
            return Path(file).stem
        path = paths[file].relative_to(shared)
        return (path.with_suffix("") if detail == 1 else path).as_posix()

    details = dict.fromkeys(files, 0)
    names = {file: name(file, 0) for file in files}
    while clashing := [file for file in _clashing(names) if details[file] < 2]:
        for file in clashing:
            details[file] += 1
            names[file] = name(file, details[file])
    clashing = _clashing(names)
    taken = set(map(_folded, names.values())) - {_folded(names[file]) for file in clashing}
    for file in clashing:
        number, first = 1, names[file]
        while _folded(names[file]) in taken:
            number += 1
            names[file] = f"{first}-{number}"
        taken.add(_folded(names[file]))
    return names


def output_paths(files: Iterable[str], folder: str | Path, suffix: str) -> dict[str, Path]:
    """Where to write about each file: in the folder, by its unique name and the suffix (".srt")."""
    return {file: Path(folder, name + suffix) for file, name in unique_names(files).items()}


def write_output(path: Path, text: str) -> None:
    """Writes UTF-8, with the folders it takes: all of it or, with an InputError, nothing. What was there goes."""
    new = path.with_name(f".{uuid4().hex}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # The name of a file need not be UTF-8: standard output has it the same way.
            new.write_bytes(text.encode(errors="backslashreplace"))
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def parse_shot(shot: str) -> tuple[str, str]:
    """A solved example, FILE=ANSWER, as its two halves. Where "=" occurs more than once, the longest name that exists
    is the file's. Raises InputError where there is none, and for an empty answer.
    """
    ends = [place.start() for place in re.finditer("(?<=.)=", shot)]
    if not ends:
        raise InputError(f'shot {shot}: not a file and its answer; write it as FILE=ANSWER, e.g. "a.wav=angry"')
    end = next((end for end in reversed(ends) if os.path.exists(shot[:end])), None)
    if end is None:
        raise InputError(f"shot {shot}: no such file: {shot[: ends[0]]}")
    file, answer = shot[:end], shot[end + 1 :].strip()
    if os.path.isdir(file):
        raise InputError(f"shot {shot}: {file} is a folder; a shot is one file and its answer")
    if not answer:
        raise InputError(f"shot {shot}: has no answer; write it as {file}=ANSWER")
    return file, answer


def record(seconds: float | None = None) -> bytes:
    """The default microphone as a WAV, 16-bit, one channel, at the device's own rate.

    Stops after so many seconds, and before that at Ctrl-C, or at Enter in a terminal that can be waited for (not on
    Windows). Says on standard error when it has begun, and what was lost if anything was.
    Raises InputError without the package `sounddevice`, without a device, and where nothing was recorded.
    """
    if seconds is not None and not (seconds > 0 and math.isfinite(seconds)):
        raise InputError(f"microphone: the seconds to record must be above 0, not {seconds:g}")
    sounddevice = _sounddevice()
    try:
        rate = round(sounddevice.query_devices(kind="input")["default_samplerate"])
    except (sounddevice.PortAudioError, ValueError) as error:
        raise InputError("microphone: no input device was found; connect one, or name a file instead") from error
    wanted = math.inf if seconds is None else 2 * max(1, round(seconds * rate))  # bytes
    pcm = bytearray()
    overflowed = stopped = False

    def keep(data: Any, frames: int, moment: Any, status: Any) -> None:
        nonlocal overflowed
        overflowed = overflowed or bool(status.input_overflow)
        pcm.extend(data)
        if len(pcm) >= wanted:
            raise sounddevice.CallbackStop

    try:
        with sounddevice.RawInputStream(rate, channels=1, dtype="int16", latency="high", callback=keep) as stream:
            complain("microphone: recording; Enter or Ctrl-C stops")
            while stream.active and not stopped:
                stopped = _enter_pressed()
    except KeyboardInterrupt:
        stopped = True
    except sounddevice.PortAudioError as error:
        raise InputError(f"microphone: cannot be used ({error}); see whether another program holds it") from error
    if not pcm:
        raise InputError("microphone: nothing was recorded; see whether it is switched on and allowed")
    if overflowed:
        complain("warning: microphone: some of the audio was lost, this machine was too busy")
    if not stopped and len(pcm) < wanted:
        complain(f"warning: microphone: stopped by itself after {len(pcm) / 2 / rate:.1f} s")
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setnchannels(1)
        wav.setsampwidth(2)
        wav.setframerate(rate)
        wav.writeframes(pcm if seconds is None else pcm[: int(wanted)])
    return file.getvalue()


def _expanded(argument: str) -> list[str]:
    if not argument:
        raise InputError("the name of an audio file is empty; see whether the variable it came from is set")
    if os.path.isdir(argument):
        files = list(_audio_below(argument))
        if not files:
            raise InputError(f"{argument}: no audio file is in this folder or below it; name one by its own name")
        return sorted(files, key=_natural)
    if argument == STDIN or os.path.lexists(argument) or not glob.has_magic(argument):
        return [argument]
    files = []
    for match in glob.glob(argument, recursive=True):
        files += _audio_below(match) if os.path.isdir(match) else [match]
    if not files:
        raise InputError(f"{argument}: no such file, and as a pattern it matches none")
    return sorted(files, key=_natural)


def _audio_below(folder: str) -> Iterator[str]:
    seen: set[str] = set()  # links may lead back
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found = [(*os.path.splitext(name), name) for name in names if not name.startswith(".")]
        readable = {stem for stem, suffix, _ in found if suffix.lower() in READABLE}
        for stem, suffix, name in found:
            if suffix.lower() in READABLE or (suffix.lower() in UNREADABLE and stem not in readable):
                yield os.path.join(parent, name)


def _refuse(error: OSError) -> NoReturn:
    raise InputError(f"{error.filename}: this folder cannot be read ({error.strerror})") from error


def _natural(path: str) -> tuple[list[list[tuple[str, int]]], str]:
    """A key to sort by: folder by folder, numbers by their value, case aside."""
    stem, suffix = os.path.splitext(path)
    pieces = [re.findall(r"(\D*)(\d*)", part.casefold()) for part in (*stem.split(os.sep), suffix)]
    return [[(text, int(digits or -1)) for text, digits in piece] for piece in pieces], path


def _clashing(names: dict[str, str]) -> list[str]:
    """Files that do not have their name to themselves."""
    counts = Counter(map(_folded, names.values()))
    return [file for file, name in names.items() if counts[_folded(name)] > 1]


def _folded(name: str) -> str:
    """Equal for names that some file systems, or RTTM, cannot tell apart."""
    return "_".join(unicodedata.normalize("NFC", name).casefold().split())


def _sounddevice() -> ModuleType:
    try:
        return import_module("sounddevice")
    except ModuleNotFoundError as error:
        raise InputError("microphone: needs one more package: pip install 'speechllm[microphone]'") from error
    except OSError as error:  # the package is there, the library it calls is not
        raise InputError("microphone: needs the library PortAudio, e.g. apt-get install libportaudio2") from error


def _enter_pressed() -> bool:
    """Waits for POLL_SECONDS at most."""
    if os.name == "posix" and sys.stdin.isatty():
        if not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
            return False
        sys.stdin.readline()
        return True
    time.sleep(POLL_SECONDS)
    return False
