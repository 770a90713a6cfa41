"""Figures that were measured before, kept by the hash of all that decides them."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gossamer
from gossamer.checkpoint.directory import Checkpoint
from gossamer.job.report import Event, Progress
from gossamer.machine import cache_directory

SMALL_FILES = ("*.json", "*.jinja", "*.model")  # of a directory: configurations, tokenizer, chat template


class KeptFigures:
    """The folder of figures in the cache directory; `found` are the names of those that were read there.

    `anew`: nothing is read, and what is measured is kept. A damaged file counts as absent, and is told of.
    """

    def __init__(self, progress: Progress, *, anew: bool = False) -> None:
        self.folder, self.found = cache_directory() / "evaluations", list[str]()
        self._progress, self._anew = progress, anew

    def of(
        self, decides: Mapping[str, Any] | None, name: str, measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """What `measure` returns, or returned when the same decided it; None: something unknown decides."""
        if decides is None:
            return measure()
        decides = {**decides, "program": program()}
        file = self.folder / f"{digest(decides)}.json"
        if not self._anew and (kept := self._read(file)) is not None:
            self.found.append(name)
            return kept
        figures = measure()
        content = {"decides": decides, "figures": figures, "sha256": digest(figures)}
        staged = file.with_suffix(f".{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            staged.write_text(json.dumps(content), encoding="utf-8")
            staged.rename(file)
        except OSError as error:
            self._progress(Event("evaluate", f"the figures of {name} are not kept: {error}", lasting=True))
        return json.loads(json.dumps(figures))

    def _read(self, file: Path) -> dict[str, Any] | None:
        if not file.exists():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if digest(content["figures"]) == content["sha256"]:
                return content["figures"]
            why = "its figures are not those that were written"
        except (ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
        self._progress(Event("evaluate", f"{file} is damaged ({why}); measured anew", lasting=True))
        return None


def digest(content: Any) -> str:
    """sha256 of what JSON can say, the same for the same content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def model_hash(model: str, *, offline: bool = False) -> str:
    """sha256 of a packed file, or of a directory's weights and of what its answers depend on beside them."""
    if Path(model).is_file():
        with Path(model).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    source = Checkpoint.open(model, offline=offline)
    small = {path.name: path for pattern in SMALL_FILES for path in source.path.glob(pattern)}
    small.pop("gossamer.json", None)
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(small.items())}
    return digest([source.hash, hashes])


@cache
def program() -> dict[str, str]:
    """What computes: our own files, and the versions of libraries."""
    code = hashlib.sha256()
    root = Path(gossamer.__file__).parent
    for file in [
        *sorted(root.rglob("*.py")),
        *sorted(Path(gossamer._native.__file__).parent.glob("_native*")),
    ]:
        code.update(file.name.encode() + b"\0" + file.read_bytes())
    names = ("lm-eval", "torch", "transformers", "tokenizers")
    return {"gossamer": code.hexdigest(), **{name: version(name) for name in names}}
