"""Server-sent events, for as long as somebody listens."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.http.errors import ClientGone, envelope, fault, from_input_error
from serve.http.service import Exchange, while_connected
from speechllm.errors import InputError

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies shall pass events on as they come
DONE = "[DONE]"

Event = dict[str, Any] | str


class EventStream(Response):
    """Events about one exchange, which is closed at their end, also when the client goes before.

    An error after the first event can have no status any more: it comes as an event, as OpenAI's clients expect it.
    """

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange, events: AsyncIterator[Event]) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._exchange, self._events = exchange, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._tell(send))
        except (ClientGone, TimeoutError):
            pass  # nobody is there to be told
        finally:
            self._exchange.close()

    async def _tell(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in _errors_told(self._events):
            await send({"type": "http.response.body", "body": _encoded(event), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _errors_told(events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    try:
        async for event in events:
            yield event
    except HTTPException as error:
        yield envelope(error)
    except InputError as error:
        yield envelope(from_input_error(error))
    except Exception:
        logging.getLogger("uvicorn.error").exception("a stream failed")
        yield envelope(fault())


def _encoded(event: Event) -> bytes:
    data = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
    return f"data: {data}\n\n".encode()
