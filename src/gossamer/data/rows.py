"""Rows of tokens from sources of text: for training, calibration and evaluation.

`sources.py` says what a source is. Ids are int64; T is a row's number of tokens, S the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gossamer.data.sources import (
    END_OF_TEXT,
    doctest_options,
    documents,
    mixture,
    parse_weight,
    read_text,
)
from gossamer.errors import CalibrationError, ConfigError
from gossamer.tokens import Tokenizer


def token_rows(texts: Iterable[str], tokenizer: Tokenizer, max_length: int) -> Iterator[np.ndarray]:
    """Documents joined, each preceded by BOS, cut into rows: int64 [max_length]; the rest is dropped."""
    bos = _bos(tokenizer)
    pending: list[int] = []
    for text in texts:
        pending.append(bos)
        pending.extend(tokenizer.encode(text, bos=False))
        whole = len(pending) - len(pending) % max_length
        for start in range(0, whole, max_length):
            yield np.array(pending[start : start + max_length], dtype=np.int64)
        del pending[:whole]


def calibration_rows(
    source: str | Sequence[str],
    tokenizer: Tokenizer,
    num_samples: int,
    max_seq_length: int,
    *,
    offline: bool = False,
) -> np.ndarray:
    """int64 [num_samples, max_seq_length] from the head of one source, or from a mixture of several.

    Raises CalibrationError where the text is too short.
    """
    names = [source] if isinstance(source, str) else list(source)
    if len(names) == 1:
        texts = documents(parse_weight(names[0])[0], offline=offline)
    else:
        texts = mixture(names, 0, offline=offline)
    rows: list[np.ndarray] = []
    num_tokens = 0
    for text in texts:
        rows_left = num_samples * max_seq_length - num_tokens
        if rows_left <= 0:
            break
        ids = [_bos(tokenizer), *tokenizer.encode(text, bos=False)]
        rows.append(np.array(ids[:rows_left], dtype=np.int64))
        num_tokens += len(rows[-1])
    needed = num_samples * max_seq_length
    if num_tokens < needed:
        raise CalibrationError(
            f"calibration text {', '.join(names)} holds {num_tokens} tokens, {needed} are needed "
            f"({num_samples} samples of {max_seq_length}); give a longer text or lower "
            "--num-calibration-samples or --max-seq-length"
        )
    return np.concatenate(rows).reshape(num_samples, max_seq_length)


def evaluation_rows(
    source: str, tokenizer: Tokenizer, row_length: int = 255, *, offline: bool = False
) -> np.ndarray:
    """int64 [S, row_length + 1] for perplexity: the whole text's tokens cut into rows, BOS before each.

    Documents are joined by a newline (so an `<|endoftext|>` counts as one); the last, shorter row is dropped.
    """
    if source.startswith("python:doctests") and doctest_options(source)[0] is None:
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
    return np.concatenate([np.full((num_rows, 1), _bos(tokenizer), dtype=np.int64), rows], axis=1)


def _bos(tokenizer: Tokenizer) -> int:
    if tokenizer.bos_id is None:
        raise ConfigError("the tokenizer names no BOS token; a Llama's rows begin with one: set bos_token")
    return tokenizer.bos_id
