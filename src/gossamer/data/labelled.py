"""Texts with a class, and tokens with a class each: what an encoder's head is tuned on.

classification  {"text", "text2"?, "label"}: the label is at the first token
tokens          {"tokens": [word, ...], "labels": [label, ...]}: that of a word is at its first token

A label is the name of a class or its number; the head says which there are. Long texts are cut, of two the
longer one first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
    return ids, [_number(row.get("label"), classes, where), *[IGNORED] * (len(ids) - 1)]


def labelled_tokens(
    row: Mapping[str, Any], tokenizer: Tokenizer, max_length: int, classes: Sequence[str], where: str
) -> tuple[list[int], list[int]]:
    """The same of a row for `tokens`."""
    words, named = row.get("tokens"), row.get("labels")
    if not (isinstance(words, list) and words and all(isinstance(word, str) for word in words)):
        raise ConfigError(f"{where}: found tokens {words!r:.80}; expected a list of words")
    if not isinstance(named, list) or len(named) != len(words):
        raise ConfigError(
            f"{where}: found labels {named!r:.80}; expected one for each of {len(words)} tokens"
        )
    ids, word_of = tokenizer.encode_words(words, max_length)
    firsts = [word != before for word, before in zip(word_of, [None, *word_of], strict=False)]
    numbers = [_number(label, classes, where) for label in named]
    labels = [
        numbers[word] if is_first and word is not None else IGNORED
        for word, is_first in zip(word_of, firsts, strict=True)
    ]
    return ids, labels


def _number(label: object, classes: Sequence[str], where: str) -> int:
    """The number of a class that is given by name or number."""
    if isinstance(label, str) and label in classes:
        return classes.index(label)
    if type(label) is int and 0 <= label < len(classes):
        return label
    raise ConfigError(
        f"{where}: found label {label!r:.80}; expected one of {', '.join(classes)[:200]}, or a number "
        f"from 0 to {len(classes) - 1}, as the head has them (finetune --new-head makes another)"
    )


def labels_of(row: Mapping[str, Any], where: str, are_many: bool) -> list[str | int]:
    """The labels of a row, whatever a head may say of them; ConfigError for what is none."""
    name, wanted = ("labels", "a list of names or numbers") if are_many else ("label", "a name or a number")
    found = row.get(name)
    labels: Any = found if are_many else [found]
    if not isinstance(labels, list) or not all(isinstance(it, str) or type(it) is int for it in labels):
        raise ConfigError(f"{where}: found {name} {found!r:.80}; expected {wanted}")
    return labels


def class_names(labels: Collection[str | int], source: str) -> list[str]:
    """Names of the classes by their numbers: sorted, or transformers' own for those that have numbers alone.

    ConfigError for numbers that are not 0 to n - 1, for names beside numbers and for fewer than two classes.
    """
    numbers = sorted(label for label in labels if isinstance(label, int))
    if len(labels) < 2 or 0 < len(numbers) < len(labels) or numbers != [*range(len(numbers))]:
        found = ", ".join(sorted(map(repr, labels)))[:200] or "of no kind"
        raise ConfigError(
            f"{source}: found labels {found}; expected two classes or more, by their names, or by numbers "
            "from 0 on without a gap"
        )
    return [f"LABEL_{number}" for number in numbers] or sorted(map(str, labels))
