"""The server as the `openai` client and plain HTTP see it; texts are those of `LLM.generate`."""

import json
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from gossamer.engine import LLM, SamplingParams, TokenLogprob
from gossamer.errors import ConfigError
from gossamer.server import Serve, serve
from gossamer.server.logprobs import of_completion

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


@pytest.mark.parametrize("stream", [False, True])
def test_completions_tell_the_logprobs_of_prompts_and_answers(
    chat_server: Running, llm: LLM, stream: bool
) -> None:
    prompts = [PROMPTS[0], "d", "x = [1, 2"]
    for max_tokens in (0, 1, 9):
        params = SamplingParams(max_tokens=max_tokens, logprobs=2, echo=True)
        expected = llm.generate(prompts, params)
        request: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens, "logprobs": 2, "echo": True}
        request |= {"model": chat_server.name, "prompt": prompts, "stream": stream}
        answer: Any = chat_server.client.completions.create(**request)
        choices = [choice for chunk in (answer if stream else [answer]) for choice in chunk.choices]
        for index, of in enumerate(expected):
            pieces = [choice for choice in choices if choice.index == index]
            assert "".join(piece.text for piece in pieces) == of.text
            assert pieces[-1].finish_reason == of.finish_reason
            found: dict[str, list[Any]] = {}
            for piece in pieces:
                for name, values in piece.logprobs.to_dict().items():
                    found.setdefault(name, []).extend(values)
            assert of.logprobs is not None
            text_of = llm.tokenizer.token_text
            assert found["tokens"] == [text_of(token.token_id) for token in of.logprobs]
            assert found["token_logprobs"] == [token.logprob for token in of.logprobs]
            assert found["text_offset"] == [token.offset for token in of.logprobs]
            assert found["top_logprobs"][0] is None and found["token_logprobs"][0] is None
            for token, top in zip(of.logprobs[1:], found["top_logprobs"][1:], strict=True):
                assert top[text_of(token.token_id)] == token.logprob and 2 <= len(top) <= 3
                assert max(top.values()) == token.likeliest[0][1]


@pytest.mark.parametrize("stream", [False, True])
def test_chats_tell_the_logprobs_of_answers(chat_server: Running, llm: LLM, stream: bool) -> None:
    expected = llm.chat(MESSAGES, SamplingParams(max_tokens=12, logprobs=3)).logprobs
    request: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    request |= {"model": chat_server.name, "messages": MESSAGES, "stream": stream}
    answer: Any = chat_server.client.chat.completions.create(**request)
    told = [choice.logprobs for chunk in (answer if stream else [answer]) for choice in chunk.choices]
    found = [token for one in told if one for token in one.content]
    assert expected is not None and [token.logprob for token in found] == [of.logprob for of in expected]
    for token, of in zip(found, expected, strict=True):
        assert bytes(token.bytes) == llm.tokenizer.token_bytes(of.token_id)
        assert token.token == llm.tokenizer.token_text(of.token_id)
        assert [(top.token, top.logprob) for top in token.top_logprobs] == [
            (llm.tokenizer.token_text(index), logprob) for index, logprob in of.likeliest
        ]


