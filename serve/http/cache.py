"""Answers already given, on disk, by everything they depend on: recording, instruction, shots, options and weights."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diskcache
import torch

from serve.answer import Answer, Word
from serve.answerer import Answerer
from speechllm import __version__
from speechllm.errors import InputError
from speechllm.options import Options
from speechllm.tasks import Segment

REASONS = ("stop", "length", "no_speech")  # of answers that would be the same another time
_FAILURES = (sqlite3.Error, OSError, diskcache.Timeout, ValueError, TypeError, KeyError)


class _PlainDisk(diskcache.Disk):
    """Only text is kept here, and nothing found in the folder is unpickled: that would run whatever it says."""

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        if mode == diskcache.core.MODE_PICKLE:
            raise ValueError("not what was kept here")
        return super().fetch(mode, filename, value, read)


class AnswerCache:
    """For any thread. What is damaged or written by another version is not found, never an error."""

    def __init__(self, folder: Path, max_bytes: int, answerer: Answerer) -> None:
        """Raises InputError when the folder cannot be used."""
        try:
            self._disk = diskcache.Cache(
                str(folder), disk=_PlainDisk, size_limit=max_bytes, eviction_policy="least-recently-used"
            )
        except (sqlite3.Error, OSError) as error:
            raise InputError(f"{folder}: no folder to keep answers in ({error}); delete it or name another") from error
        self._weights = weights_fingerprint(answerer)

    def key(
        self, recording: str, instruction: str, shots: Sequence[tuple[str, str, str]], options: Options
    ) -> str | None:
        """Under what an answer is kept; None for one that is drawn at random.

        recording: key of the recording asked about. shots: of each the key of its recording, instruction and answer.
        """
        if options.temperature > 0:
            return None
        asked = asdict(replace(options, timeout=None))  # an answer that ran out of time is not kept
        return _digest("answer", self._weights, recording, instruction, shots, asked)

    def get(self, key: str, file: str) -> Answer | None:
        """An answer kept, as one about `file`. It took no time."""
        try:
            found = self._disk.get(key)
            return None if found is None else _answer(json.loads(found) | {"file": file, "timings": {}})
        except _FAILURES:
            return None

    def put(self, key: str, answer: Answer) -> None:
        if answer.finish_reason in REASONS:
            self._set(key, json.dumps(asdict(answer)))

    def recording(self, content: bytes) -> str | None:
        """The key of the recording that a file holds, if the file was here before: then it need not be decoded."""
        try:
            found = self._disk.get(self._file(content))
        except _FAILURES:
            return None
        return found if isinstance(found, str) else None

    def put_recording(self, content: bytes, recording: str) -> None:
        self._set(self._file(content), recording)

    def close(self) -> None:
        self._disk.close()

    def _file(self, content: bytes) -> str:
        return _digest("file", self._weights, hashlib.sha256(content).hexdigest())

    def _set(self, key: str, value: str) -> None:
        with suppress(*_FAILURES):  # a full disk, a locked or damaged cache: answers are given all the same
            self._disk.set(key, value)


def weights_fingerprint(answerer: Answerer) -> str:
    """SHA-256 of what answers hang on: version, the checkpoint's settings and weights, how and where it is decoded."""
    checkpoint = answerer.checkpoint
    facts = (__version__, answerer.quantize, answerer.served_by, checkpoint.settings.model_dump(mode="json"))
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, weight in sorted(checkpoint.lm.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _answer(stored: Mapping[str, Any]) -> Answer:
    """Raises TypeError or KeyError for what is no answer."""
    segments = tuple(Segment(**segment) for segment in stored["segments"])
    words = tuple(Word(**word) for word in stored["words"])
    return Answer(**{**stored, "segments": segments, "words": words})


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
