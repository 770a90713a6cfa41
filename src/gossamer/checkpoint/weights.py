"""safetensors files as mapped NumPy arrays: headers in, tensors out, and back.

bfloat16 and float8 have no NumPy types: raw arrays hold their bit patterns, as uint16 and uint8.
"""

import errno
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
from safetensors import TensorSpec

STORAGE = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
    "F8_E4M3": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
_PATTERNS = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}  # the library's names of what NumPy lacks
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `num_bytes` from `offset` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def array(self) -> np.ndarray:
        """The tensor as stored: read-only and mapped, nothing is copied."""
        return np.memmap(self.file, STORAGE[self.dtype], "r", self.offset, self.shape)


def read_header(file: Path) -> dict[str, Entry]:
    """The file's tensors, after the safetensors library has validated lengths and offsets."""
    try:
        with safetensors.safe_open(file, "np"):
            pass
    except (safetensors.SafetensorError, ValueError) as error:
        from gossamer.checkpoint.diagnosis import unreadable

        raise unreadable(file, error) from error
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    header.pop("__metadata__", None)
    entries = {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        shape = tuple(info["shape"])
        entries[name] = Entry(file, info["dtype"], shape, 8 + header_bytes + begin, end - begin)
    return entries


def to_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """Storage form -> float32, exactly."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E4M3":
        from gossamer.checkpoint.schemes import e4m3_to_float32

        return e4m3_to_float32(array)
    return array.astype(np.float32)


def write_safetensors(file: Path, tensors: Mapping[str, tuple[np.ndarray, str]]) -> None:
    """Write one safetensors file; a failing disk is an OSError."""
    views = {
        name: TensorSpec(
            dtype=_PATTERNS.get(dtype, array.dtype.name),
            shape=list(array.shape),
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, (array, dtype) in tensors.items()
    }
    try:
        safetensors.serialize_file(views, str(file), {"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(errno.EIO, f"could not write: {error}", str(file)) from error


def is_finite(array: np.ndarray, dtype: str) -> bool:
    """Whether all values are finite, looked at in pieces that fit the cache's neighbourhood."""
    if dtype not in ("F32", "F16", "BF16"):
        return dtype != "F8_E4M3" or not ((array & 0x7F) == 0x7F).any()
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        piece = flat[start : start + _CHUNK]
        finite = (piece & 0x7F80) != 0x7F80 if dtype == "BF16" else np.isfinite(piece)
        if not finite.all():
            return False
    return True
