"""Documents packed into whole rows of tokens, in a file: what `pretrain` reads.

A row of T tokens is full. It begins with BOS, and so does every document in it: what does not fit into a row
goes on in the next one, after another BOS. Where the tokenizer itself adds none, only every second row is so,
and the others do without: such a model is asked both ways, and one that was trained always to find BOS first
computes badly without it. The file holds int32 [rows, T]; the first token of a document, or of a part of one,
is stored as ~id, which is negative, so that attention and loss end at its border.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.data.mixture import Mixture, Piece
from gossamer.errors import ConfigError
from gossamer.job.room import Need, check_room
from gossamer.tokens.tokenizer import Tokenizer

FOLDER, ROWS, RECORD = "rows", "rows.i32", "rows.json"  # in the directory of a run, while it lasts
BATCH_PIECES = 256
REPORT_ROWS = 1024
CHARACTERS_A_TOKEN = 4  # about, so that pieces of documents fill about a row


@dataclass(frozen=True)
class PackedText:
    """What `pack` wrote: `num_rows` rows of `row_length` tokens, and the sha256 of the file.

    Of each source: `num_documents` that were read, and `num_tokens` that are in the rows, without BOS.
    `num_truncated`: documents of which only the beginning was taken; `used_up`: the source that ended before
    there were as many rows as were asked for.
    """

    num_rows: int
    row_length: int
    sha256: str
    num_documents: list[int]
    num_tokens: list[int]
    num_truncated: int
    used_up: str | None

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        return 4 * self.num_rows * self.row_length


def pack(
    mixture: Mixture,
    tokenizer: Tokenizer,
    row_length: int,
    max_rows: int,
    file: Path,
    report: Callable[[int], None] = lambda num_rows: None,
) -> PackedText:
    """Write at most `max_rows` rows of `row_length` tokens; what would not fill a row is left out.

    report: is told after every `REPORT_ROWS` rows how many there are. Raises ConfigError where there is not
    one row.
    """
    bos, always, digest = [tokenizer.required_bos()], tokenizer.adds_bos, hashlib.sha256()
    row_T, used, num_rows, num_truncated = np.empty(row_length, np.int32), 0, 0, 0
    num_tokens = [0] * len(mixture.num_documents)
    with file.open("wb") as stream:
        for piece, ids in encoded(mixture, tokenizer):
            if mixture.truncate and len(ids) >= row_length:
                ids, num_truncated = ids[: row_length - 1], num_truncated + 1
            begin = 0
            while begin < len(ids) and num_rows < max_rows:
                first = bos if always or num_rows % 2 == 0 else []
                taken = ids[begin : begin + row_length - used - len(first)]
                part = np.concatenate([first, taken]).astype(np.int32)
                part[0] = ~part[0]
                row_T[used : used + len(part)] = part
                begin, used = begin + len(taken), used + len(part)
                num_tokens[piece.source] += len(taken)
                if used == row_length:
                    stream.write(row_T.data)
                    digest.update(row_T.data)
                    used, num_rows = 0, num_rows + 1
                    if num_rows % REPORT_ROWS == 0:
                        report(num_rows)
            if num_rows == max_rows:
                break
        stream.flush()
        os.fsync(stream.fileno())
    if not num_rows:
        ended = "" if len(num_tokens) == 1 else f"{mixture.used_up} is used up and ends the mixture: "
        raise ConfigError(
            f"{ended}the dataset holds {sum(num_tokens)} tokens, which do not fill a row of {row_length}; "
            "give more text, --repeat, or a lower --max-length"
        )
    return PackedText(
        num_rows,
        row_length,
        digest.hexdigest(),
        mixture.num_documents,
        num_tokens,
        num_truncated,
        mixture.used_up if num_rows < max_rows else None,
    )


def pack_once(
    mixture: Mixture,
    tokenizer: Tokenizer,
    row_length: int,
    max_rows: int,
    folder: Path,
    decided: Mapping[str, Any],
    report: Callable[[int], None] = lambda num_rows: None,
    note: Callable[[str], None] = lambda text: None,
    beside: Sequence[Need] = (),
    packer: Callable[..., PackedText] = pack,
) -> PackedText:
    """What an earlier run packed into `folder` if all that `decided` its rows was the same, else packed now.

    `report` is the packer's, `pack` or `whole_texts.pack_whole`. `note` is told of rows that are not as they
    were written, and so are packed anew: the same text gives the same rows, also to a run that is resumed.
    Raises OSError, before packing, where a disk has no room for `max_rows` rows and what is needed `beside`
    them.
    """
    decided = {**decided, "row_length": row_length, "max_rows": max_rows}
    file, record = folder / ROWS, folder / RECORD
    if record.is_file() and file.is_file():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # another version's record is no use
            found = json.loads(record.read_text(encoding="utf-8"))
            packed, same = PackedText(**found["packed"]), found["decided"] == json.loads(json.dumps(decided))
            if same and (damaged := _damage(file, packed)) is None:
                return packed
            if same:
                note(f"the rows that an earlier run packed are damaged ({damaged}): they are packed anew")
    folder.mkdir(parents=True, exist_ok=True)
    num_tokens, there = max_rows * row_length, file.stat().st_size if file.is_file() else 0
    rows = Need(folder, max(0, 4 * num_tokens - there), f"packing {num_tokens:,} tokens", 4)
    check_room([rows, *beside], "lower --num-tokens (no more than the text holds are needed)")
    record.unlink(missing_ok=True)
    try:
        packed = packer(mixture, tokenizer, row_length, max_rows, file, report)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        advice = "no room for the text's tokens, 4 bytes each: make some, or lower --num-tokens"
        raise OSError(errno.ENOSPC, advice, str(file)) from error
    staged = folder / f"{RECORD}.new"
    staged.write_text(json.dumps({"decided": decided, "packed": asdict(packed)}), encoding="utf-8")
    staged.replace(record)
    return packed


def _damage(file: Path, packed: PackedText) -> str | None:
    """How the file differs from what was written, or None."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found == packed.sha256:
        return None
    return f"{file.name}: found sha256 {found[:12]}, expected {packed.sha256[:12]}"


def read_rows(folder: Path, packed: PackedText) -> np.ndarray:
    """The rows, int32 [rows, T], mapped from the file."""
    return np.memmap(folder / ROWS, np.int32, "r", shape=(packed.num_rows, packed.row_length))


def encoded(mixture: Mixture, tokenizer: Tokenizer) -> Iterator[tuple[Piece, np.ndarray]]:
    """Pieces with their ids, int32 [n]; a batch is tokenized, on all cores, while another is packed."""

    def encode(batch: list[Piece]) -> list[np.ndarray]:
        return tokenizer.encode_batch([piece.text for piece in batch])

    source = iter(mixture)
    with ThreadPoolExecutor(1) as worker:
        batch = list(islice(source, BATCH_PIECES))
        found = worker.submit(encode, batch)
        while batch:
            following = list(islice(source, BATCH_PIECES))
            ids, found = found.result(), worker.submit(encode, following)
            yield from zip(batch, ids, strict=True)
            batch = following
