"""Errors as OpenAI's clients expect them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from serve.engine import BackendError
from speechllm.errors import InputError, message_of
from speechllm.options import Options

CLIENT_GONE = 499  # as nginx counts it: nobody is there to read the answer
OPTIONS = {field.name for field in fields(Options)}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The body of every answer with a status of 400 and above."""

    error: ErrorDetail


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "What was sent cannot be used, or not now", "model": ErrorReply},
    "5XX": {"description": "Not answered, by no fault of the request", "model": ErrorReply},
}


EVENTS = {"schema": {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}}  # a stream's


class ApiError(HTTPException):
    """A refusal with a status, told in one line. FastAPI lets it pass wherever it is raised, a body's reading too."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers) if headers else None)
        self.param, self.code = param, code


class ClientGone(Exception):
    """The client closed the connection before it had its answer."""


def busy(message: str) -> ApiError:
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})


def fault() -> ApiError:
    return ApiError(500, "the server failed at this request; its log says where")


def envelope(error: HTTPException) -> dict[str, Any]:
    status = error.status_code
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    param, code = (error.param, error.code) if isinstance(error, ApiError) else (None, None)
    return {"error": {"message": error.detail, "type": kind, "param": param, "code": code}}


def reply(error: HTTPException) -> JSONResponse:
    return JSONResponse(envelope(error), error.status_code, error.headers)


def from_input_error(error: InputError) -> ApiError:
    """The message of an option begins with its name, which is the parameter's, too."""
    if isinstance(error, BackendError):
        return ApiError(502, str(error), code="backend_error")
    first = str(error).partition(" ")[0]
    return ApiError(400, str(error), param=first if first in OPTIONS else None)


def from_validation_error(error: RequestValidationError) -> ApiError:
    """The first problem pydantic saw: ``response_format: Input should be 'json', …``."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"] if part != "body") or None
    what = message_of(problem)
    if problem["type"] == "extra_forbidden":
        what = "no such field, or one that this server does not support"
    elif problem["type"] == "json_invalid":
        where, what = None, f"the body is not JSON: {problem['ctx']['error']}"
    elif "UploadFile" in what:
        what = "must be a file, sent as multipart/form-data with a file name; text is never taken for a path"
    return ApiError(400, f"{where}: {what}" if where else what, param=where)


def add_handlers(app: FastAPI) -> None:
    """Every error of `app` in the envelope, those of its framework and its faults among them."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return reply(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return reply(from_validation_error(error))

    @app.exception_handler(InputError)
    async def unusable(request: Request, error: InputError) -> Response:
        return reply(from_input_error(error))

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return reply(fault())
