"""Supervised examples, prompts and the answers to learn, as tokens and labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from gossamer.data import doctests
from gossamer.data.answers import answer_spans, common_length, render
from gossamer.data.columns import ENDINGS, endings, example_rows
from gossamer.data.labelled import (
    IGNORED,
    class_names,
    labelled_text,
    labelled_tokens,
    read_labels,
    read_pair,
    scored_pair,
)
from gossamer.data.mixture import Mixture, pieces
from gossamer.data.questions import marked_windows, question_of, question_rows
from gossamer.data.sources import documents, parse_weight
from gossamer.data.tables import BadRows, text_of
from gossamer.errors import ConfigError
from gossamer.tokens.texts import Texts
from gossamer.tokens.tokenizer import Tokenizer

DEFAULT_DOCTESTS = 20_000
LABELLED = {"classification": labelled_text, "tokens": labelled_tokens, "sts": scored_pair}
Format = Literal["chat", "instruct", "prompt-completion", "text", "classification", "tokens", "sts", "qa"]


def supervised_examples(
    source: str,
    format: Format,
    tokenizer: Tokenizer,
    max_length: int,
    bad: BadRows | None = None,
    offline: bool = False,
    classes: Sequence[str] = (),
) -> Iterator[tuple[list[int], list[int]]]:
    """(input_ids, labels) of each row; labels are -100 on what the user says.

    Longer examples are cut; one whose answer is cut away wholly, or has no weight, is left out, and each of
    these is counted in `bad`. A row that cannot be used is a ConfigError, unless `bad` lets it pass.

    chat               {"messages": [{"role", "content", "weight"?}, ...]} through the chat template
    instruct           {"instruction", "input"?, "output" or "response"}
    prompt-completion  {"prompt", "completion"}
    text               {"text"} or {"content"}, or a document of a source of `pretrain`; all is learned

    `classification` and `tokens`, whose labels are of `classes`, and `sts` are in `labelled.py`; `qa`, whose
    questions may be several examples, is in `questions.py`.
    """
    bad = bad or BadRows()
    if format == "chat":  # what the model lacks is no row's fault
        try:
            tokenizer.check_template()
        except ConfigError as error:
            raise ConfigError(f"--format chat: {error}") from error
    elif format not in (*LABELLED, "qa"):
        tokenizer.required_eos()
    texts = Texts(tokenizer, max_length) if format in (*LABELLED, "qa") else None
    for where, row in _supervised_rows(source, format, bad, offline):
        try:
            if texts is not None:  # which cuts them
                num_cut = texts.num_cut
                found = _of_encoders(row, format, texts, classes, where)
                bad.num_shortened += texts.num_cut > num_cut
                yield from found
                continue
            if format == "chat":
                ids, labels = _chat_example(row, tokenizer, where)
            else:
                prompt, answer = _prompt_and_answer(row, format, where)
                ids, labels = _answer_example(prompt, answer, tokenizer)
        except ConfigError as error:
            bad.leave_out(error)
            continue
        if any(label != IGNORED for label in labels[:max_length]):
            bad.num_shortened += len(ids) > max_length
            yield ids[:max_length], labels[:max_length]
        elif any(label != IGNORED for label in labels):
            bad.num_cut_off += 1
        else:
            bad.num_without_answer += 1


def _of_encoders(
    row: dict[str, Any], format: Format, texts: Texts, classes: Sequence[str], where: str
) -> list[tuple[list[int], list[int]]]:
    """The example of a row, or those of a question."""
    if format != "qa":
        return [LABELLED[format](row, texts, classes, where)]
    question = question_of(row, where)
    try:
        return list(marked_windows(question, texts))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def read_classes(sources: Sequence[str], format: Format, bad: BadRows, offline: bool = False) -> list[str]:
    """Names of the classes that all rows of sources of `classification` or `tokens` have, by their numbers.

    A row that cannot be used is a ConfigError, unless `bad` lets it pass; classes that are none are, too.
    """
    found: set[str | int] = set()
    for source in sources:
        for where, row in _supervised_rows(parse_weight(source)[0], format, bad, offline):
            try:
                found.update(read_labels(row, where, "labels" if format == "tokens" else "label"))
            except ConfigError as error:
                bad.leave_out(error)
    return class_names(found, f"--dataset {' '.join(sources)}")


def read_highest_score(sources: Sequence[str], bad: BadRows, offline: bool = False) -> float:
    """What scores of `sts` are divided by to be from 0 to 1: the highest of all, or 1 where that is more."""
    highest = 1.0
    for source in sources:
        for where, row in _supervised_rows(parse_weight(source)[0], "sts", bad, offline):
            try:
                highest = max(highest, read_pair(row, where)[2])
            except ConfigError as error:
                bad.leave_out(error)
    return highest


def write_completions(path: Path, source: str, num: int, seed: int, num_characters: int = 600) -> None:
    """Write `num` short pieces of a text as completions of nothing (.jsonl).

    Among fine-tuning examples they keep a model from forgetting the text it was pretrained on.
    """
    mixture = Mixture([source], seed, repeat=True)
    cut = (part for piece in mixture for part in pieces(piece.text, num_characters))
    with path.open("w", encoding="utf-8") as file:
        for text in islice(cut, num):
            file.write(json.dumps({"prompt": "", "completion": text}) + "\n")


def _supervised_rows(
    source: str, format: Format, bad: BadRows, offline: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    if format == "text":
        yield from ((source, {"text": text}) for text in _texts(source, bad, offline) if text.strip())
        return
    if source.startswith("python:doctests"):
        if format != "prompt-completion":
            raise ConfigError(
                f"{source} with format {format!r}; doctests need --format prompt-completion or text"
            )
        num, seed = doctests.number_and_seed(source)
        for number, item in enumerate(doctests.generate(doctests.KINDS, num or DEFAULT_DOCTESTS, seed), 1):
            yield f"{source}:{number}", {"prompt": doctests.prompt(item), "completion": doctests.answer(item)}
        return
    if source.startswith("hf:"):
        from gossamer.data.hub import hub_rows

        yield from hub_rows(source, offline=offline)
        return
    path = Path(source)
    if format == "qa":
        yield from question_rows(path, bad)
        return
    if not path.is_file() or not path.name.endswith(endings(format)):
        also = "".join(f", {ending}" for ending in ENDINGS.get(format, ()))
        raise ConfigError(
            f"dataset {source!r}: expected a .jsonl[.zst]{also} or .parquet file, hf:repo or python:doctests"
        )
    yield from example_rows(path, format, bad)


def _texts(source: str, bad: BadRows, offline: bool) -> Iterator[str]:
    texts = documents(source, offline=offline, bad=bad)
    endless = source.startswith("python:doctests") and doctests.number_and_seed(source)[0] is None
    return islice(texts, DEFAULT_DOCTESTS) if endless else texts


def _prompt_and_answer(row: dict[str, Any], format: Format, where: str) -> tuple[str, str]:
    if format == "text":
        return "", row["text"]
    if format == "prompt-completion":
        prompt, answer = (text_of(row, where, name, blank=True) for name in ("prompt", "completion"))
        return prompt, answer
    instruction = text_of(row, where, "instruction", blank=True)
    answer = text_of(row, where, "output", "response", blank=True)
    extra = row.get("input")
    given = f"\n\n### Input:\n{extra}" if extra else ""
    return f"### Instruction:\n{instruction}{given}\n\n### Response:\n", answer


def _answer_example(prompt: str, answer: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Prompt and answer tokenized together where that keeps the prompt's tokens, else apart; then EOS."""
    whole = tokenizer.encode(prompt)
    begin = whole[: common_length(whole, tokenizer.encode(""))]  # BOS, and no EOS that a tokenizer may add
    prompt_ids = begin + tokenizer.encode(prompt, bos=False)
    ids = begin + tokenizer.encode(prompt + answer, bos=False)
    if ids[: len(prompt_ids)] != prompt_ids:
        ids = prompt_ids + tokenizer.encode(answer, bos=False)
    ids = [*ids, tokenizer.required_eos()]
    return ids, [IGNORED] * len(prompt_ids) + ids[len(prompt_ids) :]


def _chat_example(row: dict[str, Any], tokenizer: Tokenizer, where: str) -> tuple[list[int], list[int]]:
    """The rendered conversation, labelled on each token that has a character of an answer."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{where}: no list in field 'messages'; found fields {sorted(row)}")
    for message in messages:
        if not isinstance(message, dict):
            raise ConfigError(f"{where}: a message is {type(message).__name__}, expected an object")
        for name in ("role", "content"):
            text_of(message, where, name, blank=True)
    try:
        text = render(messages, tokenizer)
        spans = answer_spans(messages, text, tokenizer)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    learned = bytearray(len(text))
    for begin, end in spans:
        learned[begin:end] = b"\1" * (end - begin)
    ids, offsets = tokenizer.encode_with_offsets(text)
    return ids, [
        token if any(learned[begin:end]) else IGNORED
        for token, (begin, end) in zip(ids, offsets, strict=True)
    ]
