"""Whole texts in rows: several to a row, and none is split.

An encoder reads texts from their first token to their last, and no further. A row of T tokens holds as many
of them as fit, each between the marks that the tokenizer puts around a text ([CLS] and [SEP]); a document
longer than a row becomes several texts. The file is as `packing` has it: the first token of a text is stored
as ~id. What is left of a row is `PADDING`.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from gossamer.data.mixture import Mixture
from gossamer.data.packing import REPORT_ROWS, PackedText, encoded
from gossamer.errors import ConfigError
from gossamer.tokens.texts import marks
from gossamer.tokens.tokenizer import Tokenizer

PADDING = np.iinfo(np.int32).min
Item = TypeVar("Item")


def pack_whole(
    mixture: Mixture,
    tokenizer: Tokenizer,
    row_length: int,
    max_rows: int,
    file: Path,
    report: Callable[[int], None] = lambda num_rows: None,
) -> PackedText:
    """Write at most `max_rows` rows of whole texts; as `packing.pack`, which fills rows with parts of them.

    Raises ConfigError where there is no text.
    """
    begin_id, end_id = marks(tokenizer)
    room, digest = row_length - 2, hashlib.sha256()
    num_tokens, num_rows, num_truncated = [0] * len(mixture.num_documents), 0, 0

    def texts() -> Iterator[tuple[int, np.ndarray]]:
        """Of each text: its source and its tokens, the marks included."""
        nonlocal num_truncated
        for piece, ids in encoded(mixture, tokenizer):
            starts = range(0, len(ids), room)
            if mixture.truncate and len(ids) > room:
                starts, num_truncated = starts[:1], num_truncated + 1
            for start in starts:
                yield (
                    piece.source,
                    np.array([~begin_id, *ids[start : start + room], end_id], np.int32),
                )

    with file.open("wb") as stream:
        for row in fitted(texts(), lambda text: len(text[1]), row_length):
            row_T = np.full(row_length, PADDING, np.int32)
            joined = np.concatenate([ids for _, ids in row])
            row_T[: len(joined)] = joined
            stream.write(row_T.data)
            digest.update(row_T.data)
            for source, ids in row:
                num_tokens[source] += len(ids) - 2
            num_rows += 1
            if num_rows % REPORT_ROWS == 0:
                report(num_rows)
            if num_rows == max_rows:
                break
        stream.flush()
        os.fsync(stream.fileno())
    if not num_rows:
        raise ConfigError("the dataset holds no text; give some")
    return PackedText(
        num_rows,
        row_length,
        digest.hexdigest(),
        mixture.num_documents,
        num_tokens,
        num_truncated,
        mixture.used_up if num_rows < max_rows else None,
    )


def row_lengths(rows_ST: np.ndarray) -> np.ndarray:
    """How many tokens of each row are not padding."""
    return np.array([np.count_nonzero(row_T != PADDING) for row_T in rows_ST], np.int64)


def fitted(
    items: Iterable[Item], size: Callable[[Item], int], room: int, num_open: int = 16
) -> Iterator[list[Item]]:
    """Items that fill a row of `room` each: best fit over `num_open` open rows.

    If an item fits in none of them, the fullest is closed.
    """
    open_rows: list[tuple[int, list[Item]]] = []
    for item in items:
        fitting = [i for i, (used, _) in enumerate(open_rows) if used + size(item) <= room]
        if fitting:
            best = max(fitting, key=lambda i: open_rows[i][0])
            used, members = open_rows[best]
            members.append(item)
            open_rows[best] = (used + size(item), members)
            continue
        if len(open_rows) == num_open:
            fullest = max(range(num_open), key=lambda i: open_rows[i][0])
            yield open_rows.pop(fullest)[1]
        open_rows.append((size(item), [item]))
    yield from (members for _, members in open_rows)
