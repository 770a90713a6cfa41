"""Rows of tokens to evaluate on (packing.py and calibration.py have those to learn from).

Ids are int64; S is the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from gossamer.data import doctests
from gossamer.data.sources import END_OF_TEXT, documents, read_text
from gossamer.errors import ConfigError
from gossamer.tokens.tokenizer import Tokenizer

TOKENS_BEYOND = 64  # of a text's beginning, without which its last tokens could be others than in the whole


def evaluation_rows(
    source: str,
    tokenizer: Tokenizer,
    row_length: int = 255,
    *,
    max_rows: int | None = None,
    offline: bool = False,
) -> np.ndarray:
    """int64 [S, row_length + 1] for perplexity: the text's tokens cut into rows, BOS before each.

    Documents are joined by a newline (so an `<|endoftext|>` counts as one); the last, shorter row is dropped.
    With `max_rows` no more documents are read than these rows take.
    """
    if source.startswith("python:doctests") and doctests.number_and_seed(source)[0] is None:
        raise ConfigError(f"dataset {source!r} has no end; evaluate on python:doctests:NUM")
    path = Path(source)
    if path.suffix == ".txt" and path.is_file():
        texts: Iterable[str] = [read_text(path).replace(END_OF_TEXT, "\n")]
    else:
        texts = documents(source, offline=offline)
    ids = _beginning(texts, tokenizer, math.inf if max_rows is None else max_rows * row_length)
    num_rows = len(ids) // row_length if max_rows is None else min(len(ids) // row_length, max_rows)
    if num_rows == 0:
        raise ConfigError(f"dataset {source!r} holds {len(ids)} tokens, a row to evaluate needs {row_length}")
    rows = ids[: num_rows * row_length].reshape(num_rows, row_length)
    return np.concatenate([np.full((num_rows, 1), tokenizer.required_bos(), dtype=np.int64), rows], axis=1)


def _beginning(texts: Iterable[str], tokenizer: Tokenizer, wanted: float) -> np.ndarray:
    """int64 ids of at least so many tokens, or of all texts; each look at the text is of twice as much."""
    read: list[str] = []
    num_characters, enough = 0, 8 * wanted
    for text in texts:
        read.append(text)
        num_characters += len(text) + 1
        if num_characters >= enough:
            ids = tokenizer.encode("\n".join(read), bos=False)
            if len(ids) >= wanted + TOKENS_BEYOND:
                return np.array(ids, dtype=np.int64)
            enough = 2 * num_characters
    return np.array(tokenizer.encode("\n".join(read), bos=False), dtype=np.int64)
