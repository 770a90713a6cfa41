"""An encoder's server as other people's clients see it: LangChain's and huggingface_hub's."""

import asyncio
from typing import Any

import huggingface_hub
import numpy as np
import openai
import pytest
import tiktoken
import tiktoken.registry
from huggingface_hub import InferenceClient
from langchain_openai import OpenAIEmbeddings

from gossamer.engine import Encoder

from .conftest import Running

TEXTS = ["a b c", "d", "e f g h i j", "z y", "é", ""]


def langchain(running: Running, **options: Any) -> OpenAIEmbeddings:
    """LangChain's client, which else tries again for seconds."""
    address: Any = {"base_url": f"{running.url}/v1", "api_key": "none", "model": running.name}
    return OpenAIEmbeddings(**address, max_retries=0, **options)


def test_langchain_has_the_engine_s_vectors(vectors: Running) -> None:
    encoder, client = Encoder(vectors.path, 1), langchain(vectors, check_embedding_ctx_length=False)
    expected_ND = encoder.encode(TEXTS)
    np.testing.assert_array_equal(np.asarray(client.embed_documents(TEXTS), np.float32), expected_ND)
    np.testing.assert_array_equal(np.asarray(client.embed_query(TEXTS[0]), np.float32), expected_ND[0])
    found = asyncio.run(client.aembed_documents(TEXTS, chunk_size=2))
    np.testing.assert_array_equal(np.asarray(found, np.float32), expected_ND)
    short_ND = np.asarray(expected_ND)[:, :7]
    short_ND /= np.linalg.norm(short_ND, axis=1, keepdims=True)
    client = langchain(vectors, check_embedding_ctx_length=False, dimensions=7)
    np.testing.assert_allclose(client.embed_documents(TEXTS), short_ND, rtol=1e-6)


def test_langchain_is_told_what_to_set_where_it_sends_ids_of_another_tokenizer(
    vectors: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its default. tiktoken has no vocabulary without the network: here each byte is a token."""
    ranks = {bytes([index]): index for index in range(256)}
    of_bytes = tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "cl100k_base", of_bytes)
    for text, found in (
        ("hello", "input has token ids beyond 0 .. 39"),
        ("\t\r", "found 9 and 13 at the ends of list 0 of input; expected 2 and 3, which this model's"),
        ("\t" * 30, "found 9 and 9 at the ends of list 0 of input"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            langchain(vectors).embed_documents([text])
        message = caught.value.body["message"]  # type: ignore[index]
        assert message.startswith(found)
        assert message.endswith("LangChain's OpenAIEmbeddings does with check_embedding_ctx_length=False.")


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or huggingface_hub asks no server at all."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("path", ["", "/embed"])
def test_hugging_faces_client_has_vectors(path: str, vectors: Running) -> None:
    """Its methods post {"inputs"} to the address they are given, as what is built on it does to the root."""
    found = InferenceClient(f"{vectors.url}{path}", timeout=60).feature_extraction(TEXTS, truncate=True)
    expected_ND = Encoder(vectors.path, 1).encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(found, expected_ND, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("path", ["", "/predict"])
def test_hugging_faces_client_has_labels(path: str, labels: Running) -> None:
    """Of classification it reads batches alone."""
    one: Any = [["a b"]]
    [best, *_] = InferenceClient(f"{labels.url}{path}", timeout=60).text_classification(one)
    assert [best.label, best.score] == [*Encoder(labels.path, 1).classify(["a b"])[0][0].values()]
