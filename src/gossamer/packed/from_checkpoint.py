"""From a checkpoint directory to one .goss file.

Value types come from the checkpoint: float32 and bfloat16 stay what they are, float16 becomes float32, and
int8 and int4 weights (compressed-tensors' int-quantized W8A8 and W4A8) stay integers. `Types` says what is
rounded here instead. Every matrix but the embedding is stored by its zeros if that is smaller. Tensors are
read, packed and dropped one at a time; nothing here needs torch.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gossamer import _native
from gossamer.architecture.anatomy import Anatomy
from gossamer.checkpoint.directory import Checkpoint
from gossamer.checkpoint.provenance import read_provenance
from gossamer.checkpoint.schemes import (
    SCHEMES,
    Scheme,
    dequantized,
    read_scheme,
    refuse_in_engine,
    row_scales_and_multipliers,
)
from gossamer.checkpoint.weights import to_float32
from gossamer.errors import CheckpointError, ConfigError
from gossamer.job.report import Event, Progress, quiet
from gossamer.packed.header import POOLING, StorageKind, StoredMatrix, matrix_shapes, vector_sizes
from gossamer.packed.rounding import Rounded, RoundedMatrix, round_matrix
from gossamer.packed.writer import PackedWriter, Purpose, best_storage
from gossamer.tokens.encoder import read_files
from gossamer.tokens.pooling import Pooling
from gossamer.tokens.tokenizer import Tokenizer, read_template

SMALLER_SPARSE = 1 / 8  # a mask bit a weight against the 8 bits of each zero
TableType = Literal["auto", "keep", "i8", "i4"]
LinearType = Literal["keep", "i4"]
Storage = Literal["auto", "smallest"]
Int8Storage = Callable[[np.ndarray], StorageKind]  # of int8 weights [N, K]


@dataclass(frozen=True)
class Types:
    """What is rounded to integers while packing, where it is not "keep".

    `head` "auto" is int8 if the decoder is of integers. `embedding` "auto" is what the head is, where the
    two are tied, and else as the checkpoint has it. What is tied and of one type is stored once, for both.
    An encoder has no head, and its embedding "auto" is what a decoder's head would be.
    """

    embedding: TableType = "auto"
    head: TableType = "auto"
    linears: LinearType = "keep"

    def of(self, source: Checkpoint) -> "Types":
        """The same without "auto"."""
        tied, scheme = source.architecture.tie_word_embeddings, scheme_of(source)
        head, embedding, is_encoder = self.head, self.embedding, source.architecture.is_encoder
        if is_encoder and head != "auto":
            raise ConfigError(f"{source.path}: an encoder has no head to store as {head}; leave that out")
        if head == "auto" and tied and embedding in ("i8", "i4"):
            head = embedding
        if head == "auto":
            head = "i8" if scheme or self.linears == "i4" else "keep"
        if embedding == "auto":
            embedding = head if tied or is_encoder else "keep"
        return Types(embedding, head, "keep" if scheme and scheme.grouped else self.linears)

    def of_matrix(self, name: str, anatomy: Anatomy) -> TableType | LinearType:
        """What becomes of this matrix."""
        if name == anatomy.embedding:
            return self.embedding
        return self.head if name == anatomy.head else self.linears


@dataclass(frozen=True)
class Rounding:
    """What rounding moved: |rounded - w| / |w| of a whole matrix, and of the row that moved most."""

    values: Rounded
    error: float
    worst_row_error: float
    worst_row: int


@dataclass(frozen=True)
class Packing:
    """What was written: every matrix, and by name what rounding did to those that were rounded here.

    `dense_for_speed`: whether int8 was left dense for this machine though zeros would have made it smaller.
    """

    matrices: dict[str, StoredMatrix]
    roundings: dict[str, Rounding]
    dense_for_speed: bool


def pack_checkpoint(
    source: Checkpoint,
    path: Path,
    types: Types = Types(),
    progress: Progress = quiet,
    storage: Storage = "auto",
    purpose: Literal[Purpose, "auto"] = "auto",
) -> Packing:
    """Write `source` as one .goss file, whole or not at all.

    `storage`: "smallest" stores every matrix so that it takes the fewest bytes; "auto" too, but leaves int8
    dense where this machine reads it faster so. `purpose`: what int8 is stored for (`best_storage`), where
    prompts skip zeros; "auto": "prompts" of an encoder, which reads whole texts, and "decode" of a decoder.
    UnsupportedError for a quantization that we do not run.
    """
    types, anatomy = types.of(source), source.architecture
    names, head = [*matrix_shapes(anatomy)], anatomy.head
    if head is not None and head not in names and types.head != types.embedding:
        names.append(head)
    Tokenizer.open(source.path)  # which must be sound, and its ids have rows in the embedding
    roundings: dict[str, Rounding] = {}
    stays_dense = storage == "auto" and not expands_int8_fast()
    if purpose == "auto":
        purpose = "prompts" if anatomy.is_encoder else "decode"
    wanted_for = purpose if prompts_skip_zeros() else "decode"

    def int8(q_NK: np.ndarray) -> StorageKind:
        return "dense" if stays_dense else best_storage(wanted_for, "i8", q_NK)

    companions = packed_companions(source)
    companions["tokenizer"] = _minified(companions["tokenizer"])
    with PackedWriter(path, **companions) as writer:
        for index, name in enumerate(names, start=1):
            values = types.of_matrix(name, anatomy)
            if values in ("i8", "i4"):
                matrix, roundings[name] = _write_rounded(writer, source, name, values, int8)
            else:
                matrix = _write_matrix(writer, source, name, int8)
            metrics = {
                "storage": matrix.storage,
                "values": matrix.values,
                "sparsity": round(matrix.sparsity, 4),
            }
            progress(Event("pack", name, index, len(names), metrics))
        for name in vector_sizes(anatomy, source.names):
            writer.vector(name, source.float32(name))
    integers = [matrix for matrix in writer.matrices.values() if matrix.values == "i8"]
    dense = stays_dense and any(matrix.sparsity > SMALLER_SPARSE for matrix in integers)
    return Packing(writer.matrices, roundings, dense)


def expands_int8_fast() -> bool:
    """Whether sparse int8 is as fast here as its bytes are few: `vpexpandb` came with AVX-512 VBMI2.

    AVX2 takes 20 cycles for 64 weights at any sparsity, a dense 64 bytes 5 (docs/results/kernels.jsonl).
    """
    return _native.levels()["avx512"]


def prompts_skip_zeros() -> bool:
    """Whether products of many tokens skip what is zero here.

    A matrix unit multiplies dense tiles several times faster than vectors multiply what is left of them, and
    below AVX-512 blocks are expanded first.
    """
    return _native.isa() in ("avx512", "avx512-bf16")


def scheme_of(source: Checkpoint) -> Scheme | None:
    """The scheme of a quantized checkpoint, None for a plain one; UnsupportedError for any other.

    CheckpointError where integer weights do not say what they stand for.
    """
    file = source.path / "config.json"
    scheme = read_scheme(source.config, str(file))
    if scheme:
        refuse_in_engine(scheme, str(file))
    integers = [name for name in source.linears if source.dtype(f"{name}.weight") == "I8"]
    if scheme is None and integers:
        known = " or ".join(scheme.summary for scheme in SCHEMES.values())
        raise CheckpointError(
            f"{file}: {integers[0]} is int8 without a quantization_config; expected {known}"
        )
    return scheme if integers else None


def packed_companions(source: Checkpoint) -> dict[str, Any]:
    """Arguments of PackedWriter that come from the small files."""
    files = read_files(source.path)
    small = {"tokenizer_config": files["config"], "generation_config": files["generation_config"]}
    metadata = {key: json.dumps(found) for key, found in small.items() if found}
    if source.architecture.is_encoder:
        metadata[POOLING] = json.dumps(Pooling.open(source.path, source.architecture).to_json())
    if (template := read_template(source.path)) is not None:
        metadata["chat_template"] = template
    if origin := source.downloaded or (source.manifest or {}).get("origin"):
        metadata["origin"] = json.dumps(origin)
    return {
        "config": json.dumps(source.config),
        "tokenizer": files["content"],
        "parent": source.hash,
        "metadata": metadata,
        "provenance": read_provenance(source),
    }


def _minified(text: bytes) -> bytes:
    """The same JSON without spaces and indentation, which are most of a large tokenizer.json."""
    return json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":")).encode()


def _write_matrix(writer: PackedWriter, source: Checkpoint, name: str, int8: Int8Storage) -> StoredMatrix:
    """Store a matrix as the checkpoint has it."""
    tensor = _tensor(source, name)
    dtype = source.dtype(tensor)
    if dtype == "I8" and (scheme := scheme_of(source)) and scheme.grouped:
        q_NK, scale_NG = source.raw(tensor), source.float32(f"{name}.weight_scale")
        scale_N, multiplier_NG = row_scales_and_multipliers(scale_NG, q_NK.shape[1], name)
        return writer.int4(name, q_NK, multiplier_NG, scale_N)
    if dtype == "I8":
        q_NK = source.raw(tensor)
        return writer.int8(name, q_NK, stored_scales(source, name), int8(q_NK))
    if dtype in ("F32", "BF16"):
        return writer.floats(name, source.raw(tensor))
    return writer.floats(name, source.float32(tensor))


def _write_rounded(
    writer: PackedWriter, source: Checkpoint, name: str, values: Rounded, int8: Int8Storage
) -> tuple[StoredMatrix, Rounding]:
    """Store a matrix rounded to integers."""
    found = rounded_matrix(source, name, values)
    if found.multiplier_NG is None:
        matrix = writer.int8(name, found.q_NK, found.scale_N, int8(found.q_NK))
    else:
        matrix = writer.int4(name, found.q_NK, found.multiplier_NG, found.scale_N)
    worst = int(found.row_errors.argmax())
    return matrix, Rounding(values, found.error, float(found.row_errors[worst]), worst)


def rounded_matrix(source: Checkpoint, name: str, values: Rounded) -> RoundedMatrix:
    """A matrix of a checkpoint as `pack` rounds it; of an int8 linear, what its weights stand for."""
    tensor = _tensor(source, name)
    raw_NK, dtype = source.raw(tensor), source.dtype(tensor)
    scale_NG = source.float32(f"{name}.weight_scale") if dtype == "I8" else None

    def read(begin: int, end: int) -> np.ndarray:
        if scale_NG is not None:
            return dequantized(raw_NK[begin:end], scale_NG[begin:end])
        return to_float32(raw_NK[begin:end], dtype)

    return round_matrix(values, raw_NK.shape, read)


def _tensor(source: Checkpoint, name: str) -> str:
    """The tensor that holds matrix `name`: of a tied head the embedding's."""
    anatomy = source.architecture
    tied = name == anatomy.head and anatomy.tie_word_embeddings
    return f"{anatomy.embedding if tied else name}.weight"


def stored_scales(source: Checkpoint, name: str) -> np.ndarray:
    """float32 [N]: the scales of an int8 linear of a checkpoint."""
    scale_N = source.float32(f"{name}.weight_scale")[:, 0]
    if (scale_N < 0).any():
        raise CheckpointError(f"{source.path}: {name}.weight_scale is negative somewhere; expected none")
    return scale_N
