"""From an upload and its questions to answers, with the slow part off the event loop."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from starlette.types import Receive

from serve.answer import Answer
from serve.answerer import Answerer, Question
from serve.http.cache import AnswerCache
from serve.http.errors import ApiError, ClientGone
from serve.http.limits import Places, check_length, too_long
from serve.http.metrics import Metrics
from serve.http.settings import ServerSettings
from serve.inputs import NO_AUDIO
from serve.recording import Recording
from speechllm.options import Options

_READERS = min(4, os.cpu_count() or 1)  # recordings held as samples at a time: an hour takes hundreds of megabytes
_PAUSE_SECONDS = 0.01  # between two looks at the texts, which are read anew each time
_LATE_SECONDS = 2.0  # after its time an answer is still waited for: the engine looks at the clock between two steps

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Upload:
    """Audio as it came, or its absence where what is asked is about text alone.

    name: a label for messages and answers. read: gives the file's bytes, in any thread, once; None without audio.
    """

    name: str
    read: Callable[[], bytes] | None


@dataclass(frozen=True)
class Shot:
    """A solved example."""

    upload: Upload
    instruction: str
    answer: str


@dataclass(frozen=True)
class Asked:
    """What one request asks: each of the instructions about the same recording, or on text alone."""

    upload: Upload
    instructions: Sequence[str]
    options: Options
    shots: Sequence[Shot] = ()


class Service:
    """What all requests share."""

    def __init__(self, answerer: Answerer, settings: ServerSettings) -> None:
        """Raises InputError for a cache that cannot be used."""
        self.answerer, self.settings = answerer, settings
        self.places = Places(settings)
        self.metrics = Metrics(answerer, self.places)
        self.models = settings.models or (answerer.checkpoint.settings.name,)
        self.cache = AnswerCache(settings.cache, settings.cache_bytes, answerer) if settings.cache else None
        self.readers = ThreadPoolExecutor(_READERS, "reader")
        self.started = int(time.time())

    def start(self) -> None:
        self.answerer.start()

    def stop(self) -> None:
        self.answerer.stop()
        self.readers.shutdown(cancel_futures=True)
        if self.cache:
            self.cache.close()

    def check_model(self, name: str | None) -> str:
        """The name itself, the first one served for None. Raises ApiError 404."""
        if name is None:
            return self.models[0]
        if name not in self.models:
            served = ", ".join(repr(model) for model in self.models)
            message = f"there is no model {name!r} here, only {served}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    def listen(self, content: bytes, name: str) -> Recording:
        """Slow. Raises InputError for what cannot be read or is too long."""
        limit = self.settings.max_seconds
        check_length(content, name, limit)
        recording = self.answerer.listen(content, name)
        if recording.seconds > limit:
            raise too_long(name, limit)
        self.metrics.listened(recording.seconds)
        return recording


class _Sound:
    """An upload, read and listened to at most once, and only when needed."""

    def __init__(self, service: Service, upload: Upload) -> None:
        self._service, self._upload = service, upload

    @cached_property
    def content(self) -> bytes:
        assert self._upload.read
        return self._upload.read()

    @cached_property
    def recording(self) -> Recording:
        if self._upload.read is None:
            return self._service.answerer.listen(NO_AUDIO, self._upload.name)
        return self._service.listen(self.content, self._upload.name)

    @cached_property
    def key(self) -> str:
        if self._upload.read is None:
            return self.recording.key
        cache = self._service.cache
        assert cache
        known = cache.recording(self.content)
        if known is None:
            known = self.recording.key
            cache.put_recording(self.content, known)
        return known


class Exchange:
    """One request's questions, from the upload to the answers. Its methods are for the event loop.

    Whoever makes one closes it: what is not answered by then is cancelled.
    """

    def __init__(self, service: Service, asked: Asked) -> None:
        """Raises ApiError when more is asked at once than there is room for."""
        self._places = len(asked.instructions) - 1  # the gate has taken one for the request
        service.places.take(self._places, held=1)
        self._service, self._asked = service, asked
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._closed = threading.Event()
        self._seconds = service.settings.request_timeout
        self._deadline = time.monotonic() + self._seconds
        self._keys: list[str | None] = []
        self._results: list[Question | Answer] = []  # Answer: one that was kept

    def close(self) -> None:
        if not self._closed.is_set():
            self._service.places.give_back(self._places)
        self._closed.set()
        self._cancel()

    def _cancel(self) -> None:
        for result in self._results:
            if isinstance(result, Question) and not result.done:
                result.cancel()

    async def pose(self) -> None:
        """Read, listen, and put the questions to the engine. Raises InputError, and ApiError 504 when time is up."""
        work = self._loop.run_in_executor(self._service.readers, self._pose)
        try:
            await asyncio.wait_for(work, self._left())
        except asyncio.TimeoutError:
            raise self._late() from None

    async def answers(self) -> list[Answer]:
        """Of each instruction. Raises ApiError: 504 for an answer cut by the time limit, 503 for one cut by a fault."""
        while not self._done:
            await self._change()
        answers = []
        for key, result in zip(self._keys, self._results, strict=True):
            if isinstance(result, Answer):
                answers.append(result)
                continue
            answer = result.answer()
            self._service.metrics.generated(answer)
            if answer.finish_reason == "timeout":
                raise self._late()
            if answer.finish_reason == "cancelled":
                raise ApiError(503, "the server stopped before this was answered", code="cancelled")
            if key is not None:
                assert self._service.cache
                await asyncio.to_thread(self._service.cache.put, key, answer)
            answers.append(answer)
        return answers

    async def deltas(self) -> AsyncIterator[tuple[int, str]]:
        """(number of the instruction, what its answer's text has grown by), until all are there.

        Nothing is told before it is certain: of beams the best may change, and an answer may be withheld.
        """
        options = self._asked.options
        certain = options.beams == 1 and options.min_confidence == 0
        told = [""] * len(self._asked.instructions)
        while True:
            done = self._done
            if certain or done:
                for number, result in enumerate(self._results):
                    text = result.answer().text if isinstance(result, Question) and result.done else result.text
                    if len(text) > len(told[number]) and text.startswith(told[number]):
                        yield number, text[len(told[number]) :]
                        told[number] = text
            if done:
                return
            await self._change()
            await asyncio.sleep(_PAUSE_SECONDS)

    @property
    def _done(self) -> bool:
        return all(isinstance(result, Answer) or result.done for result in self._results)

    async def _change(self) -> None:
        """Wait for the engine to tell of something new."""
        try:
            await asyncio.wait_for(self._changed.wait(), self._left() + _LATE_SECONDS)
        except asyncio.TimeoutError:
            raise self._late() from None
        self._changed.clear()

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _late(self) -> ApiError:
        return ApiError(504, f"not answered within {self._seconds:g} seconds; send less at once", code="timeout")

    def _on_change(self, question: Question) -> None:
        """In the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            self._loop.call_soon_threadsafe(self._changed.set)

    def _pose(self) -> None:
        """In a reader's thread. What it finds out it leaves in `_keys` and `_results`."""
        service, asked = self._service, self._asked
        if self._closed.is_set():
            return
        if not service.answerer.alive:
            raise ApiError(503, "the engine has stopped, and nothing can be answered", code="engine_stopped")
        sounds = {upload: _Sound(service, upload) for upload in (asked.upload, *(shot.upload for shot in asked.shots))}
        sound = sounds[asked.upload]
        keys: list[str | None] = [None] * len(asked.instructions)
        found: list[Answer | None] = [None] * len(asked.instructions)
        if service.cache:
            shown = [(sounds[shot.upload].key, shot.instruction, shot.answer) for shot in asked.shots]
            for number, instruction in enumerate(asked.instructions):
                key = keys[number] = service.cache.key(sound.key, instruction, shown, asked.options)
                if key is not None:
                    found[number] = service.cache.get(key, asked.upload.name)
                    service.metrics.looked_up(found[number] is not None)
        self._keys = keys
        answerer = service.answerer
        posed: list[Question] = []
        if None in found:
            new = [instruction for instruction, answer in zip(asked.instructions, found, strict=True) if answer is None]
            shots = [answerer.shot(sounds[s.upload].recording, s.instruction, s.answer) for s in asked.shots]
            options = replace(asked.options, timeout=max(0.001, self._left()))
            posed = answerer.pose_all(sound.recording, new, shots, options, self._on_change)
        self._results += [answer or posed.pop(0) for answer in found]
        if self._closed.is_set():
            self._cancel()  # the client went meanwhile


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns. Raises ClientGone, having cancelled it, when the client goes first."""
    doing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGone
        return doing.result()
    finally:
        doing.cancel()
        gone.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
