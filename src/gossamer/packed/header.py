"""The header of a .goss file, treated as hostile: every word is checked before a byte of data is believed.

Three questions in order: is this a safetensors file in our stricter layout (`read_header`), is it a packed
model of a version and an architecture that we know (`read_model`), and does it hold exactly the tensors that
its table of matrices calls for (`check_tensors`)? Every no is a FormatError that names the file, what was
found and what was expected.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from gossamer.architecture.anatomy import Anatomy
from gossamer.architecture.families import read_anatomy
from gossamer.checkpoint.provenance import Provenance
from gossamer.errors import CheckpointError, FormatError, GossamerError
from gossamer.packed import blocks, panels, streams
from gossamer.packed.panels import ALIGNMENT
from gossamer.packed.values import NUMBER_TYPES, PANEL_ROWS, NumberType, Values
from gossamer.tokens.pooling import Pooling

VERSIONS = ("1", "2", "3", "4", "5", "6")  # that are read; `needed_version` says in which one to write
TOKENIZER, DEFLATED = "tokenizer.json", "tokenizer.json.zlib"  # the latter from version 4 on
PROVENANCE = "gossamer"  # member of the configuration, where readers that do not know it leave it alone
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit

StorageKind = Literal["sparse", "dense", "blocks"]

DTYPES = {
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "BF16": np.dtype("<u2"),  # bit patterns
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
}
POOLING = "pooling"  # metadata key, of encoders only
TABLE = "layers"  # metadata key of the table of matrices: the format's word, kept for files written so far
_REQUIRED = ("config", TABLE, "parent")
_OPTIONAL = ("chat_template", "tokenizer_config", "generation_config", "origin", POOLING)
_METADATA = {"format", "version", *_REQUIRED, *_OPTIONAL}


class Stored(NamedTuple):
    """Where one tensor lies: `offset` counts from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class StoredMatrix:
    """One weight matrix [rows, columns]: how it is stored, the type of its values, how many are not zero."""

    storage: StorageKind
    values: Values
    rows: int
    columns: int
    nonzeros: int

    @property
    def num_weights(self) -> int:
        return self.rows * self.columns

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1 - self.nonzeros / self.num_weights

    @property
    def padded_rows(self) -> int:
        return panels.round_up(self.rows, PANEL_ROWS)

    @property
    def type(self) -> NumberType:
        """The type of its weights."""
        return NUMBER_TYPES[self.values]

    def tensors(self, name: str) -> dict[str, tuple[str, tuple[int, ...] | None]]:
        """Name -> (dtype, shape) of the tensors that hold the matrix.

        A stream of int4 or of blocks has no shape: its length depends on where the nonzero weights lie
        (`stream_range`).
        """
        if self.storage != "dense":
            least, most = self.stream_range()
            found: dict[str, tuple[str, tuple[int, ...] | None]] = {
                f"{name}.weight.stream": ("U8", (least,) if least == most else None),
                f"{name}.weight.offsets": ("U64", (streams.num_offsets(self.rows),)),
            }
        else:
            shape = panels.panel_shape(self.values, self.rows, self.columns)
            found = {f"{name}.weight": (self.type.stored, shape)}
        if self.type.paired:
            num_multipliers = panels.num_multipliers(self.rows, self.columns)
            found[f"{name}.weight_multiplier"] = ("U8", (num_multipliers,))
        if self.type.integer:
            found[f"{name}.weight_scale"] = ("F32", (self.padded_rows,))
            found[f"{name}.weight_sum"] = ("I32", (self.padded_rows,))
        return found

    def stream_range(self) -> tuple[int, int]:
        """Least and most bytes of a stream.

        All bytes of int4 may hold two weights, or one; all live blocks four, or one.
        """
        if self.storage == "blocks":
            most = min(self.nonzeros, blocks.num_blocks(self.rows, self.columns))
            least = -(-self.nonzeros // blocks.BLOCK)
            shape = (self.rows, self.columns)
            return blocks.stream_bytes(*shape, least), blocks.stream_bytes(*shape, most)
        most = self.nonzeros * self.type.dtype.itemsize
        least = -(-most // 2) if self.type.paired else most
        size = (self.values, self.rows, self.columns)
        return streams.stream_bytes(*size, least), streams.stream_bytes(*size, most)


def matrix_shapes(anatomy: Anatomy) -> dict[str, tuple[int, ...]]:
    """Name without `.weight` -> (rows, columns): embedding, linears of all blocks, a head of its own."""
    shapes = anatomy.tensor_shapes.items()
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes
        if len(shape) == 2 and name not in anatomy.beside
    }


def vector_sizes(anatomy: Anatomy, names: Collection[str] = ()) -> dict[str, int]:
    """Tensor name -> numbers in it: the weights of all norms, all biases, and all that is beside.

    Of what a model may lack, that which is among `names`.
    """
    optional = {name: shape for name, shape in anatomy.optional.items() if name in names}
    shapes = (anatomy.tensor_shapes | optional).items()
    matrices = {f"{name}.weight" for name in matrix_shapes(anatomy)}
    return {name: math.prod(shape) for name, shape in shapes if name not in matrices}


def vector_tensors(anatomy: Anatomy, names: Collection[str] = ()) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of all these, row after row where they are tables, padded to 64 bytes."""
    sizes = vector_sizes(anatomy, names)
    return {name: ("F32", (panels.round_up(size, ALIGNMENT // 4),)) for name, size in sizes.items()}


def needed_version(anatomy: Anatomy, embedding: Values = "f32", blocks: bool = False) -> str:
    """The oldest version of the format that can say what the model is, with an embedding of this type.

    `blocks`: whether a matrix is stored so.

    Version 1 knows two norms a block, as wide as the hidden states, no biases, and blocks that all attend to
    every position and encode it by rope; version 2 knows further norms, biases, and blocks without rope;
    version 3 windows of attention; version 4 an embedding of integers; version 5 matrices stored as blocks;
    version 6 encoders.
    A program that reads only older ones would run such a model wrong, or call the file damaged.
    """
    if anatomy.is_encoder:
        return "6"
    if blocks:
        return "5"
    if NUMBER_TYPES[embedding].integer:
        return "4"
    if any(block.attention.window is not None for block in anatomy.blocks):
        return "3"
    plain = all(
        block.norms.keys() == {"attention", "feed_forward"}
        and not any(linear.bias for linear in block.linears.values())
        and block.attention.rope is not None
        for block in anatomy.blocks
    )
    return "1" if plain else "2"


def read_header(data: memoryview, source: str) -> tuple[dict[str, str], dict[str, Stored]]:
    """Metadata and tensors of a safetensors file whose tensors leave no hole and are all 64-byte aligned."""
    header_bytes = int.from_bytes(data[:8], "little")
    if len(data) < 8 or header_bytes > len(data) - 8 or header_bytes > MAX_HEADER_BYTES:
        raise FormatError(
            f"{source}: found a file of {len(data)} bytes that announces a header of {header_bytes}; "
            "this is no packed model, or its end is missing: write it again with `gossamer pack`"
        )
    header = _json_object(bytes(data[8 : 8 + header_bytes]), "header", source)
    metadata = _metadata(header.pop("__metadata__", None), source)
    begin = 8 + header_bytes
    if begin % ALIGNMENT:
        raise FormatError(f"{source}: data begin at byte {begin}; expected a multiple of {ALIGNMENT}")
    return metadata, _stored(header, begin, len(data), source)


def _json_object(text: bytes | str, what: str, source: str) -> dict[str, Any]:
    """A JSON object without repeated keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) != len(pairs):
            raise ValueError("a key is repeated")
        return found

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise FormatError(f"{source}: the {what} is not valid JSON ({str(error)!a})") from error
    if not isinstance(parsed, dict):
        raise FormatError(f"{source}: the {what} is a JSON {type(parsed).__name__}; expected an object")
    return parsed


