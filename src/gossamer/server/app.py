"""The routes: /v1/chat/completions, /v1/completions, /v1/models, /health."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from gossamer.engine import OpenModel, Request
from gossamer.errors import ConfigError
from gossamer.server.answers import Answer, ChatAnswer, CompletionAnswer, Json, usage
from gossamer.server.wire import (
    COMPLETION_MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
    RequestError,
    error_body,
    read_request,
)
from gossamer.server.worker import Worker

NO_CACHE = {"cache-control": "no-cache"}
CLIENT_CLOSED_REQUEST = 499  # nobody reads it: the client has gone


class Api:
    """The handlers, with the model they ask and the one name of it that they answer to."""

    def __init__(
        self,
        model: OpenModel,
        worker: Worker,
        name: str,
        max_tokens: int | None,
        sampling_defaults: Mapping[str, Any],
        allowed_origins: Sequence[str],
    ) -> None:
        """`max_tokens`: of a chat that sets no limit; `allowed_origins`: web pages that browsers let in."""
        self._model, self._worker, self._name = model, worker, name
        self._max_tokens, self._sampling_defaults = max_tokens, sampling_defaults
        self._allowed_origins = allowed_origins
        self._created = int(time.time())

    def app(self, on_ready: Callable[[], None]) -> Starlette:
        """The ASGI application; `on_ready` is called once, when requests and signals are taken."""

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            on_ready()
            yield

        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
        ]
        handlers = {
            RequestError: _refuse,
            ConfigError: _refuse_config,
            HTTPException: _refuse_http,
            Exception: _fail,
        }
        cors = Middleware(
            CORSMiddleware, allow_origins=self._allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
        return Starlette(
            routes=routes,
            exception_handlers=handlers,
            lifespan=lifespan,
            middleware=[cors] if self._allowed_origins else [],
        )

    async def chat(self, http: HttpRequest) -> Response:
        body = read_request(ChatRequest, await http.body())
        self._check_name(body.model)
        params = body.params(self._max_tokens, self._sampling_defaults)

        def prepare() -> list[Request]:
            ids = self._model.tokenizer.chat([message.plain() for message in body.messages], typed=True)
            return [self._model.request(ids, params)]

        answer = ChatAnswer(self._name, self._model.tokenizer)
        return await self._respond(http, body, answer, await run_in_threadpool(prepare))

    async def complete(self, http: HttpRequest) -> Response:
        body = read_request(CompletionRequest, await http.body())
        self._check_name(body.model)
        params = body.params(COMPLETION_MAX_TOKENS, self._sampling_defaults)
        prompts = body.prompts()

        def prepare() -> list[Request]:
            return [self._model.request(prompt, params) for prompt in prompts]

        answer = CompletionAnswer(self._name, self._model.tokenizer)
        return await self._respond(http, body, answer, await run_in_threadpool(prepare))

    async def models(self, http: HttpRequest) -> Response:
        return _json({"object": "list", "data": [self._description()]})

    async def model(self, http: HttpRequest) -> Response:
        self._check_name(http.path_params["name"])
        return _json(self._description())

    async def health(self, http: HttpRequest) -> Response:
        if self._worker.alive:
            return _json({"status": "ok", "requests": self._worker.num_requests})
        return _json({"status": "the engine has stopped"}, HTTPStatus.SERVICE_UNAVAILABLE)

    def _description(self) -> Json:
        return {"id": self._name, "object": "model", "created": self._created, "owned_by": "gossamer"}

    def _check_name(self, name: str) -> None:
        if name != self._name:
            raise RequestError(
                f"the model {name!r} does not exist here; this server serves {self._name!r}.",
                param="model",
                code="model_not_found",
                status=HTTPStatus.NOT_FOUND,
            )

    async def _respond(
        self,
        http: HttpRequest,
        body: ChatRequest | CompletionRequest,
        answer: Answer,
        requests: Sequence[Request],
    ) -> Response:
        if body.stream:
            self._worker.check_room(len(requests))  # while there still is a status to send
            events = self._events(answer, requests, include_usage=body.include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers=NO_CACHE)
        if await self._finished(http, requests):
            return _json(answer.whole([request.result() for request in requests]))
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def _finished(self, http: HttpRequest, requests: Sequence[Request]) -> bool:
        """Wait for all requests; False when the client went away first (they are dropped)."""
        work = asyncio.ensure_future(self._drain(requests))
        gone = asyncio.ensure_future(_disconnect(http))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
            return work.done()
        finally:
            work.cancel()
            gone.cancel()

    async def _drain(self, requests: Sequence[Request]) -> None:
        async with aclosing(self._worker.pieces(requests)) as pieces:
            async for _ in pieces:
                pass

    async def _events(
        self, answer: Answer, requests: Sequence[Request], *, include_usage: bool
    ) -> AsyncIterator[bytes]:
        """Server-sent events; an error after the first byte can only be one of them."""
        no_usage = {"usage": None} if include_usage else {}
        try:
            async with aclosing(self._worker.pieces(requests)) as pieces:
                for chunk in answer.opening():
                    yield _event(chunk | no_usage)
                async for index, piece in pieces:
                    for chunk in answer.chunks(index, piece):
                        yield _event(chunk | no_usage)
            if include_usage:
                yield _event(answer.closing(usage([request.result() for request in requests])))
        except RequestError as error:
            yield _event(error_body(str(error), kind="server_error", code=error.code))
        yield b"data: [DONE]\n\n"


async def _disconnect(http: HttpRequest) -> None:
    """Return when the client has closed the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _json(body: Json, status: int = HTTPStatus.OK) -> Response:
    return Response(msgspec.json.encode(body), status_code=status, media_type="application/json")


def _event(body: Json) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


async def _refuse(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    kind = "invalid_request_error" if error.status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    return _json(error_body(str(error), kind=kind, param=error.param, code=error.code), error.status)


async def _refuse_config(http: HttpRequest, error: Exception) -> Response:
    return _json(error_body(str(error), kind="invalid_request_error"), HTTPStatus.BAD_REQUEST)


async def _refuse_http(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{http.method} {http.url.path}: {error.detail}"
    return _json(error_body(message, kind="invalid_request_error"), error.status_code)


async def _fail(http: HttpRequest, error: Exception) -> Response:
    body = error_body("the server failed; its own log says why.", kind="server_error")
    return _json(body, HTTPStatus.INTERNAL_SERVER_ERROR)
