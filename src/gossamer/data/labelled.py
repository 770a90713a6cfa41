"""Texts with a class, tokens with a class each, and pairs of texts with a score: what encoders are tuned on.

classification  {"text", "text2"?, "label"}: the label is at the first token
tokens          {"tokens": [word, ...], "labels": [label, ...]}: that of a word is at its first token
sts             {"sentence1", "sentence2", "score"}: of two texts, how alike people found them

A label is the name of a class or its number; the head says which there are. Long texts are cut, of two the
longer one first (`Texts`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gossamer.data.tables import text_of
from gossamer.errors import ConfigError
from gossamer.tokens.texts import Text, Texts

IGNORED = -100
Label = str | int


def read_text(row: Mapping[str, Any], where: str) -> tuple[Text, Label]:
    """The text of a row of `classification`, or the two, and the label.

    This and the others raise ConfigError, which names the row as `where`, for a row that is none.
    """
    text = text_of(row, where, "text")
    if row.get("text2") is not None:
        return (text, text_of(row, where, "text2")), read_labels(row, where, "label")[0]
    return text, read_labels(row, where, "label")[0]


def read_words(row: Mapping[str, Any], where: str) -> tuple[list[str], list[Label]]:
    """Words and their labels, of a row of `tokens`."""
    words = row.get("tokens")
    if not (isinstance(words, list) and words and all(isinstance(word, str) for word in words)):
        raise ConfigError(f"{where}: found tokens {words!r:.80}; expected a list of words")
    labels = read_labels(row, where, "labels")
    if len(labels) != len(words):
        raise ConfigError(
            f"{where}: found labels {labels!r:.80}; expected one for each of {len(words)} tokens"
        )
    return words, labels


def read_pair(row: Mapping[str, Any], where: str) -> tuple[str, str, float]:
    """Two texts and their score, of a row of `sts`."""
    score = row.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise ConfigError(f"{where}: score is {score!r:.40}; expected a number (and sentence1, sentence2)")
    return text_of(row, where, "sentence1", "text1"), text_of(row, where, "sentence2", "text2"), score


def read_labels(row: Mapping[str, Any], where: str, name: str) -> list[Label]:
    """The labels of a row, whatever a head may say of them: its `label`, or its `labels`."""
    found = row.get(name)
    labels: Any = found if name == "labels" else [found]
    if not isinstance(labels, list):
        raise ConfigError(f"{where}: found labels {found!r:.80}; expected a list of names or numbers")
    for label in labels:
        if not isinstance(label, str) and type(label) is not int:
            raise ConfigError(f"{where}: found label {label!r:.80}; expected a name or a number")
    return labels


def labelled_text(
    row: Mapping[str, Any], texts: Texts, classes: Sequence[str], where: str
) -> tuple[list[int], list[int]]:
    """Tokens and labels of a row for `classification`."""
    text, label = read_text(row, where)
    ids = texts.encode([text])[0].ids
    return ids, [class_number(label, classes, where), *[IGNORED] * (len(ids) - 1)]


def labelled_tokens(
    row: Mapping[str, Any], texts: Texts, classes: Sequence[str], where: str
) -> tuple[list[int], list[int]]:
    """The same of a row for `tokens`."""
    words, named = read_words(row, where)
    numbers = [class_number(label, classes, where) for label in named]
    found = texts.encode_words(words)
    firsts = [word != before for word, before in zip(found.word_ids, [None, *found.word_ids], strict=False)]
    labels = [
        numbers[word] if is_first and word is not None else IGNORED
        for word, is_first in zip(found.word_ids, firsts, strict=True)
    ]
    return found.ids, labels


def class_number(label: Label, classes: Sequence[str], where: str) -> int:
    """The number of a class that is given by name or number."""
    if isinstance(label, str) and label in classes:
        return classes.index(label)
    if isinstance(label, int) and 0 <= label < len(classes):
        return label
    raise ConfigError(
        f"{where}: found label {label!r:.80}; expected one of {', '.join(classes)[:200]}, or a number "
        f"from 0 to {len(classes) - 1}, as the head has them (finetune --new-head makes another)"
    )


def class_names(labels: Collection[Label], source: str) -> list[str]:
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
