"""Rows with named fields, from .jsonl, .jsonl.zst and .parquet files and from the Hugging Face hub."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gossamer.errors import ConfigError


def table_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a .jsonl, .jsonl.zst or .parquet file, each with `file:line` for messages."""
    if path.name.endswith(".parquet"):
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(path)
        rows = (row for batch in table.iter_batches(batch_size=256) for row in batch.to_pylist())
        yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, 1))
        return
    with path.open("rb") as raw:
        for number, line in enumerate(_lines(path, raw), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}:{number}: not a line of JSON ({error})") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{path}:{number}: found {type(row).__name__}, expected an object")
            yield f"{path}:{number}", row


def _lines(path: Path, raw: io.BufferedReader) -> Iterable[str | bytes]:
    if not path.name.endswith(".zst"):
        return raw
    import zstandard

    return io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), encoding="utf-8")


def table_documents(path: Path) -> Iterator[str]:
    """The field `text` of each row of a file."""
    return (_text_field(row, where) for where, row in table_rows(path))


def hub_documents(source: str, offline: bool) -> Iterator[str]:
    """Stream a dataset of the Hugging Face hub: hf:repo[:config[:split]]."""
    if offline:
        raise ConfigError(f"dataset {source!r} has to be streamed; drop --offline or give a local file")
    from datasets import load_dataset

    repo, config, split, *rest = (*source.removeprefix("hf:").split(":"), "", "")
    if any(rest):
        raise ConfigError(f"dataset {source!r}: expected hf:repo[:config[:split]]")
    rows = load_dataset(repo, config or None, split=split or "train", streaming=True)
    for number, row in enumerate(rows, 1):
        yield _text_field(dict(row), f"{source}:{number}")


def _text_field(row: dict[str, Any], where: str) -> str:
    """The field `text` of a row; the ConfigError of a row without one names it as `where`."""
    text = row.get("text")
    if not isinstance(text, str):
        raise ConfigError(f"{where}: no text in field 'text'; found fields {sorted(row)}")
    return text
