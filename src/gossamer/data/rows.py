"""Rows of tokens to evaluate on (packing.py and calibration.py have those to learn from).

Ids are int64; S is the number of rows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gossamer.data import doctests
from gossamer.data.sources import END_OF_TEXT, documents, read_text
from gossamer.errors import ConfigError
from gossamer.tokens.tokenizer import Tokenizer


def evaluation_rows(
    source: str, tokenizer: Tokenizer, row_length: int = 255, *, offline: bool = False
) -> np.ndarray:
    """int64 [S, row_length + 1] for perplexity: the whole text's tokens cut into rows, BOS before each.

    Documents are joined by a newline (so an `<|endoftext|>` counts as one); the last, shorter row is dropped.
    """
    if source.startswith("python:doctests") and doctests.number_and_seed(source)[0] is None:
        raise ConfigError(f"dataset {source!r} has no end; evaluate on python:doctests:NUM")
    path = Path(source)
    if path.suffix == ".txt" and path.is_file():
        text = read_text(path).replace(END_OF_TEXT, "\n")
    else:
        text = "\n".join(documents(source, offline=offline))
    ids = np.array(tokenizer.encode(text, bos=False), dtype=np.int64)
    num_rows = len(ids) // row_length
    if num_rows == 0:
        raise ConfigError(f"dataset {source!r} holds {len(ids)} tokens, a row to evaluate needs {row_length}")
    rows = ids[: num_rows * row_length].reshape(num_rows, row_length)
    return np.concatenate([np.full((num_rows, 1), tokenizer.required_bos(), dtype=np.int64), rows], axis=1)
