"""A GGUF file: its metadata as Python values, and its tensors as float32 rows, read where they lie.

The layout (ggml's docs/gguf.md): magic, version, counts; key-value pairs; a record of each tensor; padding;
tensor data. All numbers are little-endian. The header is parsed here instead of by the `gguf` package's
reader, which takes seconds for a vocabulary and reads on without end where a file was cut off; the package
decodes the blocks of quantized weights.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize

from gossamer.errors import CheckpointError, UnsupportedError

SUPPORTED_TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True)
class Tensor:
    """One tensor: `shape` as NumPy has it (a matrix is [N, K]), `num_bytes` from `offset` of the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def num_rows(self) -> int:
        """How many rows it is stored as; a vector is one."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.num_bytes // self.num_rows


class GgufFile:
    """A GGUF file whose header is whole and whose tensors lie within it.

    `metadata` has numbers, truth values and texts as Python's own, and arrays as lists.
    """

    def __init__(self, path: Path, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.path, self.metadata, self.tensors = path, metadata, tensors

    @classmethod
    def open(cls, path: str | Path) -> "GgufFile":
        """Read the header; CheckpointError for a damaged file, UnsupportedError for one not understood."""
        path = Path(path)
        if not path.is_file():
            found = "a directory" if path.is_dir() else "nothing"
            raise CheckpointError(f"{path}: found {found}; expected a GGUF file")
        with path.open("rb") as stream:
            header = _Header(path, stream)
            num_tensors, num_pairs = header.begin()
            metadata = header.metadata(num_pairs)
            return cls(path, metadata, header.tensors(num_tensors, metadata))

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of the metadata, which must be of this Python type; CheckpointError for another one."""
        value = self.metadata.get(key, default)
        if value is not None and (type(value) is not kind):
            raise CheckpointError(f"{self.path}: {key} is {value!r:.80}; expected {kind.__name__}")
        return value

    def rows(self, tensor: Tensor, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` as they are stored: uint8 [rows, bytes of a row]."""
        count = (stop - start) * tensor.row_bytes
        found = np.fromfile(self.path, np.uint8, count, offset=tensor.offset + start * tensor.row_bytes)
        if found.size != count:
            raise CheckpointError(
                f"{self.path}: ends within {tensor.name}; it became shorter while being read"
            )
        return found.reshape(stop - start, tensor.row_bytes)


def to_float32(rows: np.ndarray, kind: str) -> np.ndarray:
    """Stored rows (uint8 [N, bytes of a row]) of a supported type as float32 [N, K], as ggml defines it."""
    if kind == "F32":
        return rows.view("<f4")
    if kind == "F16":
        return rows.view("<f2").astype(np.float32)
    if kind == "BF16":
        return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # damaged scales: whoever asked looks at the values
        return dequantize(rows, GGMLQuantizationType[kind])


class _Header:
    """Reads a header value by value, and never asks for more bytes than the file has left."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path, self.stream, self.file_bytes = path, stream, path.stat().st_size

    def begin(self) -> tuple[int, int]:
        """Check magic and version; the numbers of tensors and of key-value pairs."""
        if self.stream.read(4) != _MAGIC:
            raise CheckpointError(f"{self.path}: does not begin with GGUF; expected a GGUF file")
        version = self.number("<u4")
        if version not in _VERSIONS:
            found = "is big-endian" if version & 0xFFFF == 0 else f"has version {version}"
            raise UnsupportedError(
                f"{self.path}: {found}; supported: little-endian GGUF, versions 2 and 3 (convert the model "
                "again with llama.cpp's convert_hf_to_gguf.py)"
            )
        return self.number("<u8"), self.number("<u8")

    def metadata(self, count: int) -> dict[str, Any]:
        """The key-value pairs."""
        pairs: dict[str, Any] = {}
        for _ in range(count):
            key = self.text("a key")
            if key in pairs:
                raise CheckpointError(f"{self.path}: {key} is there twice; the file is damaged")
            pairs[key] = self.value(key, self.value_type(key))
        return pairs

    def tensors(self, count: int, metadata: dict[str, Any]) -> dict[str, Tensor]:
        """Where the tensors lie, which must be within the file."""
        records = [self.record() for _ in range(count)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}; expected a power of two")
        start = -(-self.stream.tell() // alignment) * alignment
        tensors: dict[str, Tensor] = {}
        for name, kind, shape, offset, num_bytes in records:
            if name in tensors:
                raise CheckpointError(f"{self.path}: tensor {name} is there twice; the file is damaged")
            if offset % alignment or start + offset + num_bytes > self.file_bytes:
                raise CheckpointError(
                    f"{self.path}: tensor {name} should lie at {start + offset} with {num_bytes} bytes, but "
                    f"the file has {self.file_bytes}; it is cut off or damaged: copy it again"
                )
            tensors[name] = Tensor(name, kind, shape, start + offset, num_bytes)
        return tensors

    def record(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """Name, type, shape, offset and bytes of one tensor."""
        name, rank = self.text("the name of a tensor"), self.number("<u4")
        if not 1 <= rank <= 4:
            raise CheckpointError(f"{self.path}: tensor {name} has {rank} dimensions; expected 1 to 4")
        shape = tuple(self.number("<u8") for _ in range(rank))[::-1]
        code, offset = self.number("<u4"), self.number("<u8")
        kind = _type_name(code)
        if kind not in SUPPORTED_TYPES:
            raise UnsupportedError(
                f"{self.path}: tensor {name} is {kind}; supported: {', '.join(SUPPORTED_TYPES)}"
            )
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        if not all(shape) or shape[-1] % block:
            raise CheckpointError(
                f"{self.path}: tensor {name} has shape {list(shape)}; expected whole blocks of {block}"
            )
        return name, kind, shape, offset, math.prod(shape) // block * block_bytes

    def value_type(self, key: str) -> GGUFValueType:
        code = self.number("<u4")
        if code not in set(GGUFValueType):
            raise CheckpointError(f"{self.path}: {key} has the unknown type {code}; the file is damaged")
        return GGUFValueType(code)

    def value(self, key: str, kind: GGUFValueType) -> Any:
        """A number, a text, or a list of them."""
        if kind == GGUFValueType.STRING:
            return self.text(key)
        if kind != GGUFValueType.ARRAY:
            return self.number(_SCALARS[kind])
        item, count = self.value_type(key), self.number("<u8")
        if item == GGUFValueType.ARRAY:
            raise UnsupportedError(f"{self.path}: {key} is an array of arrays; supported: arrays of values")
        if item == GGUFValueType.STRING:
            if count * 8 > self.left:
                raise self.cut_off()
            return [self.text(key) for _ in range(count)]
        dtype = np.dtype(_SCALARS[item])
        return np.frombuffer(self.bytes(count * dtype.itemsize), dtype).tolist()

    def number(self, dtype: str) -> Any:
        """A number; a float32 is the shortest decimal that means it (1e-05, not 9.999999747378752e-06)."""
        kind = np.dtype(dtype)
        found = np.frombuffer(self.bytes(kind.itemsize), kind)[0]
        return float(str(found)) if dtype == "<f4" else found.item()

    def text(self, what: str) -> str:
        [length] = struct.unpack("<Q", self.bytes(8))
        try:
            return self.bytes(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8; the file is damaged") from error

    def bytes(self, count: int) -> bytes:
        if count > self.left:
            raise self.cut_off()
        return self.stream.read(count)

    @property
    def left(self) -> int:
        return self.file_bytes - self.stream.tell()

    def cut_off(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: ends within its header, at {self.file_bytes} bytes; it is cut off or damaged: "
            "copy it again"
        )


def _type_name(code: int) -> str:
    """ggml's name of a tensor type, or its number."""
    return GGMLQuantizationType(code).name if code in set(GGMLQuantizationType) else f"of type {code}"
