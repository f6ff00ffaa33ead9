"""`/v1/audio/transcriptions` and `/v1/audio/translations`: a recording, and what to do with it."""

from __future__ import annotations

import math
import zlib
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Request, UploadFile
from pydantic import AliasChoices, Field
from starlette.responses import JSONResponse, PlainTextResponse, Response

from serve.answer import Answer
from serve.formats import Format, write
from serve.http.errors import EVENTS, RESPONSES, ApiError
from serve.http.options import MAX_TEXT, AskFields
from serve.http.service import Asked, Exchange, Service, Upload, while_connected
from serve.http.stream import EventStream
from speechllm.tasks import TASKS, Segment
from speechllm.tasks.labels import LANGUAGES

TRANSCRIBE, TRANSLATE = "Transcribe this audio", "Translate this audio to English"
UNKNOWN_LANGUAGE = "unknown"
MAX_ALSO = 32
MAX_NAME = 200
MAX_FIELDS = 1100
Text = Annotated[str, Field(max_length=MAX_TEXT)]


class AudioForm(AskFields):
    """OpenAI's fields, and `instruction` and `also` for anything else one may want to know about a recording."""

    file: UploadFile = Field(description="wav, flac, ogg, opus or mp3; its name is a label and never opened")
    language: str | None = Field(
        None, pattern="^[A-Za-z]{2,3}$", description="ISO 639 code of what is spoken: told in verbose_json, else unused"
    )
    prompt: str | None = Field(None, max_length=MAX_TEXT, description="refused: this model continues no text")
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"
    timestamp_granularities: list[Literal["word", "segment"]] = Field(
        [], validation_alias=AliasChoices("timestamp_granularities[]", "timestamp_granularities")
    )
    instruction: str | None = Field(None, max_length=MAX_TEXT, description="what to do, in plain words; not OpenAI's")
    also: list[Text] = Field(
        [],
        max_length=MAX_ALSO,
        validation_alias=AliasChoices("also", "also[]"),
        description="more to ask about the same recording, answered in `answers`; not OpenAI's",
    )
    max_tokens: int | None = Field(None, ge=1, description="longest answer about one piece of audio; not OpenAI's")
    labels: list[Text] = Field(
        [],
        max_length=1000,
        validation_alias=AliasChoices("labels", "labels[]"),
        description="the answers there are to choose from; not OpenAI's",
    )
    task: Text | None = Field(
        None, description="name of the task whose answers are wanted, whatever the words; not OpenAI's"
    )

    def check(self) -> None:
        """Raises ApiError 400 for what no answer could do justice to."""
        if self.prompt:
            raise ApiError(400, "prompt: this model continues no text; say what to do in `instruction`", param="prompt")
        if self.also and (self.labels or self.task):
            raise ApiError(400, "also: labels, or a task, are for one question; ask the others alone", param="also")
        if self.response_format not in ("json", "verbose_json"):
            if self.also:
                raise ApiError(400, f"also: {self.response_format} has room for one answer; use json", param="also")
            if self.stream:
                raise ApiError(400, "stream: answers are streamed as json only", param="stream")
        if self.timestamp_granularities and self.response_format != "verbose_json":
            raise ApiError(
                400,
                "timestamp_granularities: only response_format verbose_json has times",
                param="timestamp_granularities",
            )

    def asked(self, instruction: str) -> Asked:
        """Raises InputError for options at odds with one another."""
        name = "".join(c if c.isprintable() else " " for c in self.file.filename or "")[:MAX_NAME].strip()
        upload = Upload(name or "the audio given", self.file.file.read)
        options = self.options(max_tokens=self.max_tokens, labels=tuple(self.labels), task=self.task)
        return Asked(upload, [self.instruction or instruction, *self.also], options)


FormBody = Annotated[AudioForm, Form(media_type="multipart/form-data")]
_REPLIES: dict[int | str, dict[str, Any]] = RESPONSES | {
    200: {
        "description": "`text` answers the instruction; `answers` holds all that is known of it and of each `also`",
        "content": {
            "application/json": {"schema": {"type": "object", "required": ["text", "answers"]}},
            "text/plain": {"schema": {"type": "string"}},
            "text/event-stream": EVENTS,
        },
    }
}


