"""Texts with a class, and tokens with a class each: what an encoder's head is tuned on.

classification  {"text", "text2"?, "label"}: the label is at the first token
tokens          {"tokens": [word, ...], "labels": [label, ...]}: that of a word is at its first token

A label is the name of a class or its number. Long texts are cut, of two the longer one first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gossamer.data.tables import text_of
from gossamer.errors import ConfigError
from gossamer.tokens.tokenizer import Tokenizer

IGNORED = -100


def labelled_text(
    row: Mapping[str, Any], tokenizer: Tokenizer, max_length: int, classes: Sequence[str], where: str
) -> tuple[list[int], list[int]]:
    """Tokens and labels of a row for `classification`; raises ConfigError, which names the row as `where`."""
    texts = [text_of(row, where, "text")]
    if row.get("text2") is not None:
        texts.append(text_of(row, where, "text2"))
    ids = tokenizer.encode_texts(texts, max_length)
    return ids, [class_number(row.get("label"), classes, where), *[IGNORED] * (len(ids) - 1)]


def labelled_tokens(
    row: Mapping[str, Any], tokenizer: Tokenizer, max_length: int, classes: Sequence[str], where: str
) -> tuple[list[int], list[int]]:
    """The same of a row for `tokens`."""
    words, named = words_and_labels(row, where)
    ids, word_of = tokenizer.encode_words(words, max_length)
    firsts = [word != before for word, before in zip(word_of, [None, *word_of], strict=False)]
    numbers = [class_number(label, classes, where) for label in named]
    labels = [
        numbers[word] if is_first and word is not None else IGNORED
        for word, is_first in zip(word_of, firsts, strict=True)
    ]
    return ids, labels


def words_and_labels(row: Mapping[str, Any], where: str) -> tuple[list[str], list[Any]]:
    """The fields of a row for `tokens`, as many of one as of the other; ConfigError for others."""
    words, labels = row.get("tokens"), row.get("labels")
    if not (isinstance(words, list) and words and all(isinstance(word, str) for word in words)):
        raise ConfigError(f"{where}: found tokens {words!r:.80}; expected a list of words")
    if not isinstance(labels, list) or len(labels) != len(words):
        raise ConfigError(
            f"{where}: found labels {labels!r:.80}; expected one for each of {len(words)} tokens"
        )
    return words, labels


def class_number(label: object, classes: Sequence[str], where: str) -> int:
    """The number of a class that is given by name or number."""
    if isinstance(label, str) and label in classes:
        return classes.index(label)
    if type(label) is int and 0 <= label < len(classes):
        return label
    raise ConfigError(
        f"{where}: found label {label!r:.80}; expected one of {', '.join(classes)[:200]}, or a number "
        f"from 0 to {len(classes) - 1}"
    )
