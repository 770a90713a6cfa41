"""What a server counts, as Prometheus reads it at /metrics: requests, texts, tokens, the queue, seconds."""

import time
from collections.abc import Callable, Collection

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
OTHER = "other"  # routes that are none


class Metrics:
    """The counts of one server; `queued` says how many requests are under way or waiting."""

    def __init__(self, queued: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        of_routes = {"labelnames": ("route",), "registry": self._registry}
        self._requests = Counter(
            "gossamer_requests", "HTTP requests", ("route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "gossamer_request_seconds", "Seconds to the end of an answer", buckets=SECONDS, **of_routes
        )
        self._texts = Counter("gossamer_texts", "Texts or prompts computed", registry=self._registry)
        self._tokens = Counter("gossamer_prompt_tokens", "Their tokens", registry=self._registry)
        self._cut = Counter(
            "gossamer_texts_cut", "Texts that were too long, and lost their ends", registry=self._registry
        )
        self._generated = Counter("gossamer_generated_tokens", "Tokens generated", registry=self._registry)
        queue = Gauge("gossamer_queue", "Requests under way or waiting", registry=self._registry)
        queue.set_function(queued)

    def computed(self, texts: int, tokens: int, generated: int = 0, cut: int = 0) -> None:
        """Count what an answer took; of its texts, `cut` were too long."""
        self._texts.inc(texts)
        self._tokens.inc(tokens)
        self._generated.inc(generated)
        self._cut.inc(cut)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    async def show(self, http: HttpRequest) -> Response:
        """The route."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class Measured:
    """An application whose requests are counted, by those of its routes that are asked with one path."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start = 500, time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            route = scope["path"] if scope["path"] in self._paths else OTHER
            self._metrics.answered(route, status, time.perf_counter() - start)