def routes(service: Service) -> APIRouter:
    """The two of them, which differ in what they ask unless told."""
    router = APIRouter(
        prefix="/v1/audio",
        tags=["audio"],
        form_limits={"max_files": 1, "max_fields": MAX_FIELDS, "max_part_size": 4 * MAX_TEXT},
    )

    @router.post("/transcriptions", responses=_REPLIES, response_class=Response)
    async def transcriptions(form: FormBody, request: Request) -> Response:
        """What is said, or what `instruction` asks for."""
        return await _respond(service, form, request, TRANSCRIBE)

    @router.post("/translations", responses=_REPLIES, response_class=Response)
    async def translations(form: FormBody, request: Request) -> Response:
        """What is said, in English."""
        return await _respond(service, form, request, TRANSLATE)

    return router


async def _respond(service: Service, form: AudioForm, request: Request, instruction: str) -> Response:
    service.check_model(form.model)
    form.check()
    exchange = Exchange(service, form.asked(instruction))
    try:
        await while_connected(request.receive, exchange.pose())
        if form.stream:
            return EventStream(exchange, _events(exchange))
        answers = await while_connected(request.receive, exchange.answers())
    except BaseException:
        exchange.close()
        raise
    exchange.close()
    return _document(form, answers)


def _document(form: AudioForm, answers: Sequence[Answer]) -> Response:
    first = answers[0]
    if form.response_format == "json":
        return JSONResponse(_json(answers) | {"usage": _tokens(answers)})
    if form.response_format == "verbose_json":
        return JSONResponse(_verbose(form, answers))
    return PlainTextResponse(write(first, Format(form.response_format)))


async def _events(exchange: Exchange) -> AsyncIterator[dict[str, Any]]:
    """`index` counts the questions: 0 is the instruction, 1 the first `also`."""
    async for index, delta in exchange.deltas():
        yield {"type": "transcript.text.delta", "delta": delta, "index": index}
    answers = await exchange.answers()
    yield {"type": "transcript.text.done", **_json(answers), "usage": _tokens(answers)}


def _json(answers: Sequence[Answer]) -> dict[str, Any]:
    first = answers[0].to_dict()
    ours = {name: first[name] for name in ("finish_reason", "confidence", "seconds_in", "seconds_consumed")}
    return {"text": first["text"], **ours, "answers": [answer.to_dict() for answer in answers]}


def _tokens(answers: Sequence[Answer]) -> dict[str, Any]:
    tokens_in, tokens_out = (sum(getattr(a, name) for a in answers) for name in ("tokens_in", "tokens_out"))
    return {
        "type": "tokens",
        "input_tokens": tokens_in,
        "output_tokens": tokens_out,
        "total_tokens": tokens_in + tokens_out,
    }


def _verbose(form: AudioForm, answers: Sequence[Answer]) -> dict[str, Any]:
    first, told = answers[0], answers[0].to_dict()
    target = getattr(TASKS.get(first.task or ""), "target", None)  # of a translation
    code = target or (form.language or "").lower()
    verbose = {
        "task": first.task,
        "language": LANGUAGES.get(code, code or UNKNOWN_LANGUAGE).lower(),  # as Whisper names them: "german"
        "duration": told["seconds_in"],
        **_json(answers),
        "usage": {"type": "duration", "seconds": told["seconds_in"]},
    }
    wanted = form.timestamp_granularities or ["segment"]
    if "segment" in wanted:
        temperature = form.temperature or 0.0
        verbose["segments"] = [_segment(number, s, first, temperature) for number, s in enumerate(first.segments)]
    if "word" in wanted:
        verbose["words"] = [{"word": word.pop("text"), **word} for word in told["words"]]
    return verbose


def _segment(number: int, segment: Segment, answer: Answer, temperature: float) -> dict[str, Any]:
    """As Whisper's. There is none where nobody speaks, hence its `no_speech_prob`; ids of text are not told."""
    text = segment.text.encode()
    ids = 1 + answer.tokens_out / max(1, len(answer.segments))  # of a segment, and its end
    return {
        "id": number,
        "seek": round(100 * segment.start),
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "tokens": [],
        "temperature": temperature,
        "avg_logprob": math.log(max(answer.confidence, 1e-9)) / ids,  # the same for all segments
        "compression_ratio": len(text) / len(zlib.compress(text)),
        "no_speech_prob": 0.0,
        "speaker": segment.speaker,
    }
