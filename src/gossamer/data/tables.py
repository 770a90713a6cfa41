"""Rows with named fields, from .jsonl, .jsonl.zst and .parquet files and from the Hugging Face hub."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from gossamer.checkpoint.diagnosis import is_lfs_pointer
from gossamer.data.damage import damaged
from gossamer.errors import ConfigError

TABLES = (".jsonl", ".jsonl.zst", ".parquet")
_CHUNK_BYTES = 1 << 16
_MAX_WINDOW_BYTES = 1 << 31  # the longest that zstd writes


@dataclass
class BadRows:
    """Rows that cannot be used: up to `allowed` are left out, and `found` says why; one more is an error.

    Rows that could be used, and of which not all is learned: `num_without_answer` have nothing to learn,
    `num_cut_off` nothing in the tokens that are kept, `num_shortened` more than those.
    """

    allowed: int = 0
    found: list[str] = field(default_factory=list)
    num_without_answer: int = 0
    num_cut_off: int = 0
    num_shortened: int = 0

    def leave_out(self, error: ConfigError) -> None:
        """Note a row, or raise ConfigError where there are too many."""
        if len(self.found) >= self.allowed:
            before = f" (after {self.allowed} left out, the first: {self.found[0]})" if self.allowed else ""
            raise ConfigError(
                f"{error}{before}; mend the row, or give --skip-bad-rows N to go on without up to N"
            ) from error
        self.found.append(str(error))

    def notes(self) -> Iterator[str]:
        """What the user should know of the rows that were left out."""
        if self.found:
            yield f"left out {len(self.found)} rows that cannot be used: {'; '.join(self.found[:3])}"


def table_rows(path: Path, bad: BadRows | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a .jsonl, .jsonl.zst or .parquet file, each with `file:line` for messages.

    ConfigError for a file that is damaged, and for a line that is no row unless `bad` lets it pass.
    """
    if path.name.endswith(".parquet"):
        yield from ((f"{path}:{number}", row) for number, row in enumerate(_parquet_rows(path), 1))
        return
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}:{number}"
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            row = _row(line, where) if line.strip() else None
        except ConfigError as error:
            if bad is None:
                raise
            bad.leave_out(error)
        else:
            if row is not None:
                yield where, row


def _row(line: bytes, where: str) -> dict[str, Any]:
    """The object of one line of JSON."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 ({error}); convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not a line of JSON ({error})") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: found {type(row).__name__}, expected an object")
    return row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's
            raise
        raise damaged(path, error) from error


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, which end in a line feed and in nothing else."""
    if is_lfs_pointer(path):
        raise damaged(path, "a pointer")
    with path.open("rb") as raw:
        yield from _zst_lines(path, raw) if path.name.endswith(".zst") else raw


def _zst_lines(path: Path, raw: IO[bytes]) -> Iterator[bytes]:
    """The lines of a compressed file of any number of frames; ConfigError where it ends within one."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
    frame, rest = None, b""
    try:
        for chunk in iter(lambda: raw.read(_CHUNK_BYTES), b""):
            while chunk:
                frame = frame or decompressor.decompressobj()
                rest += frame.decompress(chunk)
                chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
            *lines, rest = rest.split(b"\n")
            yield from lines
    except zstandard.ZstdError as error:
        raise damaged(path, error) from error
    if frame is not None:
        raise damaged(path, "it ends too early")
    yield rest


def table_documents(path: Path, bad: BadRows | None = None) -> Iterator[str]:
    """The text of each row of a file."""
    return _texts(table_rows(path, bad), bad)


def hub_documents(source: str, offline: bool, bad: BadRows | None = None) -> Iterator[str]:
    """The text of each row of a dataset of the hub."""
    from gossamer.data.hub import hub_rows

    return _texts(hub_rows(source, offline=offline), bad)


def _texts(rows: Iterable[tuple[str, dict[str, Any]]], bad: BadRows | None) -> Iterator[str]:
    for where, row in rows:
        try:
            text = text_of(row, where, "text", "content", blank=True)  # The Stack's have content
        except ConfigError as error:
            if bad is None:
                raise
            bad.leave_out(error)
        else:
            yield text


def text_of(row: Mapping[str, Any], where: str, *names: str, blank: bool = False) -> str:
    """The first of the fields `names` that holds text; it has more than white space in it, unless `blank`.

    Where none does it is a ConfigError, which names the row as `where` and says what is there instead.
    """
    for name in names:
        if isinstance(text := row.get(name), str) and (blank or text.strip()):
            return text
    *others, last = names
    wanted = f"{', '.join(others)} or {last}" if others else last
    raise ConfigError(f"{where}: expected text in the field {wanted}; found {_what_is_in(row, *names)}")


def _what_is_in(row: Mapping[str, Any], *names: str) -> str:
    """The first of the fields `names` with its value in short, or which fields there are instead."""
    there = next((name for name in names if name in row), None)
    if there is None:
        return f"fields {sorted(row)}"
    written = json.dumps(row[there], default=str)
    return f"{written if len(written) <= 40 else written[:40] + '...'} in {there!r}"


def check_table(path: Path, asked: str, kinds: Sequence[str] = TABLES) -> None:
    """Raise ConfigError, which begins with what was `asked` for, unless there is a file of these kinds."""
    expected = f"expected a {', '.join(kinds[:-1])} or {kinds[-1]} file"
    if not path.exists():
        raise ConfigError(f"{asked}: no such file; {expected}")
    if not path.is_file() or not path.name.endswith(tuple(kinds)):
        raise ConfigError(
            f"{asked}: found {'a folder' if path.is_dir() else 'another kind of file'}; {expected}"
        )
