"""The OpenAI API's shapes: requests read strictly, answers and errors as its clients expect them.

A field that would change the answer and is not supported must be absent or hold its neutral value; fields
that change nothing (`user`, `metadata`, `store`, ...) are accepted; a field nobody knows is an error. At
every depth, null is the same as absent: clients send back the nulls of an answer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from gossamer.engine import SamplingParams
from gossamer.errors import GossamerError
from gossamer.tokens.encoder import valid_text

COMPLETION_MAX_TOKENS = 16  # the API's own default for plain completions
MOST_LOGPROBS = 20  # likeliest tokens that are told of a place

Neutral = tuple[tuple[str, tuple[Any, ...]], ...]
NEUTRAL: Neutral = (
    ("n", (1, None)),
    ("best_of", (1, None)),
    ("suffix", (None, "")),
    ("presence_penalty", (0, None)),
    ("frequency_penalty", (0, None)),
    ("logit_bias", (None, {})),
    ("tools", (None, [])),
    ("functions", (None, [])),
    ("tool_choice", (None, "none", "auto")),
    ("function_call", (None, "none", "auto")),
    ("response_format", ({"type": "text"}, None)),
    ("modalities", (["text"], None)),
    ("reasoning_effort", (None, "none")),
    ("audio", (None,)),
    ("prediction", (None,)),
    ("verbosity", (None, "medium")),
    ("web_search_options", (None,)),
)
NEUTRAL_IN_MESSAGE: Neutral = (
    ("tool_calls", (None, [])),
    ("function_call", (None, {})),
    ("refusal", (None, "")),
    ("annotations", (None, [])),
    ("audio", (None,)),
    ("reasoning_content", (None, "")),
    ("reasoning", (None, "")),
    ("tool_call_id", (None, "")),
)
NEUTRAL_IN_PART: Neutral = (("annotations", (None, [])),)


class RequestError(GossamerError):
    """A request that cannot be served; becomes the API's error object with its HTTP status."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: HTTPStatus = HTTPStatus.BAD_REQUEST,
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False


class CompletionFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields that both kinds of completion share."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # harmless: they change nothing in the answer
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: Any = None
    # served with their neutral values only
    n: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many likeliest tokens to tell of each place; None: no log probabilities at all."""
        return None

    @property
    def wanted_echo(self) -> bool:
        return False

    def params(self, default_max_tokens: int | None, defaults: Mapping[str, Any]) -> SamplingParams:
        """The engine's parameters; `defaults` are the model's, and the API's own temperature is 1."""
        named = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
        wanted = {
            name: value for name in (*named, "stop_token_ids") if (value := getattr(self, name)) is not None
        }
        max_tokens = default_max_tokens if self.wanted_tokens is None else self.wanted_tokens
        more = {"max_tokens": max_tokens, "logprobs": self.wanted_logprobs, "echo": self.wanted_echo}
        return SamplingParams(**{"temperature": 1.0, **defaults, **wanted, **more})


class TextPart(Struct, forbid_unknown_fields=True, tag="text"):
    text: str
    annotations: Any = None


class ChatMessage(Struct, forbid_unknown_fields=True):
    """One chat message; what is not text (tool calls, images) must be absent or empty."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: Any = None
    function_call: Any = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_call_id: Any = None

    def plain(self) -> dict[str, Any]:
        """The message as chat templates know it; without content, as an empty answer is, it has "" there."""
        parts = self.content or ""
        content = "\n".join(part.text for part in parts) if isinstance(parts, list) else parts
        return {"role": self.role, "content": content, "name": self.name}


class ChatRequest(CompletionFields, forbid_unknown_fields=True, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Any = None
    functions: Any = None
    tool_choice: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    reasoning_effort: Any = None
    audio: Any = None
    prediction: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs is only for logprobs = true.", param="top_logprobs")
        return _checked_logprobs(self.top_logprobs or 0, "top_logprobs") if self.logprobs else None


class CompletionRequest(CompletionFields, forbid_unknown_fields=True, kw_only=True):
    prompt: str | list[Any]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: Any = None
    suffix: Any = None

    @property
    def wanted_logprobs(self) -> int | None:
        return None if self.logprobs is None else _checked_logprobs(self.logprobs, "logprobs")

    @property
    def wanted_echo(self) -> bool:
        return self.echo is True

    def prompts(self) -> list[str | list[int]]:
        """Every prompt of the request (each gets one choice): texts, or lists of token ids."""
        many = self.prompt
        if isinstance(many, str) or (many and all(type(entry) is int for entry in many)):
            return [many]
        if many and all(isinstance(entry, str) or _is_ids(entry) for entry in many):
            return many
        raise RequestError(
            "prompt must be a text, a list of texts, a list of token ids, or a list of such lists.",
            param="prompt",
        )


Body = TypeVar("Body", bound=Struct)
Completion = TypeVar("Completion", ChatRequest, CompletionRequest)


def parsed(kind: type[Body], body: bytes, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> Body:
    """A body's fields; RequestError, with that status, for what is malformed or unknown, naming the field."""
    try:
        return msgspec.convert(_cleaned(json.loads(body.decode())), kind)
    except (ValueError, RecursionError) as error:  # among them UTF-8's, JSON's and msgspec's
        found = re.search(r"field `(\w+)`|`\$\.(\w+)", str(error))
        param = next((name for name in found.groups() if name), None) if found else None
        message = f"the request body will not do: {error}"
        raise RequestError(message, param=param, status=status) from error


def read_request(kind: type[Completion], body: bytes) -> Completion:
    """Parse a body; RequestError for what is malformed, unknown or unsupported, naming the field."""
    request = parsed(kind, body)
    _check_neutral(request, NEUTRAL)
    for message in getattr(request, "messages", ()):
        _check_neutral(message, NEUTRAL_IN_MESSAGE, "messages")
        for part in message.content if isinstance(message.content, list) else ():
            _check_neutral(part, NEUTRAL_IN_PART, "messages")
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options is only for stream = true.", param="stream_options")
    return request


def error_body(
    message: str, *, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The API's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _cleaned(value: Any) -> Any:
    """Plain data without the fields that are null, and with texts that UTF-8 can write."""
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, dict):
        return {valid_text(name): _cleaned(entry) for name, entry in value.items() if entry is not None}
    return [_cleaned(entry) for entry in value] if isinstance(value, list) else value


def _check_neutral(found: Struct, table: Neutral, within: str | None = None) -> None:
    """RequestError for a field that would change the answer; `within`: the request's field that holds it."""
    for name, allowed in table:
        value = getattr(found, name, None)
        if not any(_same(value, neutral) for neutral in allowed):
            raise RequestError(
                f"{name} = {_shown(value)}{f' in {within}' if within else ''} is not supported by this "
                f"server, only {_shown(allowed[0])}: leave the field out.",
                param=within or name,
                code="unsupported_value",
            )


def _checked_logprobs(number: int, param: str) -> int:
    if 0 <= number <= MOST_LOGPROBS:
        return number
    raise RequestError(f"{param} is {number}; expected 0 to {MOST_LOGPROBS}.", param=param)


def _is_ids(entry: Any) -> bool:
    return isinstance(entry, Sequence) and bool(entry) and all(type(index) is int for index in entry)


def _same(value: Any, neutral: Any) -> bool:
    """Equality under which 0 is not false."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _shown(value: Any) -> str:
    return msgspec.json.encode(value).decode()
