"""The routes of an encoder: vectors, labels and ranks of texts, as three APIs ask for them.

OpenAI's /v1/embeddings; vLLM's /v1/classify and /v1/score, also at /score; Cohere's and Jina's /v1/rerank,
also at /v2/rerank and /rerank; and text-embeddings-inference's /embed, /rerank (with `texts`), /predict and
/info, whose errors have a shape of their own; / is the one of them that the model is for. What a model's head
is not for answers 404.

Token ids in the place of a text are those of the model's own tokenizer, its special tokens among them.
LangChain's OpenAIEmbeddings sends ids of OpenAI's, and texts with check_embedding_ctx_length=False.
"""

import base64
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from gossamer.engine.encoder import Encoder, Floats, TokenIds, of_length_1
from gossamer.engine.encoder_scheduler import STEP_TOKENS, EncoderRequest
from gossamer.engine.heads import OF_VECTORS
from gossamer.errors import ConfigError, UnsupportedError
from gossamer.server.app import CHAT_ROUTES
from gossamer.server.encoder_wire import (
    MOST_INPUTS,
    ClassifyRequest,
    EmbeddingsRequest,
    RerankRequest,
    ScoreRequest,
    TeiEmbedRequest,
    TeiPredictRequest,
    TeiRerankRequest,
    texts_or_ids,
    texts_or_pairs,
)
from gossamer.server.served import CLIENT_CLOSED_REQUEST, Served, as_json
from gossamer.server.wire import RequestError, parsed
from gossamer.server.worker import Worker
from gossamer.tokens.texts import Text

