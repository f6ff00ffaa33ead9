"""Our own answers, from a real server: ``speechllm serve`` is started, asked over HTTP, and stopped."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, TypeVar

import httpx
import soundfile

from speechllm.data.manifest import audio_bytes
from speechllm.errors import InputError
from speechllm.tasks import ParsedAnswer, Segment, Task
from speechllm.tasks.answer import parts_of
from train.questions import Advance, Question
from train.results import OURS

AT_ONCE = 16  # requests; what the server answers in one batch
RATE = 16000  # Hz, of clips that are sent with noise
TIMEOUT = 3600.0  # seconds for one answer, on a machine that is busy with other work
STOPPING = 20.0  # seconds
Asked = TypeVar("Asked")
Told = TypeVar("Told")


class Server:
    """``speechllm serve`` with one checkpoint: started when it is first asked, stopped when the ``with`` block ends.

    SIGTERM ends the block like Ctrl-C, with KeyboardInterrupt: no server is left behind.
    Whatever is asked raises InputError where it does not start, or ends before it is told to.
    """

    name = OURS

    def __init__(self, model: Path, adapter: str | None = None, beams: int = 1) -> None:
        self._command = [sys.executable, "-m", "serve.cli", "serve", "--model", str(model), "--port", "0"]
        self._command += ["--timeout", str(TIMEOUT)] + ([] if adapter is None else ["--adapter", adapter])
        self._beams = beams  # of each answer
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None
        self.url = ""

    def __enter__(self) -> Server:
        self._handler = signal.signal(signal.SIGTERM, _interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        signal.signal(signal.SIGTERM, self._handler)

    def answer(self, questions: Sequence[Question], task: Task, advance: Advance) -> list[ParsedAnswer]:
        """One answer a question, in order, read back by the task. Raises InputError."""
        return [parsed(task, answer) for answer in self.ask(questions, advance)]

    def ask(self, questions: Sequence[Question], advance: Advance) -> list[dict[str, Any]]:
        """All that the server tells of each answer (serve.answer.Answer), in order. Raises InputError."""
        return self._at_once(self._about_clip, questions, advance)

    def ask_text(self, instructions: Sequence[str]) -> list[str]:
        """The answers to instructions on text alone, in order. Raises InputError."""
        return self._at_once(self._on_text, instructions, lambda count: None)

    def _at_once(
        self, ask: Callable[[httpx.Client, Asked], Told], questions: Sequence[Asked], advance: Advance
    ) -> list[Told]:
        self._start()
        limits = httpx.Limits(max_connections=AT_ONCE)
        with httpx.Client(timeout=TIMEOUT, limits=limits, trust_env=False) as client:
            pool = ThreadPoolExecutor(AT_ONCE)
            try:
                asked = [pool.submit(ask, client, question) for question in questions]
                for done in as_completed(asked):
                    done.result()  # the first failure ends it all
                    advance(1)
                return [done.result() for done in asked]
            finally:
                pool.shutdown(cancel_futures=True)

    def _about_clip(self, client: httpx.Client, question: Question) -> dict[str, Any]:
        utterance = question.item.utterance
        fields = {"instruction": question.instruction, "response_format": "json", "beams": str(self._beams)}
        fields |= {"task": question.task} if question.task else {}
        file = {"file": (Path(utterance.audio).name, sent(question))}
        reply = self._reply(client, utterance.id, "audio/transcriptions", data=fields, files=file)
        answer: dict[str, Any] = reply["answers"][0]
        return answer

    def _on_text(self, client: httpx.Client, instruction: str) -> str:
        body = {"messages": [{"role": "user", "content": instruction}], "beams": self._beams}
        reply = self._reply(client, repr(instruction), "chat/completions", json=body)
        text: str = reply["choices"][0]["message"]["content"]
        return text

    def _reply(self, client: httpx.Client, about: str, endpoint: str, **body: Any) -> dict[str, Any]:
        try:
            reply = client.post(f"{self.url}/v1/{endpoint}", **body)
        except httpx.HTTPError as error:
            if self._exited():
                raise self._ended() from error
            raise InputError(f"speechllm serve: {about}: no answer ({error!r})") from error
        if reply.status_code != 200:
            try:
                message = reply.json()["error"]["message"]
            except (ValueError, KeyError, TypeError):
                message = f"status {reply.status_code}"
            raise InputError(f"speechllm serve: {about}: {message}")
        told: dict[str, Any] = reply.json()
        return told

    def _start(self) -> None:
        if self._process is not None:
            return
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # closed below
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=self._errors, text=True)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("listening on "):
                self.url = line.split()[-1]
                break
        else:
            raise self._ended()
        threading.Thread(target=self._process.stdout.read, daemon=True).start()  # a full pipe would stop it
        while True:
            try:
                httpx.get(f"{self.url}/health", trust_env=False, timeout=TIMEOUT).raise_for_status()
                return
            except httpx.HTTPError:
                if self._exited(0.1):
                    raise self._ended() from None

    def _exited(self, seconds: float = 2.0) -> bool:
        """Whether it is over with the server; one that is just dying is given a moment."""
        assert self._process is not None
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _ended(self) -> InputError:
        assert self._process is not None
        assert self._errors is not None
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["it says nothing"]
        return InputError(f"speechllm serve ended with code {code}: {lines[-1].removeprefix('error: ')}")

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOPPING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        assert self._errors is not None
        self._process.stdout.close()
        self._errors.close()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def sent(question: Question) -> bytes:
    """The audio file that is asked about: as it is, or with its noise as 16-bit WAV. Raises InputError."""
    if question.noise is None:
        return audio_bytes(question.item.utterance, question.item.root)
    file = io.BytesIO()
    soundfile.write(file, question.wav(RATE)[0].numpy(), RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()


def parsed(task: Task, answer: dict[str, Any]) -> ParsedAnswer:
    """An answer of the server as the task reads it. answer: see serve.answer.Answer."""
    text = answer["text"]
    if not task.marks:
        return task.read((text,) if text else ())
    segments = tuple(Segment(**segment) for segment in answer["segments"])
    try:
        faults = task.read(parts_of(text)).faults
    except InputError as error:  # words that look like marks
        faults = (str(error),)
    return ParsedAnswer(text, segments, faults=faults)
