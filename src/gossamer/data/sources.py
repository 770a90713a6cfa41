"""Sources of text.

A source `SRC` is one of

    path            .txt, .jsonl, .jsonl.zst, .parquet, a folder of .py/.txt, a .tar.gz of them
    python:stdlib   this interpreter's own library, without tests, tables and the held-out files
    python:stdlib:held-out          the files that `python:stdlib` leaves out, to evaluate on
    python:doctests[:NUM[:SEED]]    generated examples (`>>> sorted("bca")` and its answer); see doctests.py
    hf:repo[@revision][:config[:split]]     a Hugging Face dataset, streamed (presets.py: some have names)

and in a mixture (mixture.py) `SRC@WEIGHT`, the source's share of the characters (`hf:repo@2@1`: revision 2).
A .txt holds one document, or several separated by `<|endoftext|>`; rows have a field `text` or `content`.
"""

from __future__ import annotations

import hashlib
import io
import tokenize
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.architecture.config import LFS_POINTER
from gossamer.errors import ConfigError

if TYPE_CHECKING:
    from gossamer.data.tables import BadRows

END_OF_TEXT = "<|endoftext|>"
STDLIB = ("python:stdlib", "python:stdlib:held-out")
SUPPORTED = (
    "a .txt, .jsonl, .jsonl.zst or .parquet file, a folder or .tar.gz of .py/.txt files, python:stdlib, "
    "python:stdlib:held-out, python:doctests[:NUM[:SEED]] or hf:repo[@revision][:config[:split]]"
)


def documents(source: str, *, offline: bool = False, bad: BadRows | None = None) -> Iterator[str]:
    """The texts of a source, in its order; a row that cannot be used is an error, or left out by `bad`."""
    if source.startswith("python:doctests"):
        from gossamer.data import doctests

        num, seed = doctests.number_and_seed(source)
        return islice(doctests.documents(seed), num)
    if source.startswith("hf:"):
        from gossamer.data.tables import hub_documents

        return hub_documents(source, offline, bad)
    path = Path(source)
    if source in STDLIB or path.is_dir():
        from gossamer.data.trees import tree_files

        return (read_text(file) for file in tree_files(source))
    if not path.is_file():
        raise ConfigError(f"dataset {source!r}: no such file or folder; a source is {SUPPORTED}")
    return _file_documents(path, bad)


def _file_documents(path: Path, bad: BadRows | None) -> Iterator[str]:
    """Dispatch on the file's name."""
    if path.name.endswith((".jsonl", ".jsonl.zst", ".parquet")):
        from gossamer.data.tables import table_documents

        return table_documents(path, bad)
    if path.name.endswith((".tar.gz", ".tgz")):
        from gossamer.data.trees import tar_documents

        return tar_documents(path)
    if path.name.endswith((".txt", ".py")):
        pieces = read_text(path).split(END_OF_TEXT)
        return iter(pieces) if len(pieces) == 1 else (piece.strip("\n") for piece in pieces if piece.strip())
    raise ConfigError(f"dataset {str(path)!r}: unknown kind of file; a source is {SUPPORTED}")


def read_text(path: Path) -> str:
    return decode(path.read_bytes(), str(path), python=path.suffix == ".py")


def decode(raw: bytes, where: str, *, python: bool) -> str:
    """Text of a file: UTF-8, without its byte order mark, or what a Python file's coding line says."""
    if raw.startswith(LFS_POINTER):
        raise ConfigError(f"{where}: a Git LFS pointer, not the file itself; run `git lfs pull`")
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(raw).readline)[0] if python else "utf-8-sig"
        return raw.decode(encoding)
    except (UnicodeDecodeError, SyntaxError, LookupError) as error:
        raise ConfigError(f"{where}: not text in its encoding ({error}); convert it to UTF-8") from error


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


def manifest(source: str, *, offline: bool = False) -> dict[str, Any]:
    """What a source is, for gossamer.json: kind, number of files, bytes, sha256, or revision of the hub's."""
    name, weight = parse_weight(source)
    if (path := Path(name)).is_file():
        found = {"kind": "file", **files_digest([path])}
    else:
        from gossamer.data.manifest import manifest_of_many

        found = manifest_of_many(name, offline)
    return {"source": name, "weight": weight, **found}


def files_digest(files: Sequence[Path]) -> dict[str, Any]:
    digest = hashlib.sha256()
    num_bytes = 0
    for path in files:
        raw = path.read_bytes()
        num_bytes += len(raw)
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(raw).digest())
    return {"num_files": len(files), "bytes": num_bytes, "sha256": digest.hexdigest()}
