"""Matrices that a family stores as the rows of one, such as Phi-3's queries, keys and values.

Everything else knows linears by their roles, each with a name of its own. Here, where files are read, the
rows of each are found in the stored matrix; where they are written, the stored matrix is put together again,
so that every directory loads in transformers. The same holds for biases and the scales of integers.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from gossamer.architecture.anatomy import Anatomy, Linear
from gossamer.checkpoint.weights import Entry
from gossamer.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Fused:
    """A stored matrix, and name and shape of those that are its rows, in their order."""

    name: str
    parts: Mapping[str, Linear]

    @property
    def num_rows(self) -> int:
        return sum(linear.rows for linear in self.parts.values())

    @property
    def shape(self) -> list[int]:
        return [self.num_rows, next(iter(self.parts.values())).columns]


def fused_matrices(anatomy: Anatomy) -> Iterator[Fused]:
    """All of a model's, block by block."""
    for layer, block in enumerate(anatomy.blocks):
        prefix = anatomy.prefix(layer)
        for stored, roles in block.fused.items():
            linears = [block.linears[role] for role in roles]
            yield Fused(f"{prefix}{stored}", {f"{prefix}{linear.name}": linear for linear in linears})


def split(entries: Mapping[str, Entry], anatomy: Anatomy, directory: Path) -> dict[str, Entry]:
    """Where each matrix by itself lies; CheckpointError where a stored one is missing or has other rows."""
    found = dict(entries)
    for fused in fused_matrices(anatomy):
        if (weight := f"{fused.name}.weight") not in found:
            raise CheckpointError(
                f"{directory}: tensor {weight} is missing; expected one of shape {fused.shape}"
            )
        for kind in ("weight", "weight_scale", "bias"):
            if whole := found.pop(f"{fused.name}.{kind}", None):
                found |= _rows(fused, kind, whole)
    return found


def _rows(fused: Fused, kind: str, whole: Entry) -> Iterator[tuple[str, Entry]]:
    """The entries of the parts of one stored tensor."""
    if whole.shape[:1] != (fused.num_rows,):
        raise CheckpointError(
            f"{whole.file}: tensor {fused.name}.{kind} has shape {list(whole.shape)}; expected "
            f"{fused.num_rows} rows: those of {', '.join(fused.parts)}"
        )
    row_bytes, begin = whole.num_bytes // fused.num_rows, whole.offset
    for name, linear in fused.parts.items():
        shape, num_bytes = (linear.rows, *whole.shape[1:]), linear.rows * row_bytes
        yield f"{name}.{kind}", replace(whole, shape=shape, offset=begin, num_bytes=num_bytes)
        begin += num_bytes


class Shards(Protocol):
    """What takes finished tensors."""

    def add(self, name: str, array: np.ndarray, dtype: str) -> None: ...

    def close(self) -> None: ...


class Joining:
    """Takes tensors by the names that everything else has for them, and hands on those that are stored."""

    def __init__(self, shards: Shards, anatomy: Anatomy) -> None:
        self._shards = shards
        self._home = {name: fused for fused in fused_matrices(anatomy) for name in fused.parts}
        self._waiting: dict[str, dict[str, tuple[np.ndarray, str]]] = {}

    def add(self, name: str, array: np.ndarray, dtype: str) -> None:
        """Hand a tensor on, or let it wait for the others of its stored matrix."""
        linear, _, kind = name.rpartition(".")
        if (fused := self._home.get(linear)) is None:
            self._shards.add(name, array, dtype)
            return
        waiting = self._waiting.setdefault(stored := f"{fused.name}.{kind}", {})
        waiting[linear] = array, dtype
        if waiting.keys() == fused.parts.keys():
            arrays = [waiting[part][0] for part in fused.parts]
            assert len({dtype for _, dtype in waiting.values()}) == 1, f"{stored}: parts of several types"
            self._shards.add(stored, np.concatenate(arrays), dtype)
            del self._waiting[stored]

    def close(self) -> None:
        assert not self._waiting, f"{next(iter(self._waiting))} is not whole"
        self._shards.close()


def stored_names(anatomy: Anatomy, names: Collection[str]) -> list[str]:
    """What the named linears are called in files; ConfigError where some parts of a matrix are left out."""
    homes = {name: fused for fused in fused_matrices(anatomy) for name in fused.parts}
    for name in names:
        if name in homes and (left := homes[name].parts.keys() - set(names)):
            raise ConfigError(
                f"{name} is stored in {homes[name].name} with {', '.join(sorted(left))}; name all of them"
            )
    return list(dict.fromkeys(homes[name].name if name in homes else name for name in names))
