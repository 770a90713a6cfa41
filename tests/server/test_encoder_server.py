"""An encoder's server as the `openai` client and plain HTTP see it; numbers are those of `Encoder`."""

import base64
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from encoders import save_encoder
from gossamer.engine import Encoder
from gossamer.errors import ConfigError, UnsupportedError
from gossamer.server.serve import Serve, serve

from .conftest import LABELS, Running, served

TEXTS = ["a b c", "d", "e f g h i j", "z y", "é"]
LONG = "a b c d e f g h i j k l m n o p q r s t u v w x y z"


def post(running: Running, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{running.url}{path}", json=body, timeout=60)


def test_embeddings_are_the_engine_s(vectors: Running) -> None:
    encoder = Encoder(vectors.path, 1)
    rows, expected_ND = encoder.token_ids(TEXTS), encoder.encode(TEXTS)
    num_tokens = sum(len(row.ids) for row in rows)
    for given in (TEXTS, [list(row.ids) for row in rows]):
        options: Any
        for options in ({}, {"encoding_format": "float"}):  # the client's own choice is base64
            whole = vectors.client.embeddings.create(model=vectors.name, input=given, **options)
            assert [it.index for it in whole.data] == [*range(len(TEXTS))]
            np.testing.assert_array_equal(
                np.asarray([it.embedding for it in whole.data], np.float32), expected_ND
            )
            assert (whole.usage.prompt_tokens, whole.usage.total_tokens) == (num_tokens, num_tokens)
    for given in (TEXTS[0], list(rows[0].ids)):
        [one] = vectors.client.embeddings.create(model=vectors.name, input=given).data
        np.testing.assert_array_equal(np.asarray(one.embedding, np.float32), expected_ND[0])
    raw = post(vectors, "/v1/embeddings", model=vectors.name, input="d", encoding_format="base64").json()
    written = base64.b64decode(raw["data"][0]["embedding"])
    np.testing.assert_array_equal(np.frombuffer(written, "<f4"), expected_ND[1])


def test_fewer_dimensions_have_length_1(vectors: Running) -> None:
    expected_D = np.asarray(Encoder(vectors.path, 1).encode(TEXTS[0]))[:7]
    [one] = vectors.client.embeddings.create(model=vectors.name, input=TEXTS[0], dimensions=7).data
    np.testing.assert_allclose(one.embedding, expected_D / np.linalg.norm(expected_D), rtol=1e-6)


def test_fifty_at_once_get_what_each_gets_alone(vectors: Running) -> None:
    texts = [[*"abcdefghij"[: 1 + i % 7], TEXTS[i % 5]] for i in range(50)]

    def ask(given: list[str]) -> Any:
        return post(vectors, "/v1/embeddings", model=vectors.name, input=given).json()

    alone = [ask(given) for given in texts]
    with ThreadPoolExecutor(50) as pool:
        assert list(pool.map(ask, texts)) == alone


def test_tei_s_vectors(vectors: Running) -> None:
    encoder = Encoder(vectors.path, 1)
    options: Any
    for options in ({"normalize": False}, {}, {"prompt_name": "query"}, {"truncate": True}):
        expected_ND = encoder.encode(
            TEXTS,
            prompt_name=options.get("prompt_name"),
            normalize_embeddings=options.get("normalize", True),
        )
        found = post(vectors, "/embed", inputs=TEXTS, **options)
        np.testing.assert_array_equal(np.asarray(found.json(), np.float32), expected_ND)
    [cut] = post(vectors, "/embed", inputs=LONG, truncate=True, normalize=False).json()
    np.testing.assert_array_equal(np.asarray(cut, np.float32), encoder.encode(LONG))


@pytest.mark.parametrize("kind", ["vectors", "ranks"])
def test_ranks_are_the_engine_s(kind: str, request: pytest.FixtureRequest) -> None:
    running: Running = request.getfixturevalue(kind)
    scores = Encoder(running.path, 1).rerank("a b", TEXTS)
    order = sorted(range(len(TEXTS)), key=lambda index: -scores[index])
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        documents = [TEXTS[0], *({"text": text} for text in TEXTS[1:])]
        options = {"model": running.name, "query": "a b", "documents": documents}
        whole = post(running, path, **options).json()
        assert [it["index"] for it in whole["results"]] == order
        assert [it["relevance_score"] for it in whole["results"]] == [scores[index] for index in order]
        few = post(running, path, **options, top_n=2, return_documents=True).json()["results"]
        assert [it["document"]["text"] for it in few] == [TEXTS[index] for index in order[:2]]
    tei = post(running, "/rerank", query="a b", texts=TEXTS, return_text=True).json()
    assert tei == [{"index": i, "score": scores[i], "text": TEXTS[i]} for i in order]
    if kind == "ranks":
        assert post(running, "/", query="a b", texts=TEXTS, return_text=True).json() == tei
    raw = post(running, "/rerank", query="a b", texts=TEXTS, raw_scores=True).json()
    expected = Encoder(running.path, 1).rerank("a b", TEXTS, raw_scores=True)
    assert [it["score"] for it in raw] == sorted(expected, reverse=True)


def test_scores_of_pairs_are_cosines(vectors: Running) -> None:
    a_ND = Encoder(vectors.path, 1).encode(TEXTS, normalize_embeddings=True)
    b_ND = np.roll(a_ND, 1, axis=0)
    rolled = [TEXTS[-1], *TEXTS[:-1]]
    for path, first, second, expected_N in (
        ("/v1/score", TEXTS, rolled, (a_ND * b_ND).sum(axis=1)),
        ("/score", TEXTS[0], TEXTS, a_ND @ a_ND[0]),
        ("/v1/score", TEXTS[0], TEXTS[1], [a_ND[0] @ a_ND[1]]),
    ):
        found = post(vectors, path, model=vectors.name, text_1=first, text_2=second).json()
        assert [it["index"] for it in found["data"]] == list(range(len(expected_N)))
        np.testing.assert_allclose([it["score"] for it in found["data"]], expected_N, atol=1e-6)
        assert found["usage"]["total_tokens"] > 0


def test_scores_of_pairs_are_the_head_s(ranks: Running) -> None:
    encoder = Encoder(ranks.path, 1)
    found = post(ranks, "/v1/score", model=ranks.name, text_1=TEXTS[0], text_2=TEXTS).json()["data"]
    assert [it["score"] for it in found] == encoder.rerank(TEXTS[0], TEXTS)
    found = post(ranks, "/v1/score", model=ranks.name, text_1=["a b", "c"], text_2=["d", "e"]).json()["data"]
    assert [it["score"] for it in found] == [*encoder.rerank("a b", ["d"]), *encoder.rerank("c", ["e"])]


def test_labels_are_the_engine_s(labels: Running) -> None:
    encoder = Encoder(labels.path, 1)
    expected = encoder.classify(TEXTS)
    whole = post(labels, "/v1/classify", model=labels.name, input=TEXTS).json()
    assert [it["label"] for it in whole["data"]] == [of_text[0]["label"] for of_text in expected]
    probs = [dict(zip(LABELS["id2label"].values(), it["probs"], strict=True)) for it in whole["data"]]
    assert probs == [{it["label"]: it["score"] for it in of_text} for of_text in expected]
    assert post(labels, "/predict", inputs=TEXTS[0]).json() == expected[0]
    assert post(labels, "/predict", inputs=["a", "b"]).json() == encoder.classify([("a", "b")])[0]
    batch = post(labels, "/predict", inputs=[["d"], ["a", "b"]]).json()
    assert batch == encoder.classify(["d", ("a", "b")])
    raw = post(labels, "/predict", inputs="a", raw_scores=True).json()
    assert [it["label"] for it in raw] == [it["label"] for it in encoder.classify(["a"])[0]]


def test_what_is_served_is_told(vectors: Running, labels: Running, ranks: Running) -> None:
    assert [it.id for it in vectors.client.models.list()] == [vectors.name]
    info = httpx.get(f"{vectors.url}/info").json()
    assert (info["model_type"], info["max_input_length"]) == ({"embedding": {"pooling": "mean"}}, 20)
    assert httpx.get(f"{labels.url}/info").json()["model_type"]["classifier"]["id2label"]["2"] == "good"
    assert "reranker" in httpx.get(f"{ranks.url}/info").json()["model_type"]
    assert httpx.get(f"{vectors.url}/health").json() == {"status": "ok", "requests": 0}


def test_routes_of_other_models_say_what_is_served(
    vectors: Running, labels: Running, chat_server: Running
) -> None:
    with pytest.raises(openai.NotFoundError, match="an encoder, which continues no text; /v1/embeddings"):
        vectors.client.chat.completions.create(model=vectors.name, messages=[])
    with pytest.raises(openai.NotFoundError, match="a decoder, which continues texts; it has /v1/chat"):
        chat_server.client.embeddings.create(model=chat_server.name, input="a")
    for path in (
        "/v1/rerank",
        "/v2/rerank",
        "/v1/classify",
        "/v1/score",
        "/score",
        "/embed",
        "/rerank",
        "/predict",
    ):
        answer = post(chat_server, path, model=chat_server.name)
        assert answer.status_code == 404
        assert "a decoder, which continues texts; it has /v1/chat" in answer.json()["error"]["message"]
    with pytest.raises(
        openai.NotFoundError,
        match=r"/v1/embeddings is not served here: .*scores whole.*cannot encode. /v1/classify, /predict",
    ):
        labels.client.embeddings.create(model=labels.name, input="a")
    with pytest.raises(openai.NotFoundError, match="continues no text; /v1/classify, /predict ask it"):
        labels.client.chat.completions.create(model=labels.name, messages=[])
    for path, body in (("/embed", {"inputs": "a"}), ("/rerank", {"query": "a", "texts": ["b"]})):
        answer = post(labels, path, **body)
        assert (answer.status_code, answer.json()["error_type"]) == (404, "Backend")
        assert "/v1/classify, /predict ask it" in answer.json()["error"]
    assert post(vectors, "/predict", inputs="a").status_code == 404
    assert post(vectors, "/v1/classify", model=vectors.name, input="a").status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/embeddings", {"input": LONG}, 400, "text 0 of input has more than 20 tokens"),
        ("/v1/embeddings", {"input": [[2] * 20 + [3]]}, 400, "text 0 of input has more than 20 tokens"),
        ("/v1/embeddings", {"input": [[40]]}, 400, "token ids beyond 0 .. 39"),
        ("/v1/embeddings", {"input": [[2, 5, 3], [5, 3]]}, 400, "found 5 and 3 at the ends of list 1"),
        ("/v1/embeddings", {"input": [2, 5]}, 400, "expected 2 and 3, which this model's tokenizer puts"),
        ("/v1/embeddings", {"input": []}, 400, "input must be a text"),
        ("/v1/embeddings", {"input": ["a", [2]]}, 400, "input must be a text"),
        ("/v1/embeddings", {"input": ["a"] * 2049}, 413, "input has 2049 texts; expected 1 to 2048"),
        ("/v1/embeddings", {"input": "a", "dimensions": 25}, 400, "vectors have 24 numbers"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, 400, "will not do"),
        ("/v1/embeddings", {"input": "a", "colour": "red"}, 400, "colour"),
        ("/v1/embeddings", {"input": "a", "model": "other"}, 404, "'other' does not exist here"),
        ("/v1/rerank", {"query": "a", "documents": []}, 400, "documents has 0 texts"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, 400, "top_n is 0"),
        ("/embed", {"inputs": LONG}, 413, "more than 20 tokens"),
        ("/embed", {"inputs": "a", "prompt_name": "title"}, 400, "this model's prompts: query"),
        ("/embed", {"inputs": [[2, 3]], "prompt_name": "query"}, 400, "a prompt goes before texts"),
        ("/embed", {"inputs": [[7]]}, 400, "found 7 and 7 at the ends of list 0 of inputs"),
        ("/embed", {"input": "a"}, 422, "will not do"),
        ("/embed", {"inputs": []}, 400, "inputs must be a text"),
        ("/embed", {"inputs": ["a"] * 10_000}, 413, "inputs has 10000 texts; expected 1 to 2048"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]}, 400, "text_1 has 2 texts and text_2 1"),
        ("/v1/score", {"text_1": "a", "text_2": []}, 400, "text_2 has 0 texts"),
        ("/v1/score", {"text_1": "a", "text_2": ["b", LONG]}, 400, "text 1 of text_2 has more than 20"),
        ("/rerank", {"query": LONG, "texts": ["a"]}, 413, "text 0 of query has more than 20"),
        ("/rerank", {"query": "a", "texts": ["a", LONG]}, 413, "text 1 of texts has more than 20"),
    ],
)
def test_what_cannot_be_served_is_refused(
    path: str, body: dict[str, Any], status: int, message: str, vectors: Running
) -> None:
    given = {"model": vectors.name} | body if path.startswith("/v1") else body
    answer = post(vectors, path, **given)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert message in (error["message"] if path.startswith("/v1") else error)
    assert post(vectors, "/v1/embeddings", model=vectors.name, input="a").status_code == 200


