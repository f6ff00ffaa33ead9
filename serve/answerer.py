"""Files and instructions in, answers out: a recording is listened to once, and any number of questions asked of it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from textwrap import shorten

import torch

from serve.answer import Answer, Failure, SpanAnswer, assemble, moved
from serve.engine import Backend, BackendError, Engine, Job, Request
from serve.inputs import NO_AUDIO
from serve.kernel import Quantization
from serve.recording import Recording, Span, listen, no_audio
from speechllm.checkpoint import Checkpoint
from speechllm.errors import InputError
from speechllm.grammar import Grammars
from speechllm.options import GREEDY, Options
from speechllm.prompt import Example, answer_parts, render
from speechllm.tasks import TASKS, Task, find_task, normalize_instruction
from speechllm.tasks.answer import parts_of
from speechllm.tasks.labels import Choice

_IDLE_SECONDS = 0.5  # the engine's thread looks so often whether it is to stop
_FAILURES = 3  # in a row, after which the engine's thread ends


class Question:
    """An instruction about a recording, being answered. Can be read and cancelled from any thread."""

    def __init__(self, answerer: Answerer, recording: Recording, instruction: str, options: Options):
        self.recording, self.instruction, self.options = recording, instruction, options
        self.task = TASKS[options.task] if options.task else find_task(instruction)
        self._answerer = answerer
        self._jobs: list[tuple[Span, Job]] = []
        self._texts: list[str] = []  # of the first spans, whose answers are whole
        self._answer: Answer | None = None

    @property
    def done(self) -> bool:
        """Whether :meth:`answer` is there."""
        return all(job.finish for _, job in self._jobs)

    @property
    def text(self) -> str:
        """The answer so far, in the order of the recording, without an end that the next id may change: white space,
        half a character. Once it is done, see :meth:`answer`.
        """
        checkpoint, reader = self._answerer.checkpoint, self._answerer.reader(self.task, self.options)
        texts = list(self._texts)
        for span, job in self._jobs[len(texts) :]:
            finish = job.finish  # read first: what is read after it is then the whole
            parts = answer_parts(job.best.ids, checkpoint.vocabulary, checkpoint.text)
            texts.append(reader.read(moved(parts, span.start)).text)
            if not finish:
                texts[-1] = texts[-1].rstrip("\ufffd").rstrip()
                break
            self._texts = list(texts)
        return " ".join(filter(None, texts))

    def cancel(self) -> None:
        """Stop; the answer is then what is there."""
        for _, job in self._jobs:
            job.cancel()

    def answer(self) -> Answer:
        """The answer, once it is done. Raises what went wrong in the engine."""
        assert self.done
        for _, job in self._jobs:
            if job.error is not None:
                raise job.error
        if self._answer is None:
            self._answer = self._assembled()
        return self._answer

    def _assembled(self) -> Answer:
        jobs = [job for _, job in self._jobs]
        return assemble(
            self._answerer.checkpoint,
            self.recording,
            self.instruction,
            self.task,
            self._answerer.reader(self.task, self.options),
            [
                SpanAnswer(span, len(job.request.prompt), job.best, job.finish or "cancelled", heard=job.queued > 0)
                for span, job in self._jobs
            ],
            self.options.min_confidence,
            {
                "queue": max((job.queued for job in jobs), default=0.0),
                "first": min((job.first for job in jobs if job.first), default=0.0),
                "generate": max((job.last for job in jobs), default=0.0),
            },
        )


class Answerer:
    """Answers questions about recordings with one checkpoint, up to ``batch_size`` pieces of them at once.

    backend: what decodes, if not an engine here; ``quantize`` is then not used.

    Raises:
        InputError: a batch size below 1, or the model cannot be served, see :class:`serve.decoder.Decoder`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        batch_size: int = 16,
        quantize: Quantization | None = None,
        backend: Backend | None = None,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"the batch size must be 1 or more, not {batch_size}")
        self.checkpoint = checkpoint
        self.quantize = quantize
        self._batch_size = batch_size
        self._engine = backend or Engine(checkpoint.lm, checkpoint.vocabulary.end, batch_size, quantize)
        self.served_by = self._engine.name
        self._grammars = Grammars(checkpoint.vocabulary, checkpoint.text)
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    @property
    def positions(self) -> int:
        """The longest prompt and answer together, in ids."""
        return self._engine.positions

    @property
    def waiting(self) -> int:
        """Pieces of recordings that have no place in the batch yet."""
        return self._engine.waiting

    @property
    def running(self) -> int:
        """Pieces of recordings being answered."""
        return self._engine.running

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def listen(self, source: str | Path | bytes, name: str | None = None) -> Recording:
        """Read, cut and encode a file ("-": standard input), or the contents of one. From any thread.

        NO_AUDIO gives what questions on text alone are asked about. Raises InputError when it cannot be read.
        """
        if source == NO_AUDIO:
            return no_audio(self.checkpoint, name or NO_AUDIO)
        return listen(
            self.checkpoint, source, name or ("the audio given" if isinstance(source, bytes) else str(source))
        )

    def shot(self, recording: Recording, instruction: str, answer: str, task: Task | None = None) -> Example:
        """A solved example to put before a question.

        task: that of the answer; without it, the one that the instruction asks for. Where its answers hold marks,
        those in the text become marks, see :func:`parts_of`; anywhere else text stays text.
        Raises InputError for a recording of no speech, or longer than the model hears at once, and for what looks like
        a mark and is none.
        """
        limit = self.checkpoint.settings.max_audio_seconds
        if len(recording.spans) != 1 or recording.spans[0].seconds > limit:
            raise InputError(f"{recording.name}: as an example it must hold speech, and {limit:g} s of audio at most")
        instruction = normalize_instruction(instruction)
        task = task or find_task(instruction)
        try:
            read = parts_of(answer) if task is not None and task.marks else answer
        except InputError as error:
            raise InputError(f"{recording.name}: its answer cannot be used: {error}") from error
        return Example(recording.spans[0].codes, instruction, read)

    def reader(self, task: Task | None, options: Options) -> Task:
        """What reads the answers to an instruction; as plain text where it is none that the model knows."""
        if options.labels:
            return Choice("choice", "accuracy", (), (), labels=options.labels)
        known = task is not None and (task.name in self.checkpoint.settings.tasks or task.name == options.task)
        return task if task is not None and known else TASKS["transcribe"]

    def pose(
        self,
        recording: Recording,
        instruction: str,
        shots: Sequence[Example] = (),
        options: Options = GREEDY,
        on_change: Callable[[Question], None] | None = None,
    ) -> Question:
        """Ask something about a recording, see :meth:`pose_all`."""
        return self.pose_all(recording, [instruction], shots, options, on_change)[0]

    def pose_all(
        self,
        recording: Recording,
        instructions: Sequence[str],
        shots: Sequence[Example] = (),
        options: Options = GREEDY,
        on_change: Callable[[Question], None] | None = None,
    ) -> list[Question]:
        """Ask several things about a recording, or none where one of them cannot be asked. They are answered by the
        engine's thread, or by :meth:`drive`.

        on_change: called in that thread whenever there is more of the answer, and when it is done; never for a
        recording of no speech, which is done at once.
        Raises InputError for an instruction, shots or options that cannot be used, BackendError when the engine's
        thread has ended by an error.
        """
        if self._thread is not None and not self._thread.is_alive():
            raise BackendError("the engine has stopped: restart the server")
        questions = [self._prepare(recording, one, shots, options, on_change) for one in instructions]
        # all that is asked about a span at once: the engine has then not yet forgotten it
        for jobs in zip(*(question._jobs for question in questions), strict=True):
            for _, job in jobs:
                self._engine.submit(job)
        return questions

    def _prepare(
        self,
        recording: Recording,
        instruction: str,
        shots: Sequence[Example],
        options: Options,
        on_change: Callable[[Question], None] | None = None,
    ) -> Question:
        question = Question(self, recording, normalize_instruction(instruction), options)
        if recording.seconds and question.task and not question.task.listens and not options.labels:
            raise InputError(f"{shorten(instruction, 60)!r} is about the text it holds: ask it without a recording")
        told = (lambda: on_change(question)) if on_change else None
        for span in recording.spans:
            job = self._engine.prepare(self._request(span, question, shots), told)
            question._jobs.append((span, job))
        return question

    def ask(
        self,
        files: Sequence[str],
        instructions: str | Sequence[str],
        shots: Sequence[Example] = (),
        options: Options = GREEDY,
    ) -> Iterator[Answer | Failure]:
        """For each file an answer to each instruction, in the order given, as soon as it and those before it are there.

        files: paths, "-" for standard input, or NO_AUDIO for instructions on text alone. One that cannot be answered
        gives one Failure; the others are answered. No more than one file's audio is held in memory at a time.
        Raises InputError for instructions, shots or options that cannot be used, before any file is read.
        """
        asked = [instructions] if isinstance(instructions, str) else list(instructions)
        blank = no_audio(self.checkpoint, NO_AUDIO)
        for instruction in asked:
            self._prepare(blank, instruction, shots, options)
        return self._answers(files, asked, shots, options)

    def _answers(
        self, files: Sequence[str], instructions: Sequence[str], shots: Sequence[Example], options: Options
    ) -> Iterator[Answer | Failure]:
        asked: deque[Question | Failure] = deque()  # and not yet given back
        try:
            for file in files:
                try:
                    recording = self.listen(file)
                    asked += self.pose_all(recording, instructions, shots, options)
                except InputError as error:
                    asked.append(Failure.of(file, error))
                while self.waiting + self.running >= self._batch_size:
                    self.drive()
                yield from _finished(asked)
            while asked:
                self.drive()
                yield from _finished(asked)
        finally:  # nobody waits for the rest
            for one in asked:
                if isinstance(one, Question):
                    one.cancel()
            self.drive()

    def drive(self) -> None:
        """Let the engine do a step, or wait a moment for its thread."""
        if self.alive:
            self._stopping.wait(0.001)
        else:
            self._engine.step()

    def start(self) -> None:
        """Answer questions in a thread of the engine's own, until :meth:`stop`."""
        assert self._thread is None
        self._stopping.clear()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the engine's thread; questions that are not answered are cancelled."""
        assert self._thread is not None
        self._stopping.set()
        self._thread.join()
        self._thread = None
        self._engine.cancel_all()

    def _serve(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            if self._engine.wait(_IDLE_SECONDS):
                try:
                    self._engine.step()
                    failures = 0
                except Exception:  # its questions have been told
                    failures += 1
                    if failures == _FAILURES:
                        raise
                    logging.exception("a step of the engine failed; it goes on with the next questions")

    def _request(self, span: Span, question: Question, shots: Sequence[Example]) -> Request:
        checkpoint, options = self.checkpoint, question.options
        example = Example(span.codes, question.instruction)
        before = render(shots[-1], checkpoint.vocabulary, checkpoint.text, shots[:-1]).ids if shots else torch.empty(0)
        prompt = render(example, checkpoint.vocabulary, checkpoint.text, shots).ids
        heard = len(before) + 2 + len(checkpoint.vocabulary.audio_ids(span.codes))  # and the marks around it
        reader = self.reader(question.task, options)
        return Request(
            prompt=prompt,
            grammar=self._grammars.of(reader, span.seconds),
            max_tokens=checkpoint.settings.max_answer_tokens,
            options=options,
            shared=tuple(filter(None, (len(before), heard))),
        )


def _finished(asked: deque[Question | Failure]) -> Iterator[Answer | Failure]:
    """Takes from the left what is answered, up to the first question that is not."""
    while asked and (isinstance(asked[0], Failure) or asked[0].done):
        first = asked.popleft()
        yield first if isinstance(first, Failure) else first.answer()
