"""Texts that lie in many files: a folder, an archive of one, and this interpreter's own library."""

from __future__ import annotations

import gzip
import os
import sysconfig
import tarfile
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from gossamer.data.damage import damaged
from gossamer.data.sources import decode
from gossamer.errors import ConfigError

HELD_OUT = (
    "bisect.py", "calendar.py", "colorsys.py", "fractions.py", "graphlib.py",
    "heapq.py", "queue.py", "shlex.py", "string.py", "textwrap.py",
)  # fmt: skip
LEFT_OUT_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)

_CHUNK_BYTES = 1 << 20


def tree_files(source: str) -> list[Path]:
    """The files of a folder or of `python:stdlib`, in the order of their names."""
    if source == "python:stdlib:held-out":
        return [Path(sysconfig.get_path("stdlib")) / name for name in HELD_OUT]
    if source == "python:stdlib":
        return [*_library()]
    paths = Path(source).rglob("*")
    files = sorted(path for path in paths if path.suffix in (".py", ".txt") and path.is_file())
    if not files:
        raise ConfigError(f"dataset {source!r}: no .py or .txt file in this folder")
    return files


def tar_documents(path: Path) -> Iterator[str]:
    """The .py and .txt files of an archive, in its order; ConfigError for one that is damaged."""
    try:
        with gzip.open(path) as raw, tarfile.open(fileobj=raw, mode="r:") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name.endswith((".py", ".txt")) else None
                if file is not None:
                    yield decode(file.read(), f"{path}:{member.name}", python=member.name.endswith(".py"))
            while raw.read(_CHUNK_BYTES):  # to where its checksum is: tarfile takes damage for the end
                pass
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise damaged(path, error) from error


@cache
def _library() -> list[Path]:
    """The files of `python:stdlib`; a walk through it takes a good part of a second."""
    library, found = Path(sysconfig.get_path("stdlib")), []
    for folder, folders, files in os.walk(library):
        folders[:] = [name for name in folders if name not in LEFT_OUT_FOLDERS]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    held_out = {library / name for name in HELD_OUT}
    return sorted(path for path in found if path not in held_out)
