"""The server as the `openai` client and plain HTTP see it; texts are those of `LLM.generate`."""

import json
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gossamer.engine import LLM, SamplingParams
from gossamer.errors import ConfigError
from gossamer.server import Serve, serve

from .conftest import Running, end, start

PROMPTS = ["Once upon a time", "def f(x):", "a", "x = [1, 2", "The dog", "Lily", "\n\n", "é"]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hi."}]


@pytest.fixture(scope="module")
def llm(chat_server: Running) -> LLM:
    return LLM(chat_server.path, 1)


def stream_text(client: openai.OpenAI, **options: Any) -> tuple[str, str | None, Any]:
    """Text, finish reason and usage of a streamed completion."""
    text, reason, counts = "", None, None
    for chunk in client.completions.create(stream=True, stream_options={"include_usage": True}, **options):
        counts = chunk.usage or counts
        for choice in chunk.choices:
            text += choice.text
            reason = choice.finish_reason or reason
    return text, reason, counts


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "max_tokens": 30},
        {"temperature": 0.8, "seed": 3, "top_p": 0.9, "max_tokens": 30},
        {"temperature": 0, "max_tokens": 30, "extra_body": {"repetition_penalty": 1.3}},
        {"temperature": 1, "seed": -1, "max_tokens": 30, "extra_body": {"top_k": 5, "min_p": 0.1}},
        {"temperature": 0, "user": "me", "extra_body": {"store": True, "metadata": {"a": "b"}}},
    ],
)
def test_completions_equal_their_streams_and_the_engine(
    chat_server: Running, llm: LLM, options: dict[str, Any]
) -> None:
    plain: dict[str, Any] = {"max_tokens": 16} | {
        name: value for name, value in options.items() if name != "user"
    }
    extra = plain.pop("extra_body", {})
    known = {name: value for name, value in extra.items() if name not in ("store", "metadata")}
    [expected] = llm.generate(PROMPTS[0], SamplingParams(**plain, **known))
    request = {"model": chat_server.name, "prompt": PROMPTS[0], **options}
    whole = chat_server.client.completions.create(**request)
    choice = whole.choices[0]
    assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert whole.usage is not None
    counts = (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens)
    num_prompt_tokens = len(llm.tokenizer.encode(PROMPTS[0]))
    num_tokens = len(expected.token_ids)
    assert counts == (num_prompt_tokens, num_tokens, num_prompt_tokens + num_tokens)
    text, reason, streamed = stream_text(chat_server.client, **request)
    assert (text, reason, streamed) == (choice.text, choice.finish_reason, whole.usage)


def test_chats_equal_their_streams_and_the_engine(chat_server: Running, llm: LLM) -> None:
    expected = llm.chat(MESSAGES, SamplingParams(max_tokens=40))
    request: dict[str, Any] = {
        "model": chat_server.name,
        "messages": MESSAGES,
        "temperature": 0,
        "max_completion_tokens": 40,
    }
    whole = chat_server.client.chat.completions.create(**request)
    message = whole.choices[0].message
    assert (message.role, message.content) == ("assistant", expected.text)
    assert whole.choices[0].finish_reason == expected.finish_reason
    chunks = list(chat_server.client.chat.completions.create(stream=True, **request))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == expected.finish_reason
    parts = [{"type": "text", "text": "Say hi."}]
    request["messages"] = [MESSAGES[0], {"role": "user", "content": parts}]
    assert chat_server.client.chat.completions.create(**request).choices[0].message.content == expected.text


def test_stop_strings_end_the_text(chat_server: Running, llm: LLM) -> None:
    [plain] = llm.generate(PROMPTS[0], SamplingParams(max_tokens=30))
    stop = plain.text[9:12]
    request: dict[str, Any] = {
        "model": chat_server.name,
        "prompt": PROMPTS[0],
        "temperature": 0,
        "max_tokens": 30,
        "stop": stop,
    }
    text, reason, _ = stream_text(chat_server.client, **request)
    assert (text, reason) == (plain.text[: plain.text.index(stop)], "stop")
    request["stop"] = ["\N{SNOWMAN}", stop]
    choice = chat_server.client.completions.create(**request).choices[0]
    assert (choice.text, choice.finish_reason) == (text, "stop")