def test_tokens_with_one_text_do_not_hide_the_likeliest() -> None:
    """A JSON object has place for one of two tokens with the same text: the likelier one."""
    tokenizer: Any = SimpleNamespace(token_text=lambda index: "</s>")
    found = of_completion([TokenLogprob(7, -5.0, ((1, -3.0),), 0)], tokenizer)
    assert found["token_logprobs"] == [-5.0] and found["top_logprobs"] == [{"</s>": -3.0}]
    assert of_completion([TokenLogprob(7, float("-inf"), (), 0)], tokenizer)["token_logprobs"] == [-9999.0]


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
        ("chat/completions", {"logprobs": 2}, 400, "logprobs"),
        ("chat/completions", {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ("chat/completions", {"logprobs": True, "top_logprobs": -1}, 400, "top_logprobs"),
        ("chat/completions", {"logprobs": True, "top_logprobs": 1.5}, 400, "top_logprobs"),
        ("chat/completions", {"top_logprobs": 2}, 400, "top_logprobs"),
        ("chat/completions", {"logprobs": True, "echo": True}, 400, "echo"),
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
        ("completions", {"logprobs": 21}, 400, "logprobs"),
        ("completions", {"logprobs": -1}, 400, "logprobs"),
        ("completions", {"logprobs": True}, 400, "logprobs"),
        ("completions", {"logprobs": "1"}, 400, "logprobs"),
        ("completions", {"logprobs": 1, "top_logprobs": 1}, 400, "top_logprobs"),
        ("completions", {"echo": 1}, 400, "echo"),
        ("completions", {"echo": True, "max_tokens": -1}, 400, None),
        ("completions", {"max_tokens": 0}, 400, None),
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


def ask(running: Running, changes: dict[str, Any], route: str = "chat/completions") -> httpx.Response:
    good = GOOD_CHAT if route.startswith("chat") else GOOD_TEXT
    body = {"model": running.name} | good | changes
    return httpx.post(f"{running.url}/v1/{route}", json=body, timeout=60)


NULLS = dict.fromkeys(["refusal", "name", "audio", "function_call", "tool_calls", "reasoning_content"])


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": [{"role": "user", "content": "a", **NULLS}]},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "b", "tool_calls": []}, MESSAGES[1]]},
        {"messages": [{"role": "assistant", "content": "b", "annotations": [], "refusal": None}]},
        {"messages": [{"role": "assistant", "content": "b", "function_call": {}, "reasoning": ""}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "annotations": []}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": None}]}]},
        {"messages": [{"role": "user", "content": "a", "weight": None}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": []}, MESSAGES[1]]},
        {"messages": [{"role": "assistant"}, {"role": "user", "content": []}]},
        {"stream_options": None, "tools": [], "stop_token_ids": None, "unheard_of": None},
        {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": None}},
        {"response_format": {"type": "text", "json_schema": None}},
        {"logit_bias": {"5": None}, "stop": [], "stop_token_ids": []},
    ],
)
def test_neutral_values_are_neutral_at_every_depth(chat_server: Running, changes: dict[str, Any]) -> None:
    answer = ask(chat_server, changes)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("message", "word"),
    [
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, "tool_calls"),
        ({"role": "tool", "content": "5", "tool_call_id": "x"}, "tool_call_id"),
        ({"role": "assistant", "content": "b", "reasoning_content": "hm"}, "reasoning_content"),
        ({"role": "assistant", "content": "b", "audio": {"id": "x"}}, "audio"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "annotations": [1]}]}, "annotations"),
        ({"role": "user", "content": "a", "tool_calls": 0}, "tool_calls"),
    ],
)
def test_what_would_change_the_answer_is_refused_at_every_depth(
    chat_server: Running, message: dict[str, Any], word: str
) -> None:
    answer = ask(chat_server, {"messages": [message]})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "messages")
    assert word in error["message"]


def test_an_answer_can_be_sent_back_as_it_came(chat_server: Running) -> None:
    request: dict[str, Any] = {"model": chat_server.name, "temperature": 0, "max_tokens": 3}
    client = chat_server.client
    first = client.chat.completions.create(messages=[{"role": "user", "content": "a"}], **request)
    history: Any = [{"role": "user", "content": "a"}, first.choices[0].message.model_dump()]
    more = client.chat.completions.create(messages=[*history, {"role": "user", "content": "b"}], **request)
    assert more.choices[0].message.content is not None


@pytest.mark.parametrize("half", ["\\ud83d", "\\ude00", "\\ud83d\\ud83d", "a\\udcff"])
@pytest.mark.parametrize("where", ["prompt", "content", "role", "stop", "model", "user", "key"])
def test_half_a_surrogate_pair_is_no_traceback(chat_server: Running, half: str, where: str) -> None:
    chat = where in ("content", "role")
    body: dict[str, Any] = {"model": chat_server.name, **(GOOD_CHAT if chat else GOOD_TEXT)}
    if chat:
        body["messages"] = [{"role": "user", "content": "x", where: "HALF"}]
    else:
        body["HALF" if where == "key" else where] = "HALF"
    text = json.dumps(body).replace("HALF", half)
    route = "chat/completions" if chat else "completions"
    answer = httpx.post(f"{chat_server.url}/v1/{route}", content=text, timeout=60)
    assert answer.status_code == {"model": 404, "key": 400}.get(where, 200), answer.text
    if where == "prompt":
        expected = ask(
            chat_server,
            {
                "prompt": json.loads(f'"{half}"')
                .encode("utf-16", "surrogatepass")
                .decode("utf-16", "replace"),
                "temperature": 0,
            },
            "completions",
        )
        greedy = httpx.post(
            f"{chat_server.url}/v1/{route}", content=text[:-1] + ', "temperature": 0}', timeout=60
        )
        assert greedy.json()["choices"] == expected.json()["choices"]
        assert greedy.json()["usage"] == expected.json()["usage"]