def test_too_long_texts_are_cut_where_that_is_asked(vectors: Running) -> None:
    extra = {"truncate_prompt_tokens": -1}
    encoder = Encoder(vectors.path, 1)
    ids = encoder.tokenizer.encode(LONG)
    assert len(ids) > 20
    given: Any
    for given in (LONG, ids):
        [one] = vectors.client.embeddings.create(model=vectors.name, input=given, extra_body=extra).data
        np.testing.assert_array_equal(np.asarray(one.embedding, np.float32), encoder.encode(LONG))


def test_metrics_count_requests_texts_and_tokens(tmp_path: Path, chat_server: Running) -> None:
    for running in served(tmp_path / "model", "BertModel"):
        post(running, "/v1/embeddings", model=running.name, input=TEXTS)
        post(running, "/embed", inputs=LONG)
        assert sample(running)["gossamer_texts_cut_total"] == 0
        post(running, "/rerank", query="a", texts=["b", LONG, LONG], truncate=True)
        post(running, "/nowhere/else")
        found = sample(running)
        assert found['gossamer_requests_total{route="/v1/embeddings",status="200"}'] == 1
        assert found['gossamer_requests_total{route="/embed",status="413"}'] == 1
        assert found['gossamer_requests_total{route="other",status="404"}'] == 1
        rows = Encoder(running.path, 1).token_ids([*TEXTS, "q a", "b", LONG, LONG])
        assert found["gossamer_texts_cut_total"] == 2
        assert found["gossamer_texts_total"] == len(rows)
        assert found["gossamer_prompt_tokens_total"] == sum(len(row.ids) for row in rows)
        assert found["gossamer_queue"] == 0
        assert found['gossamer_request_seconds_bucket{le="+Inf",route="/v1/embeddings"}'] == 1
        assert found['gossamer_request_seconds_sum{route="/v1/embeddings"}'] > 0
    before = sample(chat_server)
    asked: dict[str, Any] = {"model": chat_server.name, "prompt": ["one", "two"], "max_tokens": 3}
    usage = chat_server.client.completions.create(**asked, temperature=0).usage
    assert usage is not None and [*chat_server.client.completions.create(**asked, temperature=0, stream=True)]
    after = sample(chat_server)
    for name, number in (("prompt", usage.prompt_tokens), ("generated", usage.completion_tokens)):
        name = f"gossamer_{name}_tokens_total"
        assert after[name] - before[name] == 2 * number > 0
    assert after["gossamer_texts_total"] - before["gossamer_texts_total"] == 4


