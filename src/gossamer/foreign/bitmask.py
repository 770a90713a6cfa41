"""A directory of compressed-tensors' `sparse-bitmask`, which its own library no longer reads, written out.

A weight MODULE.weight [N, K] is stored as four tensors: MODULE.shape, its two sizes; MODULE.bitmask, uint8
[N, ceil(K / 8)], of whose bits the lowest is the first weight's; MODULE.compressed, the weights that are not
zero, row after row; MODULE.row_offsets, where each row begins among them.
"""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.architecture.config import read_json
from gossamer.checkpoint.weights import Entry, read_header, to_float32
from gossamer.errors import CheckpointError, UnsupportedError
from gossamer.foreign.pieces import PIECE_WEIGHTS, Piece, decoded, make_piece

_PARTS = ("shape", "bitmask", "compressed", "row_offsets")
_FLOATS = ("F32", "F16", "BF16")


class BitmaskWeights:
    """Decodes tensors to `dtype`; `config` is the directory's without what it said of the compression."""

    def __init__(self, directory: Path, dtype: str) -> None:
        self.path, self.dtype = directory, dtype
        self._entries = _entries(directory)
        self.modules = [name.removesuffix(".bitmask") for name in self._entries if name.endswith(".bitmask")]
        if not self.modules:
            raise UnsupportedError(
                f"{directory}: found no tensor MODULE.bitmask; supported: GGUF files, and directories of "
                "compressed-tensors' sparse-bitmask (others need no import)"
            )
        self.config = _plain_config(directory / "config.json")
        parts = {f"{module}.{part}" for module in self.modules for part in _PARTS}
        self.shapes = {name: entry.shape for name, entry in self._entries.items() if name not in parts}
        self.shapes |= {f"{module}.weight": self._shape(module) for module in self.modules}

    def pieces(self, names: Iterable[str]) -> Iterator[Piece]:
        """All rows of these tensors; CheckpointError where masks and weights do not fit together."""
        return decoded(partial(self._decode, *place) for place in self._ranges(names))

    def _ranges(self, names: Iterable[str]) -> Iterator[tuple[str, int, int, int]]:
        """Name, rows, and which of the compressed weights is the first of these rows."""
        for name in names:
            num_rows, width = _matrix(self.shapes[name])
            step = 8 * max(1, PIECE_WEIGHTS // (8 * width))
            begins = (
                self._begins(name.removesuffix(".weight"), num_rows) if name not in self._entries else None
            )
            for start in range(0, num_rows, step):
                yield name, start, min(start + step, num_rows), 0 if begins is None else int(begins[start])

    def _decode(self, name: str, start: int, stop: int, first: int) -> Piece:
        origin = f"{self.path}: tensor {name}"
        if entry := self._entries.get(name):
            values = to_float32(entry.array().reshape(_matrix(entry.shape))[start:stop], entry.dtype)
            return make_piece(name, values, self.dtype, origin)
        module, (_, width) = name.removesuffix(".weight"), _matrix(self.shapes[name])
        masks = np.unpackbits(self._bitmask(module)[start:stop], axis=1, count=width, bitorder="little")
        kept = masks.view(np.bool_)
        stored, count = self._entries[f"{module}.compressed"], int(np.count_nonzero(kept))
        values = np.zeros(kept.shape, np.float32)
        if count:
            values[kept] = to_float32(stored.array().reshape(-1)[first : first + count], stored.dtype)
        return make_piece(name, values, self.dtype, origin)

    def _begins(self, module: str, num_rows: int) -> np.ndarray:
        """Where each row begins among the compressed weights, of which masks must have as many bits."""
        _, width = _matrix(self.shapes[f"{module}.weight"])
        masks, counts = self._bitmask(module), np.zeros(num_rows, np.int64)
        for start in range(0, num_rows, step := max(1, PIECE_WEIGHTS // width)):
            bits = np.unpackbits(masks[start : start + step], axis=1, count=width, bitorder="little")
            counts[start : start + step] = bits.sum(1, dtype=np.int64)
        begins = np.cumsum(counts) - counts
        found, stored = int(counts.sum()), math.prod(self._entries[f"{module}.compressed"].shape)
        offsets = self._entries[f"{module}.row_offsets"].array().reshape(-1)
        if found != stored or not np.array_equal(offsets, begins):
            raise CheckpointError(
                f"{self.path}: the masks of {module} have {found} bits, for {stored} compressed weights "
                "in rows that begin elsewhere; the file is damaged"
            )
        return begins

    def _bitmask(self, module: str) -> np.ndarray:
        entry = self._entries[f"{module}.bitmask"]
        flat = np.memmap(entry.file, np.uint8, "r", entry.offset, (entry.num_bytes,))
        return flat.reshape(_matrix(self.shapes[f"{module}.weight"])[0], -1)

    def _shape(self, module: str) -> tuple[int, ...]:
        """The sizes that a module's tensors agree on; CheckpointError where they do not."""
        entries = {part: self._entries.get(f"{module}.{part}") for part in _PARTS}
        if missing := [part for part, entry in entries.items() if entry is None]:
            raise CheckpointError(f"{self.path}: tensor {module}.{missing[0]} is missing")
        sizes, bitmask, compressed, offsets = (entry for entry in entries.values() if entry)
        if compressed.dtype not in _FLOATS:
            raise UnsupportedError(
                f"{self.path}: {module}.compressed is {compressed.dtype}; supported: {', '.join(_FLOATS)}"
            )
        integers = sizes.dtype == offsets.dtype == "I64" and bitmask.dtype == "U8"
        shape = tuple(sizes.array().tolist()) if integers and sizes.shape in ((1,), (2,)) else ()
        if not shape or min(shape) < 1:
            raise CheckpointError(f"{self.path}: {module}.shape does not say the sizes of a matrix")
        num_rows, width = _matrix(shape)
        fits = bitmask.num_bytes == num_rows * -(-width // 8) and offsets.num_bytes == 8 * num_rows
        if not fits:
            raise CheckpointError(f"{self.path}: the tensors of {module} do not fit its shape {list(shape)}")
        return shape


def _entries(directory: Path) -> dict[str, Entry]:
    """Every tensor of the directory's files; CheckpointError where two files have the same one."""
    entries: dict[str, Entry] = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, entry in read_header(file).items():
            if name in entries:
                raise CheckpointError(
                    f"{file}: tensor {name} is in {entries[name].file} too; keep one of them"
                )
            entries[name] = entry
    return entries


def _plain_config(file: Path) -> dict[str, Any]:
    """config.json without the compression, by either of its names; UnsupportedError for a quantized model."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; expected a Hugging Face directory")
    config = read_json(file)
    config.pop("sparsity_config", None)
    for key in ("quantization_config", "compression_config"):
        settings = config.pop(key, None)
        if isinstance(settings, dict) and settings.get("config_groups"):
            raise UnsupportedError(f"{file}: a quantized model; supported: sparse weights that are floats")
    return config


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and width; a vector is one row."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