def test_eight_at_once_get_what_each_gets_alone(chat_server: Running) -> None:
    def ask(prompt: str) -> str:
        request = {"model": chat_server.name, "prompt": prompt, "temperature": 0, "max_tokens": 40}
        return chat_server.client.completions.create(**request).choices[0].text

    alone = [ask(prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(ask, PROMPTS)) == alone


def test_several_prompts_get_a_choice_each(chat_server: Running, llm: LLM) -> None:
    ids = [llm.tokenizer.encode(prompt) for prompt in PROMPTS[:3]]
    expected = [generation.text for generation in llm.generate(ids, SamplingParams(max_tokens=12))]
    request = {"model": chat_server.name, "temperature": 0, "max_tokens": 12}
    for prompts in (PROMPTS[:3], ids):
        whole = chat_server.client.completions.create(prompt=prompts, **request)
        assert [choice.text for choice in whole.choices] == expected
    texts = ["", "", ""]
    for chunk in chat_server.client.completions.create(prompt=ids, stream=True, **request):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected
    assert chat_server.client.completions.create(prompt=ids[1], **request).choices[0].text == expected[1]


def test_the_stream_is_server_sent_events(chat_server: Running) -> None:
    body = {"model": chat_server.name, "messages": MESSAGES, "max_tokens": 3, "stream": True}
    answer = httpx.post(f"{chat_server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last = answer.text.removesuffix("\n\n").split("\n\n")
    assert last == "data: [DONE]"
    parsed = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {event["object"] for event in parsed} == {"chat.completion.chunk"}
    assert len({event["id"] for event in parsed}) == 1
    assert not any("usage" in event for event in parsed)


def test_models_and_health(chat_server: Running) -> None:
    [model] = chat_server.client.models.list().data
    assert model.id == chat_server.name == chat_server.client.models.retrieve(model.id).id
    assert httpx.get(f"{chat_server.url}/health", timeout=60).json() == {"status": "ok", "requests": 0}


GOOD_CHAT = {"messages": MESSAGES, "max_tokens": 2}
GOOD_TEXT = {"prompt": "a", "max_tokens": 2}


@pytest.mark.parametrize(
    ("route", "changes", "status", "param"),
    [
        ("chat/completions", {"n": 2}, 400, "n"),
        ("chat/completions", {"temperature": -1}, 400, None),
        ("chat/completions", {"temperature": "hot"}, 400, "temperature"),
        ("chat/completions", {"top_p": 0}, 400, None),
        ("chat/completions", {"max_tokens": 0}, 400, None),
        ("chat/completions", {"max_tokens": 1.5}, 400, "max_tokens"),
        ("chat/completions", {"messages": []}, 400, None),
        ("chat/completions", {"messages": [{"role": "wizard", "content": "x"}]}, 400, None),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages",
        ),
        ("chat/completions", {"messages": "hi"}, 400, "messages"),
        ("chat/completions", {"messages": None}, 400, "messages"),
        ("chat/completions", {"tools": [{"type": "function"}]}, 400, "tools"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, 400, "response_format"),
        ("chat/completions", {"logprobs": True}, 400, "logprobs"),
        ("chat/completions", {"presence_penalty": 0.5}, 400, "presence_penalty"),
        ("chat/completions", {"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ("chat/completions", {"temprature": 1}, 400, "temprature"),
        ("chat/completions", {"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ("chat/completions", {"stop": [""]}, 400, None),
        ("chat/completions", {"model": "gpt-9"}, 404, "model"),
        ("completions", {"prompt": []}, 400, "prompt"),
        ("completions", {"prompt": [[1], "a", 3]}, 400, "prompt"),
        ("completions", {"prompt": [5, 320]}, 400, None),
        ("completions", {"prompt": "long " * 600}, 400, None),
        ("completions", {"logprobs": 0}, 400, "logprobs"),
        ("completions", {"echo": True}, 400, "echo"),
        ("completions", {"best_of": 3}, 400, "best_of"),
        ("completions", {"suffix": "x"}, 400, "suffix"),
        ("embeddings", {}, 404, None),
    ],
)
def test_bad_requests_get_the_apis_error_object(
    chat_server: Running, route: str, changes: dict[str, Any], status: int, param: str | None
) -> None:
    good = GOOD_CHAT if route.startswith("chat") else GOOD_TEXT
    body = {"model": chat_server.name} | good | changes
    answer = httpx.post(f"{chat_server.url}/v1/{route}", json=body, timeout=60)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert len(error["message"]) > 10


def test_neutral_and_harmless_fields_are_accepted(chat_server: Running) -> None:
    harmless = {
        "user": "me",
        "metadata": {},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "x",
    }
    neutral = {"n": 1, "logprobs": False, "presence_penalty": 0.0, "frequency_penalty": 0, "tools": None}
    more = {"logit_bias": {}, "response_format": {"type": "text"}, "tool_choice": "none", "stop": None}
    body = {"model": chat_server.name} | GOOD_CHAT | harmless | neutral | more
    assert httpx.post(f"{chat_server.url}/v1/chat/completions", json=body, timeout=60).status_code == 200


def test_other_methods_and_broken_bodies_get_error_objects_too(chat_server: Running) -> None:
    url = f"{chat_server.url}/v1/completions"
    assert httpx.get(url, timeout=60).json()["error"]["message"].startswith("GET /v1/completions")
    for content in (b"", b"{", b"[]", b"\xff"):
        answer = httpx.post(url, content=content, timeout=60)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_model_without_a_chat_template_says_so(packed: Callable[[str], Path]) -> None:
    running = start(packed("plain"), name="served-as")
    assert running.name == "served-as"
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        running.client.chat.completions.create(
            model=running.name, messages=[{"role": "user", "content": "x"}]
        )
    end(running)


def under_way(running: Running) -> int:
    return httpx.get(f"{running.url}/health", timeout=60).json()["requests"]


@pytest.mark.parametrize("streamed", [True, False])
def test_what_a_client_that_leaves_asked_for_is_dropped(
    packed: Callable[[str], Path], streamed: bool
) -> None:
    many = 500  # one at a time: many times longer than the test waits
    running = start(packed("chat"), max_queue=many, max_batch=1)
    body = {"model": running.name, "prompt": ["a"] * many, "max_tokens": 400, "stream": streamed, "seed": 1}
    request = httpx.Request("POST", f"{running.url}/v1/completions", json=body)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + request.content)
        while under_way(running) == 0:
            time.sleep(0.01)
        assert under_way(running) == many
        refused = httpx.post(str(request.url), json=body | {"prompt": "a", "stream": streamed}, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
    left = time.monotonic()
    while under_way(running) == many:
        assert time.monotonic() - left < 10
        time.sleep(0.01)
    assert under_way(running) == 0
    assert running.client.completions.create(model=running.name, prompt="a", max_tokens=2).choices
    end(running)


@pytest.mark.parametrize("busy", [False, True])
def test_ctrl_c_ends_the_server_cleanly(packed: Callable[[str], Path], busy: bool) -> None:
    running = start(packed("chat"))
    if busy:
        ask = {"model": running.name, "prompt": "a", "max_tokens": 400, "stream": True}
        stream = running.client.completions.create(**ask)
        assert next(iter(stream)).choices
    running.process.send_signal(signal.SIGINT)
    _, errors = running.process.communicate(timeout=60)
    assert (running.process.returncode, errors) == (130, "")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.url}/health", timeout=60)


def test_a_taken_port_is_the_environments_failure(chat_server: Running) -> None:
    port = int(chat_server.url.rpartition(":")[2])
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
        serve(Serve(str(chat_server.path), port=port, threads=1))


@pytest.mark.parametrize("options", [{"port": -1}, {"port": 70000}, {"max_batch": 0}, {"max_tokens": 0}])
def test_options_out_of_range_are_refused(chat_server: Running, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        serve(Serve(str(chat_server.path), **options))


def test_a_real_model_serves_the_same_greedy_story_to_everyone(packed: Callable[[str], Path]) -> None:
    running = start(packed("stories3m"))
    request = {"model": running.name, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 60}
    with ThreadPoolExecutor(4) as pool:
        stories = list(pool.map(lambda _: stream_text(running.client, **request)[0], range(4)))
    [expected] = LLM(running.path, 1).generate("Once upon a time", SamplingParams(max_tokens=60))
    assert set(stories) == {expected.text}
    end(running)
