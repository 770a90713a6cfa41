"""Questions about a text, answered by spans of it: SQuAD's own nested JSON, and tables of one question a row.

    {"question", "context", "answers", "id"?}       of .jsonl[.zst] and .parquet, as the hub has SQuAD
    {"data": [{"paragraphs": [{"context", "qas": [{"question", "id", "answers"}]}]}]}       of .json

Answers are {"text": [...], "answer_start": [...]} or [{"text", "answer_start"}, ...]; where there is
none, the context has no answer. Starts count characters.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.data.labelled import IGNORED
from gossamer.data.tables import TABLES, BadRows, table_rows, text_of
from gossamer.errors import ConfigError
from gossamer.tokens.texts import Texts

NESTED = ".json"
FIRST, LAST = 1, 2  # marks of tokens, added up where an answer is one token
STRIDE = 128  # tokens that two windows of a context share, as in transformers' recipe for SQuAD


@dataclass(frozen=True)
class Question:
    """A question about `context`; `answers[i]` begins at its character `starts[i]`, and none is no answer."""

    id: str
    question: str
    context: str
    answers: list[str]
    starts: list[int]


def read_questions(path: Path, bad: BadRows | None = None) -> list[Question]:
    """The questions of a file.

    ConfigError for a file that is none, and for a row that is none or whose answers are not where it says,
    unless `bad` lets it pass.
    """
    found: list[Question] = []
    for where, row in question_rows(path, bad):
        try:
            found.append(question_of(row, where))
        except ConfigError as error:
            if bad is None:
                raise
            bad.leave_out(error)
    return found


def question_rows(path: Path, bad: BadRows | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with its place for messages; errors as those of `read_questions`."""
    if not path.is_file() or not path.name.endswith((*TABLES, NESTED)):
        raise ConfigError(f"{path}: expected a file of questions, {', '.join((*TABLES, NESTED))}")
    return _nested(path) if path.name.endswith(NESTED) else table_rows(path, bad)


def question_of(row: Mapping[str, Any], where: str) -> Question:
    """The question of one row, whose `id` is `where` if it has none."""
    question, context = text_of(row, where, "question"), text_of(row, where, "context")
    answers = _answers(row.get("answers"), where)
    for text, start in answers:
        if start < 0 or context[start : start + len(text)] != text:
            there = context[max(0, start) : max(0, start) + len(text)]
            raise ConfigError(
                f"{where}: found the answer {text!r:.60} at character {start}, where the context has "
                f"{there!r:.60}; expected the answer itself"
            )
    return Question(
        str(row.get("id") or where), question, context, [it for it, _ in answers], [at for _, at in answers]
    )


def marked_windows(question: Question, texts: Texts) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens and marks of the question with each window of its context.

    A window that has all of the first answer marks its `FIRST` and its `LAST` token, any other the text's
    first token as both. Tokens without a mark have -100.
    """
    begin = question.starts[0] if question.answers else 0
    end = begin + len(question.answers[0]) if question.answers else 0
    for window in texts.encode_windows(question.question, question.context, STRIDE):
        spans = [(at, *window.offsets[at]) for at, text in enumerate(window.sequence_ids) if text == 1]
        inside = [span for span in spans if span[2] > begin and span[1] < end]
        first = last = 0
        if inside and spans[0][1] <= begin and end <= spans[-1][2]:
            first, last = inside[0][0], inside[-1][0]
        marks = [IGNORED] * len(window.ids)
        marks[first], marks[last] = (FIRST, LAST) if first < last else (FIRST + LAST, FIRST + LAST)
        yield window.ids, marks


def _answers(found: object, where: str) -> list[tuple[str, int]]:
    pairs: Any
    if isinstance(found, Mapping):
        texts, starts = found.get("text"), found.get("answer_start")
        if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
            pairs = list(zip(texts, starts, strict=True))
        else:
            pairs = [(texts, starts)]
    elif isinstance(found, list):
        pairs = [
            (it.get("text"), it.get("answer_start")) if isinstance(it, dict) else (it, None) for it in found
        ]
    else:
        pairs = [(found, None)]
    for text, start in pairs:
        if not isinstance(text, str) or not text.strip() or type(start) is not int:
            raise ConfigError(
                f"{where}: found answers {found!r:.80}; expected text and answer_start of each, or empty "
                "lists where the context has no answer"
            )
    return pairs


def _nested(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The questions of SQuAD's JSON as rows; messages count articles and paragraphs from 1 on."""
    try:
        articles = json.loads(path.read_bytes().decode("utf-8-sig"))["data"]
        paragraphs = [
            (f"{path}: article {number}, paragraph {at}", paragraph["context"], paragraph["qas"])
            for number, article in enumerate(articles, 1)
            for at, paragraph in enumerate(article["paragraphs"], 1)
        ]
        rows = [
            (f"{where}, question {it.get('id')}", {**it, "context": context})
            for where, context, questions in paragraphs
            for it in questions
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path}: not SQuAD's JSON ({type(error).__name__}: {error}); expected data, paragraphs and qas "
            "within one another, or a .jsonl of question, context, answers"
        ) from error
    yield from rows
