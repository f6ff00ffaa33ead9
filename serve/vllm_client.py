"""One vLLM server over HTTP: ids in, ids out, each with its log-probability.

Run with vLLM 0.32.0 on a CPU, not on a GPU. Of its `/v1/completions` these fields are used beside OpenAI's:
`allowed_token_ids`, `stop_token_ids`, `return_token_ids` and `return_tokens_as_token_ids` (vLLM 0.10.2 and later).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import httpx
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from serve.engine import BackendError
from speechllm.errors import InputError
from speechllm.options import GREEDY, Options

MOST_IDS = 1024  # in a list of ids that vLLM's Model Runner V2 takes
_FORBIDDEN = -100.0  # the lowest bias there is: e^-100 of the probability stays
_BUSY = (429, 502, 503, 504)  # statuses that another try may not meet
_CONNECT_SECONDS, _STALL_SECONDS = 10.0, 120.0  # to be connected; without anything from the server

_Part = TypeVar("_Part", bound=BaseModel)


class Lost(Exception):
    """The connection broke, or the server has no time: the next try may go better."""


class _LogProbs(BaseModel):
    token_logprobs: list[float]


class _Choice(BaseModel):
    token_ids: list[int]
    logprobs: _LogProbs


class _Fault(BaseModel):
    message: str


class _Refusal(BaseModel):
    error: _Fault


class _Event(BaseModel):
    """What a streamed line holds."""

    choices: list[_Choice] = []
    error: _Fault | None = None


class _Model(BaseModel):
    id: str
    max_model_len: int


class _Models(BaseModel):
    data: list[_Model]


class VllmClient:
    """Asks a vLLM server to continue ids, in the event loop that it is first used in.

    url: of the server, ``http://HOST:PORT``. model: the name it serves the model by.

    Raises InputError for an address that is none.
    """

    def __init__(self, url: str, model: str, end_id: int, api_key: str | None = None) -> None:
        self._url, self._model, self._end_id = url.rstrip("/").removesuffix("/v1"), model, end_id
        self._http = httpx.AsyncClient(
            base_url=_checked(self._url) + "/v1/",
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            timeout=httpx.Timeout(_STALL_SECONDS, connect=_CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    async def check(self, vocabulary_size: int) -> int:
        """The longest prompt and answer together that the server allows for, in ids.

        Asks for an id that has to be the last there is: a smaller model, or another server than vLLM, would not give
        it, and told of probabilities before ids are ruled out, it would have less than 1.

        Raises:
            BackendError: the server cannot be reached, serves another model, or was started without what is needed.
        """
        only = torch.arange(vocabulary_size) == vocabulary_size - 1
        try:
            served = await self._served()
            if self._model not in served:
                raise self.failed(
                    f"serves {', '.join(served) or 'nothing'}, not {self._model}: is it the right export?"
                )
            found = [pair async for pair in self.stream([self._end_id], only, 1, GREEDY)]
        except Lost as error:
            raise self.failed(f"cannot be asked ({error}): start vLLM there, or name another address") from error
        if [index for index, _ in found] != [vocabulary_size - 1]:
            raise self.failed("does not keep to the ids that are allowed: is it vLLM, 0.10.2 or later?")
        if found[0][1] < -1e-3:
            raise self.failed("must be started with --logprobs-mode processed_logprobs: confidences need it")
        return served[self._model].max_model_len

    async def stream(
        self, prompt: Sequence[int], allowed: Tensor, max_tokens: int, options: Options, drawn: int = 0
    ) -> AsyncGenerator[tuple[int, float], None]:
        """Ids as they come, the end id too, and their log-probabilities; at least one, at most ``max_tokens``.

        allowed: bool ``[vocabulary]``. drawn: ids that came before, so that none is drawn with the same random numbers.

        Raises:
            Lost: nothing more will come, and the end is not reached.
            BackendError: the request was refused, or the answer is not understood.
        """
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": (options.seed + drawn) % 2**63,
            "stop_token_ids": [self._end_id],
            "stream": True,
            "logprobs": 0,  # that of the id itself
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # there may be no tokenizer to make text of them
            **_constraint(allowed),
        }
        left = max_tokens
        try:
            async with self._http.stream("POST", "completions", json=body) as response:
                await self._check_status(response)
                async for line in _lines(response):
                    kind, _, data = line.partition(b": ")
                    if kind != b"data":
                        continue
                    if data == b"[DONE]":
                        if left == max_tokens:
                            raise Lost("it answered with nothing")
                        return
                    event = self._read(_Event, data)
                    if event.error:
                        raise self.failed(f"refused a request: {event.error.message}")
                    for choice in event.choices:
                        for pair in zip(choice.token_ids, choice.logprobs.token_logprobs, strict=True):
                            if left:
                                left = 0 if pair[0] == self._end_id else left - 1
                                yield pair
                raise Lost("it ended in the middle")
        except httpx.TransportError as error:
            raise Lost(str(error) or type(error).__name__) from error

    def failed(self, what: str) -> BackendError:
        """The error, in one line that names the server."""
        return BackendError(" ".join(f"{self._url}: {what}".split()))

    async def _served(self) -> dict[str, _Model]:
        try:
            response = await self._http.get("models")
            await self._check_status(response)
        except httpx.TransportError as error:
            raise Lost(str(error) or type(error).__name__) from error
        return {model.id: model for model in self._read(_Models, response.content).data}

    async def _check_status(self, response: httpx.Response) -> None:
        if response.status_code == 200:
            return
        if response.status_code in _BUSY:
            raise Lost(f"status {response.status_code}")
        body = await response.aread()
        reason = body[:200].decode("utf-8", "replace")
        with suppress(ValidationError):
            reason = _Refusal.model_validate_json(body).error.message
        raise self.failed(f"refused with status {response.status_code}: {reason}")

    def _read(self, kind: type[_Part], text: bytes) -> _Part:
        try:
            return kind.model_validate_json(text)
        except ValidationError as error:
            raise self.failed(f"does not answer as vLLM does: {text[:80].decode('utf-8', 'replace')}") from error


async def _lines(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """Ended by line feeds alone: a text in JSON may hold other characters that end lines."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line


def _constraint(allowed: Tensor) -> dict[str, Any]:
    """As fields of a request: the ids that are allowed, or those that are not, whichever are fewer."""
    ids, others = (mask.nonzero().flatten().tolist() for mask in (allowed, ~allowed))
    if len(ids) <= len(others):
        return {"allowed_token_ids": ids}
    return {"logit_bias": dict.fromkeys(map(str, others), _FORBIDDEN)}


def _checked(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"vLLM's address must be like http://HOST:PORT, not {url!r}")
    return url
