"""Sources of text and rows of tokens.

A source `SRC` is one of

    path            .txt, .jsonl, .jsonl.zst, .parquet, a folder of .py/.txt, a .tar.gz of them
    python:stdlib   this interpreter's own library, without tests, tables and the held-out files
    python:stdlib:held-out          the files of `HELD_OUT`, for evaluation only
    python:doctests[:NUM[:SEED]]    generated examples (`>>> sorted("bca")` and its answer); see doctests.py
    hf:repo[:config[:split]]        a Hugging Face dataset, streamed

and in a mixture `SRC@WEIGHT`, the weight being the source's share of the characters.
A .txt holds one document, or several separated by `<|endoftext|>`; the other formats have a field `text`.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import sysconfig
import tarfile
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from gossamer.data import doctests
from gossamer.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
HELD_OUT = (
    "bisect.py", "calendar.py", "colorsys.py", "fractions.py", "graphlib.py",
    "heapq.py", "queue.py", "shlex.py", "string.py", "textwrap.py",
)  # fmt: skip
LEFT_OUT_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)
PIECE_CHARACTERS = 4096
SHUFFLE_PIECES = 1024
SUPPORTED = (
    "a .txt, .jsonl, .jsonl.zst or .parquet file, a folder or .tar.gz of .py/.txt files, "
    "python:stdlib, python:stdlib:held-out, python:doctests[:NUM[:SEED]] or hf:repo[:config[:split]]"
)


def documents(source: str, *, offline: bool = False) -> Iterator[str]:
    """The texts of a source, in its order; `python:doctests` without a number never ends."""
    if source == "python:stdlib" or source == "python:stdlib:held-out":
        return (_read_python(path) for path in _stdlib_files(source.endswith("held-out")))
    if source.startswith("python:doctests"):
        num, seed = doctest_options(source)
        return islice(doctests.documents(seed), num)
    if source.startswith("hf:"):
        return _hub_documents(source, offline)
    path = Path(source)
    if path.is_dir():
        return (read_text(file) for file in _folder_files(path))
    if not path.is_file():
        raise ConfigError(f"dataset {source!r}: no such file or folder; a source is {SUPPORTED}")
    return _file_documents(path)


def _file_documents(path: Path) -> Iterator[str]:
    """Dispatch on the file's name."""
    if path.name.endswith((".jsonl", ".jsonl.zst", ".parquet")):
        return (_text_field(row, where) for where, row in table_rows(path))
    if path.name.endswith((".tar.gz", ".tgz")):
        return _tar_documents(path)
    if path.name.endswith((".txt", ".py")):
        pieces = read_text(path).split(END_OF_TEXT)
        return iter(pieces) if len(pieces) == 1 else (piece.strip("\n") for piece in pieces if piece.strip())
    raise ConfigError(f"dataset {str(path)!r}: unknown kind of file; a source is {SUPPORTED}")


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


def _text_field(row: dict[str, Any], where: str) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        raise ConfigError(f"{where}: no text in field 'text'; found fields {sorted(row)}")
    return text


def _tar_documents(path: Path) -> Iterator[str]:
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith((".py", ".txt")) else None
            if file is not None:
                yield _decode(file.read(), f"{path}:{member.name}", python=member.name.endswith(".py"))


def _hub_documents(source: str, offline: bool) -> Iterator[str]:
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


def _stdlib_files(held_out: bool) -> list[Path]:
    library = Path(sysconfig.get_path("stdlib"))
    if held_out:
        return [library / name for name in HELD_OUT]
    names = (path.relative_to(library) for path in library.rglob("*.py"))
    kept = (name for name in names if not LEFT_OUT_FOLDERS & set(name.parts) and str(name) not in HELD_OUT)
    return [library / name for name in sorted(kept)]


def _folder_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".txt") and path.is_file())
    if not files:
        raise ConfigError(f"dataset {str(folder)!r}: no .py or .txt file in this folder")
    return files


def _read_python(path: Path) -> str:
    return _decode(path.read_bytes(), str(path), python=True)


def read_text(path: Path) -> str:
    return _decode(path.read_bytes(), str(path), python=path.suffix == ".py")


def _decode(raw: bytes, where: str, *, python: bool) -> str:
    """Text of a file: UTF-8, or what a Python file's coding line says."""
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(raw).readline)[0] if python else "utf-8"
        return raw.decode(encoding)
    except (UnicodeDecodeError, SyntaxError, LookupError) as error:
        raise ConfigError(f"{where}: not text in its encoding ({error}); convert it to UTF-8") from error


