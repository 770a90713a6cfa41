"""Supervised examples, prompts and the answers to learn, as tokens and labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from gossamer.data import doctests
from gossamer.data.mixture import mixture, pieces
from gossamer.data.tables import table_rows
from gossamer.errors import ConfigError
from gossamer.tokens.tokenizer import Tokenizer

DEFAULT_DOCTESTS = 20_000
IGNORED = -100
Format = Literal["chat", "instruct", "prompt-completion"]


def supervised_examples(
    source: str, format: Format, tokenizer: Tokenizer, max_length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """(input_ids, labels) of each row; labels are -100 on what the user says.

    Longer examples are cut; one whose answer is cut away wholly is left out.

    chat               {"messages": [{"role", "content"}, ...]} through the chat template
    instruct           {"instruction", "input"?, "output" or "response"}
    prompt-completion  {"prompt", "completion"}
    """
    for where, row in _supervised_rows(source, format):
        if format == "chat":
            ids, labels = _chat_example(row, tokenizer, where)
        else:
            prompt, answer = _prompt_and_answer(row, format, where)
            ids, labels = _answer_example(prompt, answer, tokenizer)
        if any(label != IGNORED for label in labels[:max_length]):
            yield ids[:max_length], labels[:max_length]


def write_completions(path: Path, source: str, num: int, seed: int, num_characters: int = 600) -> None:
    """Write `num` short pieces of a text as completions of nothing (.jsonl).

    Among fine-tuning examples they keep a model from forgetting the text it was pretrained on.
    """
    cut = (piece for text in mixture([source], seed) for piece in pieces(text, num_characters))
    with path.open("w", encoding="utf-8") as file:
        for text in islice(cut, num):
            file.write(json.dumps({"prompt": "", "completion": text}) + "\n")


def _supervised_rows(source: str, format: Format) -> Iterator[tuple[str, dict[str, Any]]]:
    if source.startswith("python:doctests"):
        if format != "prompt-completion":
            raise ConfigError(f"{source} with format {format!r}; doctests need --format prompt-completion")
        num, seed = doctests.number_and_seed(source)
        for number, item in enumerate(doctests.generate(doctests.KINDS, num or DEFAULT_DOCTESTS, seed), 1):
            yield f"{source}:{number}", {"prompt": doctests.prompt(item), "completion": doctests.answer(item)}
        return
    path = Path(source)
    if not path.is_file() or not path.name.endswith((".jsonl", ".jsonl.zst", ".parquet")):
        raise ConfigError(f"dataset {source!r}: expected a .jsonl[.zst] or .parquet file, or python:doctests")
    yield from table_rows(path)


def _prompt_and_answer(row: dict[str, Any], format: Format, where: str) -> tuple[str, str]:
    if format == "prompt-completion":
        return _field(row, where, "prompt"), _field(row, where, "completion")
    instruction, answer = _field(row, where, "instruction"), _field(row, where, "output", "response")
    extra = row.get("input")
    given = f"\n\n### Input:\n{extra}" if extra else ""
    return f"### Instruction:\n{instruction}{given}\n\n### Response:\n", answer


def _field(row: dict[str, Any], where: str, *names: str) -> str:
    for name in names:
        if isinstance(row.get(name), str):
            return row[name]
    wanted = " or ".join(repr(name) for name in names)
    raise ConfigError(f"{where}: no text in field {wanted}; found fields {sorted(row)}")


def _answer_example(prompt: str, answer: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Prompt and answer tokenized together where that keeps the prompt's tokens, else apart; then EOS."""
    prompt_ids = tokenizer.encode(prompt)
    ids = tokenizer.encode(prompt + answer)
    if ids[: len(prompt_ids)] != prompt_ids:
        ids = prompt_ids + tokenizer.encode(answer, bos=False)
    ids = ids + sorted(tokenizer.eos_ids)[:1]
    return ids, [IGNORED] * len(prompt_ids) + ids[len(prompt_ids) :]


def _chat_example(row: dict[str, Any], tokenizer: Tokenizer, where: str) -> tuple[list[int], list[int]]:
    """The rendered conversation, labelled on the assistant's turns."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{where}: no list in field 'messages'; found fields {sorted(row)}")
    for message in messages:
        if not isinstance(message, dict):
            raise ConfigError(f"{where}: a message is {type(message).__name__}, expected an object")
        _field(message, where, "role")
        _field(message, where, "content")
    ids = tokenizer.chat(messages, add_generation_prompt=False)
    labels = [IGNORED] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.chat(messages[:turn], add_generation_prompt=True) if turn else []
        upto = tokenizer.chat(messages[: turn + 1], add_generation_prompt=False)
        if ids[: len(upto)] != upto or upto[: len(before)] != before:
            raise ConfigError(f"{where}: message {turn + 1} is rendered otherwise once more messages follow")
        labels[len(before) : len(upto)] = upto[len(before) :]
    return ids, labels