def sample(running: Running) -> dict[str, float]:
    """What Prometheus would read."""
    text = httpx.get(f"{running.url}/metrics").raise_for_status().text
    found = {}
    for it in (it for family in text_string_to_metric_families(text) for it in family.samples):
        labels = ",".join(f'{name}="{value}"' for name, value in sorted(it.labels.items()))
        found[f"{it.name}{{{labels}}}" if labels else it.name] = it.value
    return found


def test_a_path_that_is_none_is_told_those_there_are(vectors: Running) -> None:
    answer = httpx.get(f"{vectors.url}/v1/nonsense")
    assert answer.status_code == 404
    message = answer.json()["error"]["message"]
    assert message.startswith("GET /v1/nonsense: Not Found. This server has /v1/embeddings, /v1/rerank, ")
    assert "chat" not in message


def answered(running: Running) -> float:
    """Requests for vectors that have come to an end, whoever waited for it."""
    return sum(
        number
        for name, number in sample(running).items()
        if name.startswith("gossamer_requests_total{") and "/v1/embeddings" in name
    )


def test_a_client_that_leaves_is_forgotten(vectors: Running) -> None:
    before = answered(vectors)
    body = json.dumps({"model": vectors.name, "input": [LONG[:35]] * 2048}).encode()
    host, port = vectors.url.removeprefix("http://").split(":")
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    for _ in range(8):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
    give_up = time.monotonic() + 60
    while answered(vectors) < before + 8 and time.monotonic() < give_up:
        time.sleep(0.05)
    assert answered(vectors) == before + 8
    assert httpx.get(f"{vectors.url}/health").json()["requests"] == 0
    assert post(vectors, "/v1/embeddings", model=vectors.name, input="a").status_code == 200


@pytest.mark.parametrize("option", [{"max_batch": 4}, {"max_tokens": 9}, {"kv_cache_dtype": "i8"}])
def test_options_of_decoders_are_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    save_encoder(tmp_path / "model")
    flag = next(iter(option)).replace("_", "-")
    with pytest.raises(ConfigError, match=f"--{flag} is for decoders; found .*, an encoder"):
        serve(Serve(str(tmp_path / "model"), port=0, **option))


@pytest.mark.parametrize("name", ["BertForTokenClassification", "BertForQuestionAnswering"])
def test_a_model_that_no_route_asks_is_refused(tmp_path: Path, name: str) -> None:
    save_encoder(tmp_path / "model", name)
    with pytest.raises(UnsupportedError, match=r"Encoder\..*cannot be served: no route asks for that"):
        serve(Serve(str(tmp_path / "model"), port=0))
