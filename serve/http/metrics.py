"""What a running server tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import Scope

from serve.answer import Answer
from serve.answerer import Answerer
from serve.http.limits import Places

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, answerer: Answerer, places: Places) -> None:
        self._registry = CollectorRegistry()
        name = {"namespace": "speechllm", "registry": self._registry}
        self._requests = Counter("requests", "Requests by route and status", ("route", "status"), **name)
        self._seconds = Histogram("request_seconds", "Time to the last byte", ("route",), buckets=_SECONDS, **name)
        self._audio = Counter("audio_seconds", "Audio listened to", **name)
        self._tokens_in = Counter("tokens_in", "Ids of prompts", **name)
        self._tokens_out = Counter("tokens_out", "Ids generated", **name)
        self._answers = Counter("answers", "Answers by finish reason", ("finish_reason",), **name)
        self._cache = Counter("cache_lookups", "Questions looked up among those answered before", ("result",), **name)
        for label, what, value in (
            ("questions", "Questions taken on and not yet answered", lambda: places.taken),
            ("queue", "Pieces of audio waiting for a place in the batch", lambda: answerer.waiting),
            ("running", "Pieces of audio being answered", lambda: answerer.running),
        ):
            Gauge(label, what, **name).set_function(value)
        for result in ("hit", "miss"):
            self._cache.labels(result)

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        """A request has ended. Paths that are no route's are counted together: anybody can make them up."""
        route = getattr(scope.get("route"), "path", "other")
        self._requests.labels(route, status).inc()
        self._seconds.labels(route).observe(seconds)

    def listened(self, seconds: float) -> None:
        self._audio.inc(seconds)

    def generated(self, answer: Answer) -> None:
        self._answers.labels(answer.finish_reason).inc()
        self._tokens_in.inc(answer.tokens_in)
        self._tokens_out.inc(answer.tokens_out)

    def looked_up(self, found: bool) -> None:
        self._cache.labels("hit" if found else "miss").inc()

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)
