"""Texts that people typed, on their way to ids: what is no text in UTF-8, and control tokens in a chat.

A chat template joins the control tokens of a model with what people wrote. Who writes `<|im_end|>` in a
message means the text: its characters become ordinary tokens, or a user could write the system's part.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import tokenizers

from gossamer.tokens.encoder import valid_text

# A typed control token by its number, between halves of a surrogate pair, which no well-formed text has.
HIDDEN = re.compile("\ud800([0-9]+)\ud800")
NOTHING = r"(?!)"  # a pattern that is nowhere


class TypedChats:
    """Hides the control tokens in messages from a template, and makes ids of what the template renders."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, special_ids: Mapping[str, int]) -> None:
        self._special_ids = {text: index for text, index in special_ids.items() if text}
        self._control = {index: text for text, index in self._special_ids.items()}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or NOTHING)
        self._numbers = {text: number for number, text in enumerate(longest_first)}
        self._texts = longest_first
        flagged = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        spaced = (_with_spaces(flagged[text]) for text in longest_first)
        self._spaced_special = re.compile("|".join(spaced) or NOTHING)
        self._document = tokenizer.to_str()
        self._ordinary = cache(self._ordinary_tokenizer)

    def hide(self, messages: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The messages, well-formed, with a mark for each control token in their texts, at every depth."""
        return [_with_texts(message, lambda text: self._hide(valid_text(text))) for message in messages]

    def encode(self, text: str) -> list[int] | None:
        """Ids of a rendered chat; None where it hides nothing, so that any tokenizer reads it rightly."""
        if not HIDDEN.search(text):
            return None
        ids: list[int] = []
        end = 0
        for found in self._spaced_special.finditer(text):
            ids += self._encode_ordinary(text[end : found.start()], end)
            ids.append(self._special_ids.get(found[0], self._special_ids.get(found[0].strip(), 0)))
            end = found.end()
        return ids + self._encode_ordinary(text[end:], end)

    def _hide(self, text: str) -> str:
        return self._special.sub(lambda found: f"\ud800{self._numbers[found[0]]}\ud800", text)

    def _encode_ordinary(self, text: str, start: int) -> list[int]:
        """Ids of a piece that begins at `start` and in which every text is ordinary."""
        if not text:
            return []
        shown = HIDDEN.sub(lambda found: self._texts[int(found[1])], text)
        tokenizer, ids = self._ordinary(start == 0), list[int]()
        encoding = tokenizer.encode(shown, add_special_tokens=False)
        for index, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            control = self._control.get(index)
            if control and control in shown[first:last]:  # SentencePiece has it among its pieces as well
                ids += [token.id for letter in control for token in tokenizer.model.tokenize(letter)]
            else:
                ids.append(index)
        return ids

    def _ordinary_tokenizer(self, first: bool) -> tokenizers.Tokenizer:
        """One that knows no control tokens; `first`: with the space that only a text's beginning gets."""
        document = self._document
        if not first:
            document = document.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
        built = tokenizers.Tokenizer.from_str(document)
        built.encode_special_tokens = True
        return built


def _with_spaces(token: tokenizers.AddedToken) -> str:
    """A pattern of the token and of the white space around it that it takes in."""
    before, after = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
    return before + re.escape(token.content) + after


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of plain data with every text but the keys changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _with_texts(entry, change) for key, entry in value.items()}
    return [_with_texts(entry, change) for entry in value] if isinstance(value, list | tuple) else value
