"""Sources of text.

A source `SRC` is one of

    path            .txt, .jsonl, .jsonl.zst, .parquet, a folder of .py/.txt, a .tar.gz of them
    python:stdlib   this interpreter's own library, without tests, tables and the held-out files
    python:stdlib:held-out          the files of `HELD_OUT`, for evaluation only
    python:doctests[:NUM[:SEED]]    generated examples (`>>> sorted("bca")` and its answer); see doctests.py
    hf:repo[:config[:split]]        a Hugging Face dataset, streamed

and in a mixture (mixture.py) `SRC@WEIGHT`, the weight being the source's share of the characters.
A .txt holds one document, or several separated by `<|endoftext|>`; the other formats have a field `text`.
"""

from __future__ import annotations

import hashlib
import io
import sysconfig
import tarfile
import tokenize
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from gossamer.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
HELD_OUT = (
    "bisect.py", "calendar.py", "colorsys.py", "fractions.py", "graphlib.py",
    "heapq.py", "queue.py", "shlex.py", "string.py", "textwrap.py",
)  # fmt: skip
LEFT_OUT_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)
SUPPORTED = (
    "a .txt, .jsonl, .jsonl.zst or .parquet file, a folder or .tar.gz of .py/.txt files, "
    "python:stdlib, python:stdlib:held-out, python:doctests[:NUM[:SEED]] or hf:repo[:config[:split]]"
)


def documents(source: str, *, offline: bool = False) -> Iterator[str]:
    """The texts of a source, in its order; `python:doctests` without a number never ends."""
    if source == "python:stdlib" or source == "python:stdlib:held-out":
        return (_read_python(path) for path in _stdlib_files(source.endswith("held-out")))
    if source.startswith("python:doctests"):
        from gossamer.data import doctests

        num, seed = doctests.number_and_seed(source)
        return islice(doctests.documents(seed), num)
    if source.startswith("hf:"):
        from gossamer.data.tables import hub_documents

        return hub_documents(source, offline)
    path = Path(source)
    if path.is_dir():
        return (read_text(file) for file in _folder_files(path))
    if not path.is_file():
        raise ConfigError(f"dataset {source!r}: no such file or folder; a source is {SUPPORTED}")
    return _file_documents(path)


def _file_documents(path: Path) -> Iterator[str]:
    """Dispatch on the file's name."""
    if path.name.endswith((".jsonl", ".jsonl.zst", ".parquet")):
        from gossamer.data.tables import table_documents

        return table_documents(path)
    if path.name.endswith((".tar.gz", ".tgz")):
        return _tar_documents(path)
    if path.name.endswith((".txt", ".py")):
        pieces = read_text(path).split(END_OF_TEXT)
        return iter(pieces) if len(pieces) == 1 else (piece.strip("\n") for piece in pieces if piece.strip())
    raise ConfigError(f"dataset {str(path)!r}: unknown kind of file; a source is {SUPPORTED}")


def _tar_documents(path: Path) -> Iterator[str]:
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith((".py", ".txt")) else None
            if file is not None:
                yield _decode(file.read(), f"{path}:{member.name}", python=member.name.endswith(".py"))


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


def manifest(source: str) -> dict[str, Any]:
    """What a source is, for gossamer.json: kind, number of files, bytes, sha256."""
    name, weight = parse_weight(source)
    known = {"source": name, "weight": weight}
    if name.startswith("hf:"):
        return {**known, "kind": "hub"}
    if name.startswith("python:doctests"):
        digest = hashlib.sha256(Path(__file__).with_name("doctests.py").read_bytes()).hexdigest()
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