Answer = TypeVar("Answer")
Handler = Callable[[HttpRequest], Any]
SHORT_BODY = 4096  # bytes: some 0.3 ms of tokenizing, where a thread's turn takes 0.1
OWN_IDS = (  # what a client is told whose ids are others
    "Token ids are those of this model's own tokenizer. Send texts instead, as LangChain's OpenAIEmbeddings "
    "does with check_embedding_ctx_length=False."
)
TEI_ERRORS = {  # status -> text-embeddings-inference's word
    HTTPStatus.BAD_REQUEST: "Validation",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "Validation",
    HTTPStatus.UNPROCESSABLE_ENTITY: "Validation",
    HTTPStatus.NOT_FOUND: "Backend",
    HTTPStatus.SERVICE_UNAVAILABLE: "Overloaded",
}


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class EncoderApi(Served):
    """The handlers, with the encoder they ask."""

    not_served = CHAT_ROUTES

    def __init__(self, encoder: Encoder, worker: Worker, name: str, allowed_origins: Sequence[str]) -> None:
        super().__init__(worker, name, allowed_origins)
        self._encoder = encoder
        self._asked_by = f"{', '.join(asked_by(encoder))} ask it"
        self.serves = f"an encoder, which continues no text; {self._asked_by}"

    def routes(self) -> list[Route]:
        posts: dict[str, Handler] = {
            "/v1/embeddings": self._answered(self.embeddings),
            "/v1/rerank": self._answered(self.rerank),
            "/v2/rerank": self._answered(self.rerank),
            "/v1/classify": self._answered(self.classify),
            "/v1/score": self._answered(self.score),
            "/score": self._answered(self.score),
            "/rerank": self.rerank_of_either_shape,
            "/embed": self._answered_as_tei(self.tei_embed),
            "/predict": self._answered_as_tei(self.tei_predict),
            "/": self._answered_as_tei(self.tei_root),
        }
        routes = [Route(path, handler, methods=["POST"]) for path, handler in posts.items()]
        return [*routes, Route("/info", self.info, methods=["GET"])]

    async def embeddings(self, http: HttpRequest) -> Any:
        body = parsed(EmbeddingsRequest, await http.body())
        self._check_name(body.model)
        cut = body.truncate_prompt_tokens is not None

        def prepare() -> list[TokenIds]:
            return self._rows(texts_or_ids(body.input, "input"), "input", cut)

        self._check_dimensions(body.dimensions)
        request = await self._computed(http, prepare)
        vectors_ND = self._vectors(request, self._encoder.pooling.normalize, body.dimensions)
        data = [
            {"object": "embedding", "index": index, "embedding": _written(vector_D, body.encoding_format)}
            for index, vector_D in enumerate(vectors_ND)
        ]
        return {"object": "list", "data": data, "model": self._name, "usage": _usage(request)}

    async def classify(self, http: HttpRequest) -> Any:
        body = parsed(ClassifyRequest, await http.body())
        self._check_name(body.model)
        head = self._encoder.classifier()
        cut = body.truncate_prompt_tokens is not None
        request = await self._computed(
            http, lambda: self._rows(texts_or_ids(body.input, "input"), "input", cut, vectors=False)
        )
        p_NL = head.probabilities(await _aside(http, lambda: head.scores(request.result())))
        data = [
            {
                "index": index,
                "label": head.labels[int(p_L.argmax())],
                "probs": p_L.tolist(),
                "num_classes": p_L.size,
            }
            for index, p_L in enumerate(p_NL)
        ]
        return self._object("classify") | {"data": data, "usage": _usage(request)}

    async def score(self, http: HttpRequest) -> Any:
        body = parsed(ScoreRequest, await http.body())
        self._check_name(body.model)
        first, second = body.texts()
        request, scores_N = await self._scored(
            http,
            lambda: self._encoder.pair_rows(first, second),
            {"text_1": len(first), "text_2": len(second)},
            cut=body.truncate_prompt_tokens is not None,
        )
        data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores_N)]
        return self._object("score") | {"data": data, "usage": _usage(request)}

    async def rerank(self, http: HttpRequest) -> Any:
        body = parsed(RerankRequest, await http.body())
        if body.model is not None:
            self._check_name(body.model)
        if body.top_n is not None and body.top_n < 1:
            raise RequestError(f"top_n is {body.top_n}; expected at least 1.", param="top_n")
        texts = body.texts()
        request, scores_N = await self._reranked(http, body.query, texts, "documents", cut=True, raw=False)
        results = [
            {"index": index, "relevance_score": scores_N[index]}
            | ({"document": {"text": texts[index]}} if body.return_documents else {})
            for index in _best_first(scores_N)[: body.top_n]
        ]
        return self._object("rerank") | {"results": results, "usage": _usage(request)}

    async def rerank_of_either_shape(self, http: HttpRequest) -> Response:
        """text-embeddings-inference's has `texts`, Cohere's and Jina's `documents`."""
        body = await http.body()
        is_tei = b'"texts"' in body and b'"documents"' not in body
        answer = self._answered_as_tei(self.tei_rerank) if is_tei else self._answered(self.rerank)
        return await answer(http)

    async def tei_rerank(self, http: HttpRequest) -> Any:
        body = parsed(TeiRerankRequest, await http.body(), HTTPStatus.UNPROCESSABLE_ENTITY)
        _, scores_N = await self._reranked(
            http, body.query, body.texts, "texts", cut=body.truncate, raw=body.raw_scores
        )
        return [
            {"index": index, "score": scores_N[index]}
            | ({"text": body.texts[index]} if body.return_text else {})
            for index in _best_first(scores_N)
        ]

    async def tei_embed(self, http: HttpRequest) -> Any:
        body = parsed(TeiEmbedRequest, await http.body(), HTTPStatus.UNPROCESSABLE_ENTITY)

        def prepare() -> list[TokenIds]:
            inputs = texts_or_ids(body.inputs, "inputs")
            return self._rows(inputs, "inputs", body.truncate, body.prompt_name)

        self._check_dimensions(body.dimensions)
        request = await self._computed(http, prepare)
        return self._vectors(request, body.normalize, body.dimensions).tolist()

    async def tei_predict(self, http: HttpRequest) -> Any:
        body = parsed(TeiPredictRequest, await http.body(), HTTPStatus.UNPROCESSABLE_ENTITY)
        head = self._encoder.classifier()
        texts, several = texts_or_pairs(body.inputs, "inputs")
        request = await self._computed(http, lambda: self._encoded(texts, "inputs", body.truncate))
        scores_NL = await _aside(http, lambda: head.scores(request.result()))
        found = head.named(scores_NL if body.raw_scores else head.probabilities(scores_NL))
        return found if several else found[0]

    async def tei_root(self, http: HttpRequest) -> Any:
        """What clients ask that know the server's address alone."""
        head = self._encoder.head
        if head is None:
            return await self.tei_embed(http)
        return await (self.tei_rerank(http) if len(head.labels) == 1 else self.tei_predict(http))

    async def info(self, http: HttpRequest) -> Response:
        head, pooling = self._encoder.head, self._encoder.pooling
        if head is None:
            kind: dict[str, Any] = {"embedding": {"pooling": pooling.mode}}
        else:
            names = {str(index): label for index, label in enumerate(head.labels)}
            ids = {label: index for index, label in enumerate(head.labels)}
            word = "reranker" if len(head.labels) == 1 else "classifier"
            kind = {word: {"id2label": names, "label2id": ids}}
        return as_json(
            {
                "model_id": self._name,
                "model_type": kind,
                "max_input_length": pooling.max_length,
                "max_batch_tokens": STEP_TOKENS,
                "max_client_batch_size": MOST_INPUTS,
                "version": version("gossamer"),
            }
        )

    async def _reranked(
        self, http: HttpRequest, query: str, texts: list[str], field: str, *, cut: bool, raw: bool
    ) -> tuple[EncoderRequest, list[float]]:
        numbers = {"query": 1, field: len(texts)}
        make = partial(self._encoder.rerank_rows, query, texts)
        return await self._scored(http, make, numbers, cut=cut, raw=raw)

    async def _scored(
        self,
        http: HttpRequest,
        make: Callable[[], list[TokenIds]],
        numbers: dict[str, int],
        *,
        cut: bool,
        raw: bool = False,
    ) -> tuple[EncoderRequest, list[float]]:
        """The scores of the pairs whose rows `make` makes of `numbers`: two fields, each with its texts."""
        (first, num_first), (second, num_second) = numbers.items()

        def prepare() -> list[TokenIds]:
            _check_number(num_second, second)
            rows = make()
            apart = len(rows) - num_second  # where vectors are compared, first texts have rows of their own
            self._check_lengths(rows[:apart], first, cut)
            self._check_lengths(rows[apart:], second, cut)
            return rows

        request = await self._computed(http, prepare)
        scores = partial(self._encoder.pair_scores, request.result(), num_first, raw_scores=raw)
        return request, await _aside(http, scores)

    def _rows(
        self,
        inputs: list[str] | list[list[int]],
        field: str,
        cut: bool,
        prompt_name: str | None = None,
        *,
        vectors: bool = True,
    ) -> list[TokenIds]:
        """What the engine is given; with the model's prompt where `vectors` are made of texts."""
        if vectors:
            self._encoder.check_vectors("encode")
        texts = [it for it in inputs if isinstance(it, str)]
        if not texts:
            if prompt_name is not None:
                message = f"found token ids in {field}, and a prompt_name; a prompt goes before texts."
                raise RequestError(message, param="prompt_name")
            return self._given([it for it in inputs if isinstance(it, list)], field, cut)
        before = self._encoder.prompt_of(prompt_name) if vectors else ""
        return self._encoded([before + text for text in texts], field, cut)

    def _encoded(self, texts: Sequence[Text], field: str, cut: bool) -> list[TokenIds]:
        _check_number(len(texts), field)
        rows = self._encoder.token_ids(texts)
        self._check_lengths(rows, field, cut)
        return rows

    def _given(self, lists: list[list[int]], field: str, cut: bool) -> list[TokenIds]:
        """Lists of token ids, which are taken as they are: with the special tokens that they have."""
        _check_number(len(lists), field)
        size, limit = self._encoder.architecture.vocab_size, self._encoder.pooling.max_length
        marks = self._encoder.tokenizer.encode("")
        for index, ids in enumerate(lists):
            if not all(0 <= it < size for it in ids):
                raise RequestError(f"{field} has token ids beyond 0 .. {size - 1}. {OWN_IDS}", param=field)
            if len(marks) == 2 and [ids[0], ids[-1]] != marks:
                ends = f"found {ids[0]} and {ids[-1]} at the ends of list {index} of {field}"
                expected = "expected {} and {}, which this model's tokenizer puts there".format(*marks)
                raise RequestError(f"{ends}; {expected}. {OWN_IDS}", param=field)
        short = [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in lists]
        rows = [TokenIds(it, [0] * len(it), it is not ids) for it, ids in zip(short, lists, strict=True)]
        self._check_lengths(rows, field, cut)
        return rows

    async def _computed(self, http: HttpRequest, prepare: Callable[[], list[TokenIds]]) -> EncoderRequest:
        """The finished request; ClientGone where nobody waits for it any more."""
        self._worker.check_room(1)
        request = EncoderRequest(await _aside(http, prepare))
        if not await self._finished(http, [request]):
            raise ClientGone
        num_cut = sum(row.is_cut for row in request.rows)
        self._metrics.computed(len(request.rows), request.num_tokens, cut=num_cut)
        return request

    def _check_lengths(self, rows: Sequence[TokenIds], field: str, cut: bool) -> None:
        """RequestError for a row that was cut, unless it may be."""
        long = next((index for index, row in enumerate(rows) if row.is_cut), None)
        if long is not None and not cut:
            raise _too_long(field, long, self._encoder.pooling.max_length)

    def _check_dimensions(self, dimensions: int | None) -> None:
        if dimensions is not None and not 1 <= dimensions <= self._encoder.dimension:
            raise RequestError(
                f"dimensions is {dimensions}; this model's vectors have {self._encoder.dimension} numbers, "
                "of which the first ones can be had.",
                param="dimensions",
            )

    def _vectors(self, request: EncoderRequest, normalize: bool, dimensions: int | None) -> Floats:
        """float32 [N, dimensions]: the first numbers of each vector, whose length is then 1 again."""
        vectors_ND = request.result()[:, :dimensions]
        return of_length_1(vectors_ND) if normalize or dimensions is not None else vectors_ND

    def _object(self, kind: str) -> dict[str, Any]:
        identity = f"{kind}-{uuid.uuid4().hex}"
        return {"id": identity, "object": "list", "created": int(time.time()), "model": self._name}

    def _answered(self, handler: Handler) -> Handler:
        """The route of a handler that returns plain data."""

        async def route(http: HttpRequest) -> Response:
            try:
                return as_json(await handler(http))
            except ClientGone:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            except UnsupportedError as error:
                message = f"{http.url.path} is not served here: {error}. {self._asked_by}."
                raise RequestError(message, code="not_served", status=HTTPStatus.NOT_FOUND) from error

        return route

    def _answered_as_tei(self, handler: Handler) -> Handler:
        """The same with errors as text-embeddings-inference has them, whose word for too long is 413."""

        async def route(http: HttpRequest) -> Response:
            try:
                return await self._answered(handler)(http)
            except RequestError as error:
                too_long = error.code == "context_length_exceeded"
                status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE if too_long else error.status
                message = str(error)
            except ConfigError as error:
                status, message = HTTPStatus.BAD_REQUEST, str(error)
            return as_json({"error": message, "error_type": TEI_ERRORS.get(status, "Backend")}, status)

        return route


