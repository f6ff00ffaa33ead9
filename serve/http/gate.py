"""What every request passes before a route sees it: the key, a place in the queue, the size and pace of its body."""

from __future__ import annotations

import hashlib
import hmac
import time

import anyio
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http.errors import ApiError, reply
from serve.http.limits import Places
from serve.http.metrics import Metrics
from serve.http.settings import ServerSettings

OPEN = ("/", "/health")  # what needs no key; and the page, which asks its user for one
PAGE = "/page/"
_LINGER_SECONDS = 1.0
_STALL_SECONDS = 30.0


class Gate:
    """ASGI middleware. Plain, for a body must be refused before it is read and a client's leaving must reach routes."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, places: Places, metrics: Metrics) -> None:
        self._app, self._settings, self._places, self._metrics = app, settings, places, metrics
        self._keys = [_digest(key) for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._settings, self._places)
        started = time.perf_counter()
        place = 0
        try:
            try:
                self._check_key(scope)
                exchange.check_size()
                if scope["method"] == "POST":  # every route that answers questions
                    self._places.take(1)
                    place = 1
            except HTTPException as error:
                await reply(error)(scope, exchange.receive, exchange.send)
            else:
                await self._app(scope, exchange.receive, exchange.send)
        finally:
            self._places.give_back(place)
            self._places.let_go(exchange.held)
            self._metrics.observe(scope, exchange.status, time.perf_counter() - started)

    def _check_key(self, scope: Scope) -> None:
        if not self._keys or scope["path"] in OPEN or scope["path"].startswith(PAGE):
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # all keys are compared, each in constant time: how long it takes tells nothing
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "a key is needed, as the header 'Authorization: Bearer KEY'; none or a wrong one came",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


class _Exchange:
    """A request's `receive` and `send`, watched: the bytes in, how long they take, and the status sent back."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, settings: ServerSettings, places: Places) -> None:
        self._receive, self._send, self._places = receive, send, places
        self._length = Headers(scope=scope).get("content-length", "0")
        self._limit = settings.max_upload_bytes
        self._seconds = settings.request_timeout
        self._deadline = time.monotonic() + settings.request_timeout
        self.held = 0  # bytes of the body
        self._whole = scope["method"] in ("GET", "HEAD")  # the body is here, to its end
        self.status = 500  # until another one is sent

    def check_size(self) -> None:
        """Raises ApiError when the request announces more than is taken."""
        if self._length.isdecimal() and int(self._length) > self._limit:
            raise self._too_large()

    async def receive(self) -> Message:
        """Raises ApiError: 413 for one byte too many, 429 for too many of all, 408 for a body that takes too long."""
        if self._whole:
            return await self._receive()
        with anyio.move_on_after(max(0.0, self._deadline - time.monotonic())):
            message = await self._receive()
            self._note(message)
            size = len(message.get("body", b""))
            if self.held + size > self._limit:
                raise self._too_large()
            self._places.hold(size)
            self.held += size
            return message
        raise ApiError(408, f"the request's body was not here within {self._seconds:g} seconds")

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if not self._whole:  # whatever else comes in is no next request
                message["headers"] = [*message["headers"], (b"connection", b"close")]
        elif not self._whole and not message.get("more_body", False):
            # A connection closed on a client that still sends is reset, and it may never read why: first let it finish.
            await self._put({**message, "more_body": True})
            with anyio.move_on_after(_LINGER_SECONDS):
                while not self._whole:
                    self._note(await self._receive())
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._put(message)

    async def _put(self, message: Message) -> None:
        """Raises TimeoutError for a client that has stopped reading: it would hold its place for ever."""
        with anyio.fail_after(_STALL_SECONDS):
            await self._send(message)

    def _note(self, message: Message) -> None:
        self._whole = message["type"] == "http.disconnect" or not message.get("more_body", False)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than the {self._limit} bytes this server takes")


def _digest(key: str) -> bytes:
    """Of equal length for all keys."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
