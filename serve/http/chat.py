"""`/v1/chat/completions`: a conversation about recordings or text. Turns answered already are shots for the last."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator
from starlette.responses import JSONResponse, Response

from serve.answer import Answer
from serve.http.errors import EVENTS, RESPONSES, ApiError
from serve.http.options import MAX_TEXT, AskFields
from serve.http.service import Asked, Exchange, Service, Shot, Upload, while_connected
from serve.http.stream import DONE, Event, EventStream
from serve.inputs import on_text_alone
from speechllm.errors import InputError

# OpenAI has four reasons. An answer cut, for whatever cause, is one of "length"; one withheld is filtered.
FINISH_REASONS = {"length": "length", "repetition": "length", "abstained": "content_filter"}
_CONFIG = ConfigDict(extra="forbid")
Text = Annotated[str, Field(max_length=MAX_TEXT)]


class TextPart(BaseModel):
    model_config = _CONFIG
    type: Literal["text"]
    text: Text


class InputAudio(BaseModel):
    model_config = _CONFIG
    data: str = Field(description="a file's bytes in base64; neither a path nor an address is ever opened")
    format: str = Field(pattern="^[a-z0-9]{1,8}$", description="wav, flac, ogg, opus, mp3; a label: the bytes tell it")


class AudioPart(BaseModel):
    model_config = _CONFIG
    type: Literal["input_audio"]
    input_audio: InputAudio


MAX_PARTS = 1000
Part = Annotated[TextPart | AudioPart, Field(discriminator="type")]


class Message(BaseModel):
    model_config = _CONFIG
    role: Literal["user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("text")] | Annotated[list[Part], Field(max_length=MAX_PARTS), Tag("parts")],
        Discriminator(lambda content: "text" if isinstance(content, str) else "parts"),
    ]
    name: str | None = None
    refusal: None = None

    @field_validator("role", mode="before")
    @classmethod
    def _no_system(cls, role: Any) -> Any:
        if role in ("system", "developer"):
            raise ValueError("this model takes no system message; say what to do in the user's turn")
        return role

    def text(self) -> str:
        parts = [self.content] if isinstance(self.content, str) else [p.text for p in self.content if p.type == "text"]
        return " ".join(part for part in parts if part.strip())

    def audio(self) -> list[InputAudio]:
        parts = [] if isinstance(self.content, str) else self.content
        return [part.input_audio for part in parts if isinstance(part, AudioPart)]


class StreamOptions(BaseModel):
    model_config = _CONFIG
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(AskFields):
    """OpenAI's fields. Of those that ask for what this model has not, only the values that ask for nothing pass."""

    messages: list[Message] = Field(min_length=1, max_length=200)
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(None, ge=1, description="longest answer about one piece of audio")
    max_tokens: int | None = Field(None, ge=1, description="the same by its former name")
    labels: list[Text] = Field([], max_length=1000, description="the answers there are to choose from; not OpenAI's")
    n: Literal[1] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    modalities: list[Literal["text"]] | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, given: Any) -> Any:
        """Clients that send all fields there are send null, false, [] or {} for the others, and the usual format."""
        if not isinstance(given, dict):
            return given
        usual = {"response_format": {"type": "text"}}
        return {
            name: value
            for name, value in given.items()
            if name in cls.model_fields or (value and value != usual.get(name))
        }

    @field_validator("logprobs", "top_logprobs")
    @classmethod
    def _no_logprobs(cls, value: bool | int | None) -> bool | int | None:
        if value:
            raise ValueError("not told by this server; each answer has a `confidence`, and so has each of its words")
        return value

    def asked(self) -> Asked:
        """The last turn, those before it as shots; a turn without audio is about the latest one given.

        Before any is given, turns on text alone may be asked: those whose task needs none.

        Raises ApiError for turns out of order, audio missing or not in base64, and InputError for the options.
        """
        upload: Upload | None = None
        texts: list[str] = []
        turns: list[Shot] = []
        asked = True  # something about the latest audio
        for number, message in enumerate(self.messages):
            where = f"messages.{number}"
            for audio in message.audio():
                if message.role == "assistant":
                    raise ApiError(400, f"{where}: an answer is text, it has no audio", param=where)
                if not asked:
                    raise ApiError(400, f"{where}: one recording a turn; nothing is asked about another", param=where)
                upload, asked = Upload(f"{where} ({audio.format})", partial(_decoded, audio.data, where)), False
            if message.role == "user":
                texts.append(message.text())
            if message.role == "assistant" or number == len(self.messages) - 1:
                heard, instruction = _turn(upload, texts, where)
                turns.append(Shot(heard, instruction, message.text()))
                texts, asked = [], True
        if self.messages[-1].role != "user":
            raise ApiError(400, f"{where}: the last turn must be the user's: it is the one answered", param=where)
        *shots, question = turns
        max_tokens = self.max_completion_tokens or self.max_tokens
        options = self.options(max_tokens=max_tokens, labels=tuple(self.labels))
        return Asked(question.upload, [question.instruction], options, shots)