async def _aside(http: HttpRequest, work: Callable[[], Answer]) -> Answer:
    """What `work` for a request returns, done in a thread where it could keep other requests waiting."""
    return work() if len(await http.body()) <= SHORT_BODY else await run_in_threadpool(work)


def asked_by(encoder: Encoder) -> tuple[str, ...]:
    """The routes that a model answers, by what its head is for: none, where no API asks for that."""
    task = encoder.architecture.task
    ranks = ("/v1/rerank", "/rerank", "/v1/score", "/score")
    if task in OF_VECTORS:
        return ("/v1/embeddings", "/embed", *ranks)
    if task == "sequence":
        return (*(ranks if len(encoder.classifier().labels) == 1 else ()), "/v1/classify", "/predict")
    return ()


def _check_number(number: int, field: str) -> None:
    if not 1 <= number <= MOST_INPUTS:
        message = f"{field} has {number} texts; expected 1 to {MOST_INPUTS}."
        too_many = number > MOST_INPUTS
        status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE if too_many else HTTPStatus.BAD_REQUEST
        raise RequestError(message, param=field, status=status)


def _too_long(field: str, index: int, limit: int) -> RequestError:
    return RequestError(
        f"text {index} of {field} has more than {limit} tokens, this model's limit. Shorten it, or have it "
        'cut: by "truncate": true (/embed, /predict, /rerank), "truncate_prompt_tokens": -1.',
        param=field,
        code="context_length_exceeded",
    )


def _best_first(scores_N: Sequence[float]) -> list[int]:
    return sorted(range(len(scores_N)), key=lambda index: -scores_N[index])


def _written(vector_D: Floats, encoding: str) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector_D.astype(np.dtype("<f4")).tobytes()).decode()
    return vector_D.tolist()


def _usage(request: EncoderRequest) -> dict[str, int]:
    return {"prompt_tokens": request.num_tokens, "total_tokens": request.num_tokens}
