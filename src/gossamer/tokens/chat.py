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
        template = self._compiled
        plain = [_plain_message(message, index) for index, message in enumerate(messages)]
        if not plain:
            raise ConfigError("a chat needs at least one message, found none.")
        try:
            return template.render(
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
        except TEMPLATE_FAULTS as error:
            raise ConfigError(f"the model's chat template refuses these messages: {error}") from error

    @cached_property
    def _compiled(self) -> jinja2.Template:
        if self._text is None:
            raise ConfigError(
                "this model has no chat template, so it takes plain text, not chat messages. "
                "Send a plain prompt, or add chat_template.jinja to the model directory."
            )
        try:
            return _template_environment().from_string(self._text)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the model's chat template does not parse: {error} (line {error.lineno})"
            ) from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` blocks, which only mark the assistant's part for training: the body as it is."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


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
