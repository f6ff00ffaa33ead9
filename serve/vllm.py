"""A vLLM server in the engine's place: prompts and answers travel as ids.

What vLLM serves is the language model as `speechllm export` writes it; audio, prompts and the reading of answers stay
here.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace

import torch

from serve.engine import Job, Request, check_room
from serve.search import Finish, make_search
from serve.vllm_client import Lost, VllmClient
from speechllm.errors import InputError

_TRIES = 3  # in a row, without an id from any
_PAUSE_SECONDS = 0.5  # before the second try, twice as long before the third
_LOOK_SECONDS = 0.02  # between two looks at whether a job is to stop


class VllmBackend:
    """Answers requests as :class:`serve.engine.Engine` does, by asking a vLLM server for each, ``concurrency`` at once.

    Grammars hold in full. vLLM is told what is allowed once a request; where that changes, after a piece of a label or
    a mark of time, it is asked anew with the answer so far, which its prefix cache knows. A broken connection is taken
    up again in the same way. Plain text is one request.

    Other than the engine's: there are no beams; draws at a temperature are vLLM's own, and their probabilities are
    those they were drawn with, so that such answers seem surer. Jobs change in a thread of the backend's.

    url: of the server, ``http://HOST:PORT``. model: the name it serves the model by. vocabulary_size: ids there are.
    positions: the longest prompt and answer together, where the server does not allow for less.

    Raises:
        InputError: the address is none.
        BackendError: the server cannot be reached, serves another model, or was started without what is needed here.
    """

    def __init__(
        self,
        url: str,
        model: str,
        end_id: int,
        vocabulary_size: int,
        positions: int,
        concurrency: int = 64,
        api_key: str | None = None,
    ) -> None:
        self.name = f"vLLM {model}"
        self._client, self._end_id = VllmClient(url, model, end_id, api_key), end_id
        self._row = torch.full((1, vocabulary_size), -torch.inf)
        self._waiting: set[Job] = set()
        self._running: set[Job] = set()
        self._work = threading.Condition()
        self._places = asyncio.Semaphore(concurrency)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True).start()
        check = asyncio.run_coroutine_threadsafe(self._client.check(vocabulary_size), self._loop)
        self._positions = min(positions, check.result())

    @property
    def positions(self) -> int:
        """The longest prompt and answer together, in ids."""
        return self._positions

    @property
    def waiting(self) -> int:
        """Requests that were not sent yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests being answered."""
        return len(self._running)

    def prepare(self, request: Request, on_change: Callable[[], None] | None = None) -> Job:
        """The job of a request, to be submitted.

        on_change: called by the backend's thread when the job has a new id, and when it ends.

        Raises:
            InputError: prompt and answer exceed the positions there are, or beams are asked for.
        """
        if request.options.beams > 1:
            raise InputError("beams: vLLM keeps a single hypothesis; leave beams out, or answer without vLLM")
        # the search has no choice: ids come chosen
        search = make_search(
            request.grammar, self._end_id, request.max_tokens, replace(request.options, temperature=0.0, top_p=1.0)
        )
        check_room(request, search, self._positions)
        return Job(request, search, on_change)

    def submit(self, job: Job) -> None:
        """Put a job in line; it is answered whether :meth:`step` is called or not."""
        with self._work:
            self._waiting.add(job)
            self._work.notify_all()
        asyncio.run_coroutine_threadsafe(self._run(job), self._loop)

    def wait(self, seconds: float) -> bool:
        """Wait for a request, at most so long; whether there is anything to do."""
        with self._work:
            return self._work.wait_for(lambda: bool(self._waiting or self._running), seconds)

    def step(self) -> bool:
        """Wait a moment for answers; whether any are still to come."""
        with self._work:
            if self._waiting or self._running:
                self._work.wait(_LOOK_SECONDS)
            return bool(self._waiting or self._running)

    def cancel_all(self) -> None:
        """End all jobs, with what is there."""
        with self._work:
            for job in (*self._waiting, *self._running):
                job.cancel()
            self._work.wait_for(lambda: not (self._waiting or self._running))

    async def _run(self, job: Job) -> None:
        """From a job's submission to its end."""
        work = asyncio.ensure_future(self._answer(job))
        finish: Finish = "cancelled"
        error: BaseException | None = None
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=_LOOK_SECONDS)
                if stopped := job._stopped():
                    finish = stopped
                    work.cancel()  # closes the connection: vLLM then drops the request
                    break
            await work
        except asyncio.CancelledError:
            pass
        except BaseException as failure:
            error = failure
        try:
            if not job.finish:
                job._finish(finish, error)
        finally:
            with self._work:
                self._waiting.discard(job)
                self._running.discard(job)
                self._work.notify_all()

    async def _answer(self, job: Job) -> None:
        async with self._places:
            job.queued = job.age
            with self._work:
                self._waiting.discard(job)
                self._running.add(job)
            tries = 0
            while not job._search.finish:
                known = len(job._search.best.ids)
                try:
                    await self._go_on(job)
                except Lost as error:
                    tries = 1 if len(job._search.best.ids) > known else tries + 1
                    if tries == _TRIES:
                        raise self._client.failed(f"broke off an answer, {tries} times in a row ({error})") from error
                    await asyncio.sleep(_PAUSE_SECONDS * tries)
                else:
                    tries = 0

    async def _go_on(self, job: Job) -> None:
        """Take ids for as long as what is allowed stays the same."""
        search, grammar = job._search, job.request.grammar
        (mask,) = search.allowed()
        allowed: list[int] = mask.nonzero().flatten().tolist()
        if len(allowed) == 1:
            self._take(job, allowed[0], 0.0)
            return
        ids = search.best.ids
        one = allowed[0] if allowed[0] != self._end_id else allowed[1]
        changes = grammar.allowed(grammar.next(search.best.state, one)) is not mask  # as a rule, any other does as well
        room = 1 if changes else search.max_tokens - len(ids)
        prompt, options = [*job.request.prompt.tolist(), *ids], job.request.options
        stream = self._client.stream(prompt, mask, room, options, len(ids))
        async with aclosing(stream):
            async for index, log_prob in stream:
                if not (0 <= index < len(mask) and mask[index]):
                    raise self._client.failed(
                        f"gave the id {index}, which was not allowed: is it vLLM, with the right model?"
                    )
                self._take(job, index, log_prob)
                room -= 1
                over = search.finish or search.allowed()[0] is not mask
                if over and room and index != self._end_id:  # else it ends by itself, and the connection stays
                    return

    def _take(self, job: Job, index: int, log_prob: float) -> None:
        """Have the search choose this id."""
        self._row[0, index] = log_prob
        job._search.advance(self._row)
        self._row[0, index] = -torch.inf
        job._changed()
