"""The engine: answers of many prompts decoded together, each joining and leaving the batch when it will.

Between two steps of the batch one waiting prompt is taken in, so that those being answered are not held up for long
(continuous batching, Yu et al. 2022). What prompts begin with in common, shots or a recording that several questions
are about, is computed once and copied (prefix caching).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from serve.decoder import Decoder
from serve.kernel import Quantization
from serve.search import Finish, Hypothesis, Search, make_search
from speechllm.errors import InputError
from speechllm.grammar import Grammar
from speechllm.options import GREEDY, Options

PREFIXES = 8  # kept for prompts to come, the last used


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to be continued.

    prompt: int64 ``[seq]``. grammar: of the answer. max_tokens: the longest answer there can be; options may ask for a
    shorter one. shared: lengths of beginnings of the prompt that other prompts may share.
    """

    prompt: Tensor
    grammar: Grammar
    max_tokens: int
    options: Options = GREEDY
    shared: tuple[int, ...] = ()


class Job:
    """A request on its way. ``best`` is its answer so far, ``finish`` is None until it is whole; read from any thread.

    error: what went wrong in the engine, if anything did; the job has then finished, as cancelled. queued, first, last:
    seconds from its submission to its place in the batch, its first id and its end.
    """

    def __init__(self, request: Request, search: Search, on_change: Callable[[], None] | None):
        self.request = request
        self.best: Hypothesis = search.best
        self.finish: Finish | None = None
        self.error: BaseException | None = None
        self.queued = self.first = self.last = 0.0
        self._search = search
        self._on_change = on_change
        self._submitted = time.monotonic()
        self._cancelled = False
        self._slots: list[int] = []

    def cancel(self) -> None:
        """Stop before the next step, with what is there by then."""
        self._cancelled = True

    @property
    def age(self) -> float:
        """Seconds since its submission."""
        return time.monotonic() - self._submitted

    def _stopped(self) -> Finish | None:
        timeout = self.request.options.timeout
        if self._cancelled:
            return "cancelled"
        return "timeout" if timeout is not None and self.age > timeout else None

    def _changed(self) -> None:
        self.best = self._search.best
        self.first = self.first or self.age
        if self._search.finish:
            self._finish(self._search.finish)
        elif self._on_change:
            self._on_change()

    def _finish(self, finish: Finish, error: BaseException | None = None) -> None:
        self.last, self.error, self.finish = self.age, error, finish
        if self._on_change:
            self._on_change()


class BackendError(InputError):
    """What answers cannot be reached or does not answer as it must: no fault of the question's. One line."""


class Backend(Protocol):
    """What answers requests: the engine here, or a server of the same model somewhere else.

    name: tells one from another whose answers may differ.
    """

    name: str

    @property
    def positions(self) -> int:
        """The longest prompt and answer together, in ids."""

    @property
    def waiting(self) -> int:
        """Requests that have no place in the batch yet."""

    @property
    def running(self) -> int:
        """Requests being answered."""

    def prepare(self, request: Request, on_change: Callable[[], None] | None = None) -> Job:
        """The job of a request, to be submitted; InputError where it cannot be answered."""

    def submit(self, job: Job) -> None:
        """Put a job in line; from any thread."""

    def wait(self, seconds: float) -> bool:
        """Wait for a request, at most so long; whether there is anything to do."""

    def step(self) -> bool:
        """Do some of the work; whether anything is left to do."""

    def cancel_all(self) -> None:
        """End all jobs, with what is there."""


