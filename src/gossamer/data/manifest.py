"""What a source is that is not one file, for gossamer.json."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from gossamer.data.sources import STDLIB, SUPPORTED, files_digest
from gossamer.data.trees import tree_files
from gossamer.errors import ConfigError


def manifest_of_many(name: str, offline: bool) -> dict[str, Any]:
    """Kind of the source, and what its content depends on; ConfigError where there is none of this name."""
    if name.startswith("hf:"):
        from gossamer.data.hub import revision

        return {"kind": "hub", "revision": None if offline else revision(name)}
    if name.startswith("python:doctests"):
        generator = Path(__file__).with_name("doctests.py").read_bytes()
        return {"kind": "doctests", "generator_sha256": hashlib.sha256(generator).hexdigest()}
    if name in STDLIB:
        return {"kind": "stdlib", **files_digest(tree_files(name))}
    if Path(name).is_dir():
        return {"kind": "folder", **files_digest(tree_files(name))}
    raise ConfigError(f"dataset {name!r}: no such file or folder; a source is {SUPPORTED}")
