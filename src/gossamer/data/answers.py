"""Which characters of a rendered chat the assistant said: where its answers begin and end in the text.

A template that marks them by `{% generation %}` has said so. Else it is found out by rendering: the chat up
to an answer, with the prompt for one, is what stands before it; the chat up to and including it is what it
ends. Where later messages change what stands before (templates that drop earlier reasoning, or end only the
last turn), the answer's text is where the chat differs from one with another answer in its place, and an end
token that follows it belongs to it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gossamer.errors import ConfigError
from gossamer.tokens.tokenizer import Tokenizer

Message = Mapping[str, Any]
Span = tuple[int, int]
_STAND_IN = "\ufdd2\ufdd3\ufdd2"  # noncharacters, which no text has a use for


def answer_spans(messages: Sequence[Message], text: str, tokenizer: Tokenizer) -> list[Span]:
    """(begin, end) in the rendered `text` of each answer to learn: those of weight 1, as is the default.

    ConfigError where they cannot be told apart.
    """
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    weights = [_weight(messages[turn], turn) for turn in turns]
    spans = tokenizer.generation_spans(_rendered(messages), text)
    if not spans:
        spans = [_turn_span(messages, turn, text, tokenizer) for turn in turns]
    elif len(spans) != len(turns) and not all(weights):
        raise ConfigError(
            f"the template marks {len(spans)} parts by {{% generation %}} and the chat has {len(turns)} "
            "answers, so it is not known which of them has the weight 0"
        )
    elif len(spans) != len(turns):
        return spans
    return [span for span, weight in zip(spans, weights, strict=True) if weight]


def render(messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool = False) -> str:
    """The chat's text, of which weights are no part."""
    return tokenizer.render_chat(_rendered(messages), add_generation_prompt)


def _rendered(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def _weight(message: Message, turn: int) -> bool:
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise ConfigError(f"message {turn + 1} has the weight {weight!r}; expected 0 or 1")
    return weight != 0


def _turn_span(messages: Sequence[Message], turn: int, text: str, tokenizer: Tokenizer) -> Span:
    """Where message `turn` stands in the text; its end token is part of it."""
    before = _begins(text, messages[:turn], tokenizer, add_generation_prompt=True) if turn else None
    upto = _begins(text, messages[: turn + 1], tokenizer, add_generation_prompt=False)
    if before is not None and upto is not None and before <= upto:
        return before, upto
    first, last = _content_span(messages, turn, text, tokenizer)
    begin = before if before is not None and before <= first else first
    return begin, upto if upto is not None and upto >= last else _after_end_token(text, last, tokenizer)


def _begins(
    text: str, messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool
) -> int | None:
    """The length of these messages' text if the whole text begins with it, else None."""
    try:
        part = render(messages, tokenizer, add_generation_prompt=add_generation_prompt)
    except ConfigError:  # a template may refuse a chat that ends here
        return None
    return len(part) if text.startswith(part) else None


def _content_span(messages: Sequence[Message], turn: int, text: str, tokenizer: Tokenizer) -> Span:
    """Where the text differs from that of the same chat with another answer."""
    others = [*messages[:turn], {**messages[turn], "content": _STAND_IN}, *messages[turn + 1 :]]
    other = render(others, tokenizer)
    first = common_length(text, other)
    return first, len(text) - common_length(text[first:][::-1], other[first:][::-1])


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How long two sequences are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _after_end_token(text: str, last: int, tokenizer: Tokenizer) -> int:
    """The end of an answer whose content ends at `last`: behind the end token, if that comes next."""
    rest = text[last:].lstrip()
    found = next((token for token in tokenizer.eos_texts if rest.startswith(token)), None)
    return last if found is None else len(text) - len(rest) + len(found)
