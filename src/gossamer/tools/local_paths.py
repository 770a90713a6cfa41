"""Where files lie on this computer is nobody's business: what is published has their names alone."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gossamer.architecture.config import read_json
from gossamer.checkpoint.directory import MANIFEST
from gossamer.checkpoint.hub import NAME

RECORDED = ("job", "parent", "lineage", "data")  # what of `gossamer.json` may name files
MODELS = ("model", "teacher")  # options that may be a name of the hub
SCHEME = re.compile(r"[a-z]+:")  # of sources that are no files, such as hf:org/name


def without_folders(value: Any, option: str = "") -> Any:
    """The value of an option, each path in it cut to its last part; of an object, whose keys are options.

    Of a model, `org/name` is taken for a name of the hub unless it lies here, too.
    """
    if isinstance(value, dict):
        return {name: without_folders(entry, name) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(entry, option) for entry in value]
    return Path(value).name if _is_path(value, option) else value


def published_texts(directory: Path) -> dict[str, bytes]:
    """The files of a model's directory that name paths, by their names, without the folders in them.

    They are `gossamer.json`, and `report.md`, which repeats paths that are there.
    """
    file, report = directory / MANIFEST, directory / "report.md"
    if not file.is_file():
        return {}
    manifest = read_json(file)
    recorded = {key: manifest[key] for key in RECORDED if key in manifest}
    shown = json.dumps(manifest | without_folders(recorded), indent=2, ensure_ascii=False) + "\n"
    texts = {MANIFEST: shown.encode(errors="backslashreplace")}
    if report.is_file():
        text = report.read_bytes().decode(errors="surrogateescape")
        for path in sorted(set(_paths(recorded)), key=len, reverse=True):
            text = re.sub(
                rf"(?<![\w./~-]){re.escape(path)}(?![\w/-])", lambda _, of=path: Path(of).name, text
            )
        texts[report.name] = text.encode(errors="surrogateescape")
    return texts


def _paths(value: Any, option: str = "") -> Iterator[str]:
    """Every path in a value."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _paths(entry, name)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _paths(entry, option)
    elif _is_path(value, option):
        yield value


def _is_path(value: Any, option: str) -> bool:
    if not isinstance(value, str) or SCHEME.match(value):
        return False
    if option in MODELS and NAME.fullmatch(value) and not Path(value).exists():
        return False
    return "/" in value or value.startswith("~")
