"""Says of a GGUF file that it is one, wherever a model is asked for that is a directory or a .goss file."""

from pathlib import Path

from gossamer.errors import UnsupportedError


def refuse_gguf(file: Path) -> None:
    """Raise UnsupportedError for a GGUF file, naming the verb that makes a directory of it."""
    with file.open("rb") as stream:
        if stream.read(4) == b"GGUF":
            raise UnsupportedError(
                f"{file}: found a GGUF file; make a directory of it first: gossamer import {file} -o DIR"
            )