class Engine:
    """One language model here, up to ``batch_size`` hypotheses decoded together.

    Any thread may call any method; one at a time does the work.

    Raises:
        InputError: the model cannot be served, see :class:`Decoder`.
    """

    name = "here"

    def __init__(
        self, lm: PreTrainedModel, end_id: int, batch_size: int = 16, quantization: Quantization | None = None
    ):
        self._decoder = Decoder(lm, batch_size + PREFIXES, quantization)
        self._end_id = end_id
        self._batch_size = batch_size
        self._free = list(range(batch_size))
        self._spare = list(range(batch_size, batch_size + PREFIXES))
        self._prefixes: OrderedDict[bytes, int] = OrderedDict()  # ids of a prefix -> its slot; the last used comes last
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._work = threading.Condition()
        self._stepping = threading.RLock()

    @property
    def positions(self) -> int:
        """The longest prompt and answer together, in ids."""
        return self._decoder.positions

    @property
    def compiled(self) -> bool:
        """Whether the compiled kernel decodes."""
        return self._decoder.compiled

    @property
    def waiting(self) -> int:
        """Requests that have no place in the batch yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests being answered."""
        return len(self._running)

    def prepare(self, request: Request, on_change: Callable[[], None] | None = None) -> Job:
        """The job of a request, to be submitted.

        on_change: called by the stepping thread when the job has a new id, and when it ends.

        Raises:
            InputError: prompt and answer exceed the positions there are, or it asks for more beams than fit the batch.
        """
        search = make_search(request.grammar, self._end_id, request.max_tokens, request.options)
        check_room(request, search, self.positions)
        if search.width > self._batch_size:
            raise InputError(
                f"{search.width} beams do not fit a batch of {self._batch_size}: use fewer, or a larger one"
            )
        return Job(request, search, on_change)

    def submit(self, job: Job) -> None:
        """Put a job in line."""
        with self._work:
            self._waiting.append(job)
            self._work.notify_all()

    def cancel_all(self) -> None:
        """End all jobs, with what is there."""
        with self._stepping:
            self._abandon(None)

    def wait(self, seconds: float) -> bool:
        """Wait for a request, at most so long; whether there is anything to do."""
        with self._work:
            return self._work.wait_for(lambda: bool(self._waiting or self._running), seconds)

    def step(self) -> bool:
        """Take in one waiting request and decode one more id of each; whether anything is left to do.

        Whatever fails ends all jobs with the error before it is raised.
        """
        with self._stepping:
            try:
                self._drop_stopped()
                self._admit()
                self._decode()
            except BaseException as error:
                self._abandon(error)
                raise
        return bool(self._waiting or self._running)

    def _drop_stopped(self) -> None:
        for job in self._running:
            if finish := job._stopped():
                self._leave(job)
                job._finish(finish)
        self._running = [job for job in self._running if not job.finish]
        with self._work:
            stopped = [(job, finish) for job in self._waiting if (finish := job._stopped())]
            for job, _ in stopped:
                self._waiting.remove(job)
        for job, finish in stopped:
            job._finish(finish)

    def _admit(self) -> None:
        with self._work:
            if not self._waiting or self._waiting[0]._search.width > len(self._free):
                return
            job = self._waiting.popleft()
        job.queued = job.age
        job._slots = [self._free.pop() for _ in range(job._search.width)]
        self._running.append(job)  # before anything can fail
        logits = self._prefill(job._slots[0], job.request)
        self._advance(job, _log_probs(logits[None], job._search.allowed()))
        if job.finish:
            self._running.remove(job)

    def _prefill(self, slot: int, request: Request) -> Tensor:
        """Logits ``[vocabulary]`` after the prompt, what is known of it copied."""
        decoder, prompt = self._decoder, request.prompt
        decoder.lengths[slot] = 0
        keys = {length: prompt[:length].numpy().tobytes() for length in sorted(request.shared)}
        for length, key in reversed(keys.items()):
            if key in self._prefixes:
                self._prefixes.move_to_end(key)
                decoder.copy(self._prefixes[key], slot, length)
                break
        for length, key in keys.items():
            start = decoder.lengths[slot]
            if length > start:
                decoder.prefill(slot, prompt[start:length])
                self._prefixes[key] = self._spare.pop() if self._spare else self._prefixes.popitem(last=False)[1]
                decoder.copy(slot, self._prefixes[key])
        return decoder.prefill(slot, prompt[decoder.lengths[slot] :])

    def _decode(self) -> None:
        rows = [
            (slot, hypothesis.ids[-1])
            for job in self._running
            for slot, hypothesis in zip(job._slots, job._search.hypotheses, strict=False)
        ]
        if not rows:
            return
        slots, ids = zip(*rows, strict=True)
        logits = self._decoder.step(slots, ids)
        log_probs = _log_probs(logits, [mask for job in self._running for mask in job._search.allowed()])
        start = 0
        for job in self._running:
            count = len(job._search.hypotheses)
            self._advance(job, log_probs[start : start + count])
            start += count
        self._running = [job for job in self._running if not job.finish]

    def _advance(self, job: Job, log_probs: Tensor) -> None:
        parents = job._search.advance(log_probs)
        if len(job._slots) > 1:
            self._rearrange(job, parents)
        if job._search.finish:
            self._leave(job)
        job._changed()

    def _rearrange(self, job: Job, parents: list[int]) -> None:
        """Slots in the order of the hypotheses: the first to continue another takes its slot, others get a copy."""
        unused = [slot for number, slot in enumerate(job._slots) if number not in parents]
        taken: list[int] = []
        for parent in parents:
            slot = job._slots[parent]
            if slot in taken:
                slot = unused.pop(0)
                self._decoder.copy(job._slots[parent], slot)
            taken.append(slot)
        job._slots = taken + unused

    def _leave(self, job: Job) -> None:
        self._free += job._slots
        job._slots = []

    def _abandon(self, error: BaseException | None) -> None:
        with self._work:
            jobs = [job for job in (*self._running, *self._waiting) if not job.finish]
            self._running.clear()
            self._waiting.clear()
        if error:  # what was being copied is not to be trusted
            self._spare += self._prefixes.values()
            self._prefixes.clear()
        for job in jobs:
            self._leave(job)
            job._finish("cancelled", error)


def check_room(request: Request, search: Search, positions: int) -> None:
    """Raises InputError where prompt and longest answer together exceed the positions there are."""
    room = positions - search.max_tokens
    if len(request.prompt) > room:
        raise InputError(
            f"a prompt of {len(request.prompt)} ids exceeds the {room} the model has room for: "
            f"{positions} less {search.max_tokens} for the answer. Use fewer or shorter shots, a shorter instruction "
            "or a shorter answer"
        )


def _log_probs(logits: Tensor, allowed: list[Tensor]) -> Tensor:
    """``[rows, vocabulary]``, natural, of what is allowed; -inf elsewhere."""
    mask = allowed[0][None] if all(one is allowed[0] for one in allowed) else torch.stack(allowed)
    return logits.masked_fill(~mask.to(logits.device), -torch.inf).log_softmax(-1)