def doctest_options(source: str) -> tuple[int | None, int]:
    """(number or None, seed) of python:doctests[:NUM[:SEED]]."""
    fields = source.split(":")[2:]
    if len(fields) > 2 or not all(field.isdecimal() for field in fields) or source.count("doctests:") > 1:
        raise ConfigError(f"dataset {source!r}: expected python:doctests[:NUM[:SEED]]")
    numbers = [int(field) for field in fields]
    return (numbers[0] if numbers else None), (numbers[1] if len(numbers) > 1 else 0)


def parse_weight(source: str) -> tuple[str, float]:
    """`SRC[@WEIGHT]` -> (SRC, weight), weight 1 where none is given."""
    name, at, weight = source.rpartition("@")
    if not at or "/" in weight:
        return source, 1.0
    try:
        value = float(weight)
    except ValueError:
        return source, 1.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"dataset {source!r}: the weight is {weight}, expected a number above 0")
    return name, value


def mixture(sources: Sequence[str], seed: int, *, offline: bool = False) -> Iterator[str]:
    """Pieces of the sources' documents without end, shuffled, in proportion to the weights.

    A weight is a share of the characters. Documents are cut at line ends into pieces of at most
    `PIECE_CHARACTERS`, so that sources interleave finely; a source that is used up begins again.
    """
    weighted = [parse_weight(source) for source in sources]
    if not weighted:
        raise ConfigError("no dataset given; pass at least one SRC")
    streams = [_shuffled(name, seed + index, offline) for index, (name, _) in enumerate(weighted)]
    given = [0.0] * len(streams)
    while True:
        next_index = min(range(len(streams)), key=lambda i: given[i])
        piece = next(streams[next_index])
        given[next_index] += len(piece) / weighted[next_index][1]
        yield piece


def _shuffled(source: str, seed: int, offline: bool) -> Iterator[str]:
    """Pieces of one source for ever, shuffled through a buffer of `SHUFFLE_PIECES`."""
    chance = random.Random(seed)
    buffer: list[str] = []
    for piece in _endless_pieces(source, seed, offline):
        if len(buffer) < SHUFFLE_PIECES:
            buffer.append(piece)
            continue
        slot = chance.randrange(SHUFFLE_PIECES)
        buffer[slot], piece = piece, buffer[slot]
        yield piece


def _endless_pieces(source: str, seed: int, offline: bool) -> Iterator[str]:
    if source == "python:doctests":
        yield from doctests.documents(seed)
    while True:
        empty = True
        for text in documents(source, offline=offline):
            for piece in pieces(text):
                empty = False
                yield piece
        if empty:
            raise ConfigError(f"dataset {source!r} holds no text")


def pieces(text: str, limit: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a text at line ends into pieces of at most `limit` characters (a longer line stays whole)."""
    piece: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        if piece and length + len(line) > limit:
            yield "".join(piece)
            piece, length = [], 0
        piece.append(line)
        length += len(line)
    if piece:
        yield "".join(piece)


def manifest(source: str) -> dict[str, Any]:
    """What a source is, for gossamer.json: kind, number of files, bytes, sha256."""
    name, weight = parse_weight(source)
    known = {"source": name, "weight": weight}
    if name.startswith("hf:"):
        return {**known, "kind": "hub"}
    if name.startswith("python:doctests"):
        digest = hashlib.sha256(Path(doctests.__file__).read_bytes()).hexdigest()
        return {**known, "kind": "doctests", "generator_sha256": digest}
    if name.startswith("python:stdlib"):
        return {**known, "kind": "stdlib", **_files_digest(_stdlib_files("held-out" in name))}
    path = Path(name)
    if not path.exists():
        raise ConfigError(f"dataset {name!r}: no such file or folder; a source is {SUPPORTED}")
    files = _folder_files(path) if path.is_dir() else [path]
    return {**known, "kind": "folder" if path.is_dir() else "file", **_files_digest(files)}


def _files_digest(files: Sequence[Path]) -> dict[str, Any]:
    digest = hashlib.sha256()
    num_bytes = 0
    for path in files:
        raw = path.read_bytes()
        num_bytes += len(raw)
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(raw).digest())
    return {"num_files": len(files), "bytes": num_bytes, "sha256": digest.hexdigest()}