_REPLIES: dict[int | str, dict[str, Any]] = RESPONSES | {
    200: {
        "description": "A completion as OpenAI's; all that is known of the answer is in `answer`",
        "content": {
            "application/json": {"schema": {"type": "object", "required": ["id", "choices", "usage", "answer"]}},
            "text/event-stream": EVENTS,
        },
    }
}


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/chat", tags=["chat"])

    @router.post("/completions", responses=_REPLIES, response_class=Response)
    async def completions(body: ChatRequest, request: Request) -> Response:
        """What the user's last turn asks, about a recording or on text alone."""
        model = service.check_model(body.model)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        exchange = Exchange(service, body.asked())
        try:
            await while_connected(request.receive, exchange.pose())
            if body.stream:
                usage = body.stream_options is not None and body.stream_options.include_usage
                return EventStream(exchange, _chunks(exchange, head | {"object": "chat.completion.chunk"}, usage))
            (answer,) = await while_connected(request.receive, exchange.answers())
        except BaseException:
            exchange.close()
            raise
        exchange.close()
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": _finish_reason(answer), "logprobs": None}
        end = {"choices": [choice], "usage": _usage(answer), "answer": answer.to_dict()}
        return JSONResponse(head | {"object": "chat.completion"} | end)

    return router


async def _chunks(exchange: Exchange, head: dict[str, Any], usage: bool) -> AsyncIterator[Event]:
    blank = {"usage": None} if usage else {}

    def chunk(delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return head | {"choices": [choice]} | blank | more

    yield chunk({"role": "assistant", "content": ""})
    async for _, delta in exchange.deltas():
        yield chunk({"content": delta})
    (answer,) = await exchange.answers()
    yield chunk({}, _finish_reason(answer), answer=answer.to_dict())
    if usage:
        yield head | {"choices": [], "usage": _usage(answer)}
    yield DONE


def _turn(upload: Upload | None, texts: Sequence[str], where: str) -> tuple[Upload, str]:
    """What a turn is about and what it asks. Raises ApiError when either is missing."""
    instruction = " ".join(filter(None, texts))
    if upload is None and on_text_alone(instruction):
        return Upload(where, None), instruction
    if upload is None:
        raise ApiError(400, f"{where}: no audio came before it; add a part of type input_audio", param=where)
    if not instruction:
        example = "a part of type text, e.g. 'Transcribe this audio'"
        raise ApiError(400, f"{where}: nothing is asked; add {example}", param=where)
    return upload, instruction


def _decoded(data: str, where: str) -> bytes:
    """Raises InputError for what is not base64."""
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise InputError(f"{where}: the audio is not base64 ({error})") from error


def _finish_reason(answer: Answer) -> str:
    return FINISH_REASONS.get(answer.finish_reason, "stop")


def _usage(answer: Answer) -> dict[str, Any]:
    total = answer.tokens_in + answer.tokens_out
    return {"prompt_tokens": answer.tokens_in, "completion_tokens": answer.tokens_out, "total_tokens": total}
