"""What every server of a model has: its routes' frame, its name, its errors, what tells of it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from gossamer.errors import ConfigError
from gossamer.server.metrics import Measured, Metrics
from gossamer.server.wire import RequestError, error_body
from gossamer.server.worker import Asked, Worker

SOON_S = 0.25
CLIENT_CLOSED_REQUEST = 499  # nobody reads it: the client has gone


class Served:
    """One model behind HTTP, with the one name of it that it answers to; a subclass has the `routes`."""

    not_served: Sequence[str] = ()
    """Routes of other kinds of models, and `serves`, the sentence that their answer is."""
    serves = ""

    def __init__(self, worker: Worker, name: str, allowed_origins: Sequence[str]) -> None:
        """`allowed_origins`: web pages that browsers let in."""
        self._worker, self._name, self._allowed_origins = worker, name, allowed_origins
        self._created, self._metrics = int(time.time()), Metrics(lambda: worker.num_requests)

    def routes(self) -> list[Route]:
        """Those of this kind of model alone."""
        raise NotImplementedError

    def app(self, on_ready: Callable[[], None]) -> Starlette:
        """The ASGI application; `on_ready` is called once, when requests and signals are taken."""

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            on_ready()
            yield

        routes = [
            *self._own_routes(),
            *(Route(path, self.refuse, methods=["POST"]) for path in self.not_served),
        ]
        handlers = {
            RequestError: _refuse,
            ConfigError: _refuse_config,
            HTTPException: self._refuse_http,
            Exception: _fail,
        }
        measured = Middleware(Measured, metrics=self._metrics, paths=[route.path for route in routes])
        cors = Middleware(
            CORSMiddleware, allow_origins=self._allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
        return Starlette(
            routes=routes,
            exception_handlers=handlers,
            lifespan=lifespan,
            middleware=[measured, *([cors] if self._allowed_origins else [])],
        )

    def _own_routes(self) -> list[Route]:
        return [
            *self.routes(),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self._metrics.show, methods=["GET"]),
        ]

    async def models(self, http: HttpRequest) -> Response:
        return as_json({"object": "list", "data": [self._description()]})

    async def model(self, http: HttpRequest) -> Response:
        self._check_name(http.path_params["name"])
        return as_json(self._description())

    async def health(self, http: HttpRequest) -> Response:
        if self._worker.alive:
            return as_json({"status": "ok", "requests": self._worker.num_requests})
        return as_json({"status": "the engine has stopped"}, HTTPStatus.SERVICE_UNAVAILABLE)

    async def refuse(self, http: HttpRequest) -> Response:
        message = f"{http.url.path} is not served here: {self._name!r} is {self.serves}."
        raise RequestError(message, code="not_served", status=HTTPStatus.NOT_FOUND)

    async def _refuse_http(self, http: HttpRequest, error: Exception) -> Response:
        """What the framework refuses; of a path that is none, which ones there are."""
        assert isinstance(error, HTTPException)
        message = f"{http.method} {http.url.path}: {error.detail}"
        if error.status_code == HTTPStatus.NOT_FOUND:
            message += f". This server has {', '.join(route.path for route in self._own_routes())}."
        return as_json(error_body(message, kind="invalid_request_error"), error.status_code)

    def _description(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "created": self._created, "owned_by": "gossamer"}

    def _check_name(self, name: str) -> None:
        if name != self._name:
            raise RequestError(
                f"the model {name!r} does not exist here; this server serves {self._name!r}.",
                param="model",
                code="model_not_found",
                status=HTTPStatus.NOT_FOUND,
            )

    async def _finished(self, http: HttpRequest, requests: Sequence[Asked[Any]]) -> bool:
        """Wait for all requests; False when the client went away first (they are dropped).

        Who goes away within `SOON_S` is not noticed before that: most answers are there by then.
        """
        work = asyncio.ensure_future(self._drain(requests))
        gone = None
        try:
            if not (await asyncio.wait({work}, timeout=SOON_S))[0]:
                gone = asyncio.ensure_future(_disconnect(http))
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
            return work.done()
        finally:
            work.cancel()
            if gone is not None:
                gone.cancel()

    async def _drain(self, requests: Sequence[Asked[Any]]) -> None:
        async with aclosing(self._worker.pieces(requests)) as pieces:
            async for _ in pieces:
                pass


async def _disconnect(http: HttpRequest) -> None:
    """Return when the client has closed the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def as_json(body: Any, status: int = HTTPStatus.OK) -> Response:
    return Response(msgspec.json.encode(body), status_code=status, media_type="application/json")


async def _refuse(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    kind = "invalid_request_error" if error.status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    return as_json(error_body(str(error), kind=kind, param=error.param, code=error.code), error.status)


async def _refuse_config(http: HttpRequest, error: Exception) -> Response:
    return as_json(error_body(str(error), kind="invalid_request_error"), HTTPStatus.BAD_REQUEST)


async def _fail(http: HttpRequest, error: Exception) -> Response:
    body = error_body("the server failed; its own log says why.", kind="server_error")
    return as_json(body, HTTPStatus.INTERNAL_SERVER_ERROR)