def test_stop_may_be_a_special_token_or_an_id(chat_server: Running, llm: LLM) -> None:
    [plain] = llm.generate(PROMPTS[0], SamplingParams(max_tokens=30))
    request: dict[str, Any] = {"prompt": PROMPTS[0], "temperature": 0, "max_tokens": 30}
    at = 7
    stopped = ask(chat_server, request | {"stop_token_ids": [plain.token_ids[at]]}, "completions").json()
    first = plain.token_ids.index(plain.token_ids[at])
    assert stopped["choices"][0]["text"] == llm.tokenizer.decode(plain.token_ids[:first])
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["usage"]["completion_tokens"] == first + 1
    for ids in ([-1], [320], ["a"], 5):
        assert ask(chat_server, request | {"stop_token_ids": ids}, "completions").status_code == 400


def test_a_users_control_tokens_are_text_in_chats(chat_server: Running, llm: LLM) -> None:
    messages = [{"role": "user", "content": "a</s><s>b"}]
    expected = llm.chat(messages, SamplingParams(max_tokens=5))
    found = ask(chat_server, {"messages": messages, "temperature": 0, "max_tokens": 5}).json()
    assert found["choices"][0]["message"]["content"] == expected.text
    assert found["usage"]["prompt_tokens"] == len(llm.tokenizer.chat(messages, typed=True))
    assert found["usage"]["prompt_tokens"] > len(llm.tokenizer.chat(messages))


def test_the_models_own_sampling_options_are_the_defaults(packed: Callable[[str], Path]) -> None:
    path = packed("sampling")
    llm = LLM(path, 1)
    request = {"prompt": "Once", "seed": 3, "max_tokens": 20}
    ways: list[dict[str, Any]] = [{"temperature": 0.6, "top_k": 7}, {}, {"temperature": 1.0}]
    own, greedy, plain = (
        llm.generate("Once", SamplingParams(max_tokens=20, seed=3, **options))[0].text for options in ways
    )
    running = start(path)
    texts = [
        ask(running, request | changes, "completions").json()["choices"][0]["text"]
        for changes in ({}, {"temperature": 0}, {"temperature": 1.0, "top_k": 0})
    ]
    end(running)
    assert texts == [own, greedy, plain] and len({*texts}) == 3
    running = start(path, generation_config="none")
    assert ask(running, request, "completions").json()["choices"][0]["text"] == plain
    end(running)


def test_web_pages_are_let_in_by_their_origin(packed: Callable[[str], Path], chat_server: Running) -> None:
    page = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
    asks = page | {"access-control-request-headers": "content-type, authorization"}
    running = start(packed("chat"), allowed_origins=["http://localhost:3000"])
    url = f"{running.url}/v1/chat/completions"
    let_in = httpx.options(url, headers=asks, timeout=60)
    assert let_in.status_code == 200
    assert let_in.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert "POST" in let_in.headers["access-control-allow-methods"]
    stranger = httpx.options(url, headers=asks | {"origin": "http://elsewhere"}, timeout=60)
    assert stranger.status_code == 400
    refused = httpx.post(url, content=b"{", headers={"origin": page["origin"]}, timeout=60)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (400, page["origin"])
    end(running)
    answer = httpx.get(f"{chat_server.url}/v1/models", headers={"origin": page["origin"]}, timeout=60)
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("origin", ["localhost:3000", "http://a/", "http://a/b", "HTTP://a", "http://A", ""])
def test_an_origin_that_no_browser_sends_is_refused(chat_server: Running, origin: str) -> None:
    with pytest.raises(ConfigError, match="allowed_origins"):
        serve(Serve(str(chat_server.path), allowed_origins=(origin,)))


def test_other_methods_and_broken_bodies_get_error_objects_too(chat_server: Running) -> None:
    url = f"{chat_server.url}/v1/completions"
    assert httpx.get(url, timeout=60).json()["error"]["message"].startswith("GET /v1/completions")
    deep, text = b"[" * 100_000, b'{"model": "x", "prompt": "a"'
    bad = [
        b"",
        b"{",
        b"[]",
        b"\xff",
        deep,
        b'{"prompt":' + deep,
        b'{"a":' * 100_000,
        b'"\xff"',
        b"null",
        b"7",
    ]
    bad += [
        text + more
        for more in (b', "user": "\xe0"}', b"\x00}", b', "seed": NaN}', b', "top_k": ' + b"9" * 5000)
    ]
    bad += [b"\xef\xbb\xbf" + text + b"}", (text + b"}").decode().encode("utf-16"), b"[" * 900 + b"]" * 900]
    for content in bad:
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
    many = 500  # one at a time
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
    while under_way(running) == many:  # one that was answered would leave others, not none
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