def _metadata(found: Any, source: str) -> dict[str, str]:
    """Names the format, a version that we read, and nothing that we do not know."""
    if not isinstance(found, dict) or found.get("format") != "gossamer":
        raise FormatError(
            f"{source}: a safetensors file, but no packed model; give the directory, or pack it first"
        )
    version = found.get("version")
    if version not in VERSIONS:
        newest = int(VERSIONS[-1])
        newer = isinstance(version, str) and version[:9].isdecimal() and int(version[:9]) > newest
        known = f"{', '.join(VERSIONS[:-1])} or {newest}"
        advice = "it is newer than this program: update gossamer" if newer else "the file is damaged"
        raise FormatError(f"{source}: found format version {version!a:.20}; expected {known}; {advice}")
    if unknown := sorted(found.keys() - _METADATA):
        raise FormatError(f"{source}: found unknown metadata {', '.join(map(ascii, unknown))}")
    for key, value in found.items():
        if not isinstance(value, str) or value.encode(errors="replace").decode() != value:
            raise FormatError(f"{source}: metadata {key} is not a string of valid Unicode")
    if missing := [key for key in _REQUIRED if key not in found]:
        raise FormatError(f"{source}: the metadata lack {', '.join(missing)}")
    return found


def _stored(header: dict[str, Any], begin: int, file_bytes: int, source: str) -> dict[str, Stored]:
    """Tensors in the order of the header, each where the one before it ends."""
    tensors, position = {}, begin
    for name, entry in header.items():
        dtype, shape, (first, last) = _entry(name, entry, source)
        num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
        if first != position - begin or last - first != num_bytes or num_bytes % ALIGNMENT:
            raise FormatError(
                f"{source}: tensor {name!a}, {dtype} {list(shape)}, is at bytes {first} to {last}; expected "
                f"{num_bytes} bytes from {position - begin}, with no hole, a multiple of {ALIGNMENT}"
            )
        tensors[name] = Stored(dtype, shape, position, num_bytes)
        position += num_bytes
    if position != file_bytes:
        raise FormatError(
            f"{source}: found {file_bytes} bytes; the tensors end at {position}: the file is damaged"
        )
    return tensors


