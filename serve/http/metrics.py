"""What a running server tells Prometheus."""

from __future__ import annotations

from functools import partial

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
        counter = partial(Counter, namespace="speechllm", registry=self._registry)
        gauge = partial(Gauge, namespace="speechllm", registry=self._registry)
        self._requests = counter("requests", "Requests by route and status", ("route", "status"))
        self._seconds = Histogram(
            "request_seconds",
            "Time to the last byte",
            ("route",),
            namespace="speechllm",
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._audio = counter("audio_seconds", "Audio listened to")
        self._tokens_in = counter("tokens_in", "Ids of prompts")
        self._tokens_out = counter("tokens_out", "Ids generated")
        self._answers = counter("answers", "Answers generated, by finish reason", ("finish_reason",))
        self._cache = counter("cache_lookups", "Questions looked up among those answered before", ("result",))
        gauge("questions", "Questions taken on and not yet answered").set_function(lambda: places.taken)
        gauge("queue", "Pieces of audio waiting for a place in the batch").set_function(lambda: answerer.waiting)
        gauge("running", "Pieces of audio being answered").set_function(lambda: answerer.running)
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
