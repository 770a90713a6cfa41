"""A model's JSON files and the fields of its `config.json`, read with the suspicion that files deserve."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gossamer.errors import CheckpointError, UnsupportedError

MAX_SIZE = 1 << 31
MIN_NUMBER, MAX_NUMBER = 1e-30, 1e30  # in float32's range; their squares are in float64's
MAX_LAYERS = 10_000
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how Git LFS stands in for a file not fetched yet


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError for anything else."""
    return json_object(file.read_bytes(), str(file))


def json_object(content: bytes, source: str) -> dict[str, Any]:
    """The JSON object in a text of UTF-8; CheckpointError for anything else, naming the source."""
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if content.startswith(LFS_POINTER):
            raise CheckpointError(f"{source}: a Git LFS pointer, not the file; run `git lfs pull`") from error
        raise CheckpointError(f"{source}: not readable as JSON ({error}); the file is damaged") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{source}: found a JSON {type(found).__name__}; expected an object")
    return found


class Config:
    """A configuration and the file it came from, which every message names."""

    def __init__(self, fields: Mapping[str, Any], source: str) -> None:
        self._fields, self.source = fields, source

    def with_defaults(self, **fields: Any) -> "Config":
        """The same, with what transformers' own class takes these fields to be where they are absent.

        A field that is there keeps what it says, null included.
        """
        return Config({**fields, **self._fields}, self.source)

    def get(self, key: str) -> Any:
        """The field as it stands in the file; None where it is absent."""
        return self._fields.get(key)

    def section(self, key: str) -> "Config | None":
        """An object within the file; None where it is absent or empty."""
        found = self.get(key)
        if found is not None and not isinstance(found, Mapping):
            raise CheckpointError(f"{self.source}: {key} is {found!r}; expected an object")
        return Config(found, self.source) if found else None

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number; CheckpointError for anything else."""
        value = default if self.get(key) is None else self.get(key)
        if type(value) is not int or not 0 < value < MAX_SIZE:
            raise CheckpointError(f"{self.source}: {key} is {value!r}; expected a positive whole number")
        return value

    def num_layers(self, key: str = "num_hidden_layers") -> int:
        """A `size` that a list of layers may have."""
        if (found := self.size(key)) > MAX_LAYERS:
            raise CheckpointError(f"{self.source}: {key} is {found}; expected at most {MAX_LAYERS}")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0 that arithmetic in float32 survives; CheckpointError for anything else."""
        value = default if self.get(key) is None else self.get(key)
        if isinstance(value, int | float) and type(value) is not bool and MIN_NUMBER <= value <= MAX_NUMBER:
            return float(value)
        raise CheckpointError(
            f"{self.source}: {key} is {value!r}; expected a number above 0, {MIN_NUMBER:g} to {MAX_NUMBER:g}"
        )

    def flag(self, key: str, default: bool = False) -> bool:
        """A truth value; CheckpointError for anything else."""
        if not isinstance(value := default if self.get(key) is None else self.get(key), bool):
            raise CheckpointError(f"{self.source}: {key} is {value!r}; expected true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id, a list of them, or nothing."""
        found = self.get(key)
        ids = tuple(found) if isinstance(found, list) else () if found is None else (found,)
        for token in ids:
            if type(token) is not int or not 0 <= token < MAX_SIZE:
                raise CheckpointError(
                    f"{self.source}: {key} has the token id {token!a:.80}; expected a number"
                )
        return ids

    def expect(self, **fields: Any) -> None:
        """UnsupportedError where a field is there with another value than the one that is understood."""
        for key, expected in fields.items():
            if (found := self._fields.get(key, expected)) != expected:
                raise UnsupportedError(f"{self.source}: found {key} = {found!r}; supported: {expected!r}")