def _entry(name: str, entry: Any, source: str) -> tuple[str, tuple[int, ...], list[int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{source}: tensor {name!a} must have exactly dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(
            f"{source}: tensor {name!a} has dtype {dtype!a}; expected one of {', '.join(DTYPES)}"
        )
    for numbers, what in ((shape, "shape"), (span, "data_offsets")):
        if not isinstance(numbers, list) or len(numbers) > 4 or not all(map(_is_size, numbers)):
            raise FormatError(f"{source}: tensor {name!a} has {what} {numbers!a:.80}; expected up to 4 sizes")
    if len(span) != 2:
        raise FormatError(f"{source}: tensor {name!a} has {len(span)} data_offsets; expected 2")
    return dtype, tuple(shape), span


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 1 << 62


def read_model(
    metadata: Mapping[str, str], num_tensors: int, source: str
) -> tuple[dict[str, Any], Provenance, Anatomy, dict[str, StoredMatrix]]:
    """The model's config.json, where it comes from, what it is made of, and the table of its matrices."""
    config = _json_object(metadata["config"], "model config", source)
    try:
        provenance = Provenance.from_json(config.pop(PROVENANCE, {}))
    except ValueError as error:
        raise FormatError(f"{source}: {PROVENANCE} in the model config: {error}") from error
    try:
        anatomy = read_anatomy(config, f"{source}, config")
    except (GossamerError, TypeError, ValueError, ArithmeticError) as error:
        raise FormatError(f"{source}: the model config will not do: {str(error)!a}") from error
    version = metadata["version"]
    if version < (needed := needed_version(anatomy)):
        raise FormatError(
            f"{source}: found format version {version} with a {anatomy.model_type}, which takes "
            f"version {needed}; the file is damaged"
        )
    if anatomy.num_layers * len(anatomy.blocks[0].linears) > num_tensors:
        raise FormatError(f"{source}: {num_tensors} tensors cannot hold {anatomy.num_layers} layers")
    if POOLING in metadata:
        read_pooling(metadata, anatomy, source)
    table = _json_object(metadata[TABLE], "table of matrices", source)
    matrices = {name: _matrix(name, entry, anatomy, source) for name, entry in table.items()}
    _check_shapes(matrices, anatomy, source)
    embedding = matrices[anatomy.embedding].values
    in_blocks = any(matrix.storage == "blocks" for matrix in matrices.values())
    if version < (needed := needed_version(anatomy, embedding, in_blocks)):
        what = "matrices in blocks" if in_blocks else f"an embedding of {embedding}"
        raise FormatError(
            f"{source}: found format version {version} with {what}, which takes version {needed}; "
            "the file is damaged"
        )
    return config, provenance, anatomy, matrices


def read_pooling(metadata: Mapping[str, str], anatomy: Anatomy, source: str) -> Pooling:
    """How an encoder's file makes the vector of a text; FormatError for what says nothing of the kind."""
    if not anatomy.is_encoder:
        raise FormatError(
            f"{source}: found a {POOLING} with a {anatomy.model_type}; only an encoder's file has one"
        )
    found = _json_object(metadata.get(POOLING, "{}"), POOLING, source)
    try:
        return Pooling.from_json(found, anatomy, f"{source}, {POOLING}")
    except CheckpointError as error:
        raise FormatError(str(error)) from error


def _check_shapes(matrices: Mapping[str, StoredMatrix], anatomy: Anatomy, source: str) -> None:
    """The table has exactly the matrices of the model; a tied head may be stored beside, in another type."""
    shapes = matrix_shapes(anatomy)
    if anatomy.head and anatomy.head in matrices:
        shapes[anatomy.head] = shapes[anatomy.embedding]
    if different := sorted(shapes.keys() ^ matrices.keys()):
        raise FormatError(f"{source}: the table of matrices and the config disagree about {different[0]!a}")
    for name, (rows, columns) in shapes.items():
        matrix = matrices[name]
        if (matrix.rows, matrix.columns) != (rows, columns):
            raise FormatError(
                f"{source}: {name} is {matrix.rows} x {matrix.columns}; the config says {rows} x {columns}"
            )


def _matrix(name: str, entry: Any, anatomy: Anatomy, source: str) -> StoredMatrix:
    if not isinstance(entry, dict) or entry.keys() != {field.name for field in fields(StoredMatrix)}:
        raise FormatError(
            f"{source}: matrix {name!a} must have exactly storage, values, rows, columns, nonzeros"
        )
    sizes = [entry["rows"], entry["columns"], entry["nonzeros"]]
    if not all(map(_is_size, sizes)) or not 0 <= sizes[2] <= sizes[0] * sizes[1]:
        raise FormatError(
            f"{source}: matrix {name!a} has rows, columns, nonzeros {sizes!a:.80}; expected sizes"
        )
    storage, values = entry["storage"], entry["values"]
    storages, types = get_args(StorageKind), get_args(Values)
    if name == anatomy.embedding:
        storages = ("dense",)
    elif storage == "blocks":
        types = ("i8",)
    if storage not in storages or values not in types:
        raise FormatError(
            f"{source}: matrix {name!a} is stored as {storage!a} {values!a}; "
            f"expected {' or '.join(storages)} {', '.join(types)} there"
        )
    return StoredMatrix(**entry)


def tokenizer_tensor(version: str) -> str:
    """Under which name a file of this version holds the tokenizer: as text, or deflated."""
    return TOKENIZER if version < "4" else DEFLATED


def check_tensors(
    tensors: Mapping[str, Stored],
    anatomy: Anatomy,
    matrices: Mapping[str, StoredMatrix],
    version: str,
    source: str,
) -> None:
    """The file holds what its matrices and vectors call for and nothing else; the tokenizer may be absent."""
    expected: dict[str, tuple[str, tuple[int, ...] | None]] = {**vector_tensors(anatomy, tensors)}
    for name, matrix in matrices.items():
        expected |= matrix.tensors(name)
    if (tokenizer := tokenizer_tensor(version)) in tensors:
        expected[tokenizer] = ("U8", tensors[tokenizer].shape[:1])
    if different := sorted(expected.keys() ^ tensors.keys()):
        state = "lacks" if different[0] in expected else "has an unknown"
        raise FormatError(f"{source}: the file {state} tensor {different[0]!a}")
    for name, (dtype, shape) in expected.items():
        found = tensors[name]
        if found.dtype != dtype or found.shape != (shape or (found.nbytes,)):
            raise FormatError(
                f"{source}: tensor {name} is {found.dtype} {list(found.shape)}; "
                f"expected {dtype} {list(shape) if shape else '[bytes]'}"
            )
    for name, matrix in matrices.items():
        stream, (least, most) = tensors.get(f"{name}.weight.stream"), matrix.stream_range()
        if stream is not None and not least <= stream.nbytes <= most:
            raise FormatError(
                f"{source}: {name} is a stream of {stream.nbytes} bytes; {matrix.nonzeros} nonzero weights "
                f"of {matrix.values} take {least} to {most}"
            )
