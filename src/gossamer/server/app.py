"""The routes of a decoder: /v1/chat/completions and /v1/completions, beside those of every model."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from gossamer.engine import Generation, OpenModel, Request
from gossamer.server.answers import Answer, ChatAnswer, CompletionAnswer, Json, usage
from gossamer.server.served import CLIENT_CLOSED_REQUEST, Served, as_json
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
CHAT_ROUTES = ("/v1/chat/completions", "/v1/completions")
ENCODER_ROUTES = (
    "/v1/embeddings", "/v1/rerank", "/v2/rerank", "/v1/classify", "/v1/score", "/embed", "/rerank",
    "/predict", "/score",
)  # fmt: skip


class Api(Served):
    """The handlers, with the model they ask."""

    not_served = ENCODER_ROUTES
    serves = f"a decoder, which continues texts; it has {' and '.join(CHAT_ROUTES)}"

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
        super().__init__(worker, name, allowed_origins)
        self._model, self._max_tokens, self._sampling_defaults = model, max_tokens, sampling_defaults

    def routes(self) -> list[Route]:
        handlers = (self.chat, self.complete)
        return [Route(*it, methods=["POST"]) for it in zip(CHAT_ROUTES, handlers, strict=True)]

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
            return as_json(answer.whole(self._results(requests)))
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    def _results(self, requests: Sequence[Request]) -> list[Generation]:
        """What the finished requests generated, which is counted."""
        results = [request.result() for request in requests]
        generated = sum(len(it.token_ids) for it in results)
        self._metrics.computed(len(results), sum(it.num_prompt_tokens for it in results), generated)
        return results

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
            results = self._results(requests)
            if include_usage:
                yield _event(answer.closing(usage(results)))
        except RequestError as error:
            yield _event(error_body(str(error), kind="server_error", code=error.code))
        yield b"data: [DONE]\n\n"


def _event(body: Json) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
