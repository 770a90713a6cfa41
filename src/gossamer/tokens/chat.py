"""Chats as text, by the template that comes with a model.

A template is a Jinja program by whoever made the model, so it runs in a sandbox, with the functions and the
treatment of white space that transformers gives it.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from gossamer.errors import ConfigError

TEMPLATE_FAULTS = (  # what a program in a sandbox can still do wrong
    *(jinja2.TemplateError, ArithmeticError, AttributeError),
    *(LookupError, RecursionError, TypeError, ValueError),
)

_GENERATION_MARKS = {  # variables of templates, and noncharacters, which no text has a use for
    "generation_begins_here": "\ufdd0", "generation_ends_here": "\ufdd1"
}  # fmt: skip


class ChatTemplate:
    """A model's template, or that it has none (None), which is an error only once a chat comes."""

    def __init__(self, text: str | None) -> None:
        self._text = text

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        special_tokens: Mapping[str, str],
        add_generation_prompt: bool = True,
    ) -> str:
        """The chat as one text; ConfigError without a template, or when it objects to the messages."""
        return self._render(messages, {**special_tokens, "add_generation_prompt": add_generation_prompt})

    def check(self) -> None:
        """Raise ConfigError without a template, or with one that does not parse."""
        _ = self._compiled

    def generation_spans(
        self, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, str], text: str
    ) -> list[tuple[int, int]]:
        """(begin, end) of each `{% generation %}` block in the chat's `text`, as `render` gave it.

        Empty for a template that has no such blocks, or cuts their texts to pieces.
        """
        marked = self._render(
            messages, {**special_tokens, **_GENERATION_MARKS, "add_generation_prompt": False}
        )
        begin, end = _GENERATION_MARKS.values()
        plain, *blocks = marked.split(begin)
        spans = []
        for block in blocks:
            inside, mark, outside = block.partition(end)
            spans.append((len(plain), len(plain) + len(inside)) if mark else (0, 0))
            plain += inside + outside
        return spans if plain == text else []

    def _render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        template = self._compiled
        plain = [_plain_message(message, index) for index, message in enumerate(messages)]
        if not plain:
            raise ConfigError("a chat needs at least one message, found none.")
        try:
            return template.render({"messages": plain, "tools": None, "documents": None, **variables})
        except TEMPLATE_FAULTS as error:
            raise ConfigError(f"the model's chat template refuses these messages: {error}") from error

    @cached_property
    def _compiled(self) -> jinja2.Template:
        if self._text is None:
            raise ConfigError(
                "this model has no chat template, so it takes plain text, not chat messages. "
                "Give it plain text, or add chat_template.jinja to the model directory."
            )
        try:
            return _template_environment().from_string(self._text)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the model's chat template does not parse: {error} (line {error.lineno})"
            ) from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` blocks, which mark the assistant's part for training.

    The body is rendered as it is, between two variables that are empty unless `generation_spans` sets them.
    """

    tags: ClassVar = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            jinja2.nodes.Output([jinja2.nodes.Name(name, "load")], lineno=line) for name in _GENERATION_MARKS
        )
        return [begin, *body, end]


def _template_environment() -> jinja2.Environment:
    """The sandbox that chat templates are written for (transformers' functions and white space rules)."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _plain_message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Drop None fields, as transformers does; a message needs a role."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ConfigError(
            f'message {index} of the chat is {message!r}; expected {{"role": ..., "content": ...}}.'
        )
    return {key: value for key, value in message.items() if value is not None}
