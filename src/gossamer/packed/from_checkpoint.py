"""From a checkpoint directory to one .goss file.

Value types come from the checkpoint: float32 and bfloat16 stay what they are, float16 becomes float32, and
int8 and int4 weights (compressed-tensors' int-quantized W8A8 and W4A8) stay integers. Every matrix but the
embedding is sparse if that is smaller. Tensors are read, packed and dropped one at a time; nothing here needs
torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gossamer import _native
from gossamer.architecture.anatomy import EMBEDDING, HEAD
from gossamer.checkpoint.directory import Checkpoint
from gossamer.checkpoint.provenance import read_provenance
from gossamer.checkpoint.schemes import (
    SCHEMES,
    Scheme,
    read_scheme,
    refuse_in_engine,
    row_scales_and_multipliers,
)
from gossamer.checkpoint.weights import to_float32
from gossamer.errors import CheckpointError
from gossamer.job.report import Event, Progress, quiet
from gossamer.packed.header import StoredMatrix, matrix_shapes, vector_sizes
from gossamer.packed.panels import panel_chunks
from gossamer.packed.writer import PackedWriter
from gossamer.tokens.encoder import read_files
from gossamer.tokens.tokenizer import Tokenizer, read_template

SMALLER_SPARSE = 1 / 8  # a mask bit a weight against the 8 bits of each zero
Head = Literal["auto", "keep", "i8"]
Storage = Literal["auto", "smallest"]


@dataclass(frozen=True)
class Packing:
    """What was written: every matrix, and the relative error of a head that was rounded to int8 here.

    `dense_for_speed`: whether int8 was left dense for this machine though zeros would have made it smaller.
    """

    matrices: dict[str, StoredMatrix]
    head_error: float | None
    dense_for_speed: bool


def pack_checkpoint(
    source: Checkpoint,
    path: Path,
    head: Head = "auto",
    progress: Progress = quiet,
    storage: Storage = "auto",
) -> Packing:
    """Write `source` as one .goss file, whole or not at all.

    `head`: "keep" stores the output head as the checkpoint does, "i8" rounds it to int8 with a scale a row,
    "auto" does so if the decoder is int8. `storage`: "smallest" stores every matrix sparse where that takes
    fewer bytes; "auto" too, but leaves int8 dense where this machine reads it faster so. Raises
    UnsupportedError for a quantization that we do not run.
    """
    round_head = head == "i8" or (head == "auto" and scheme_of(source) is not None)
    names = [*matrix_shapes(source.architecture)]
    if round_head and HEAD not in names:
        names.append(HEAD)
    Tokenizer.open(source.path)  # which must be sound, and its ids have rows in the embedding
    error = None
    int8 = "auto" if storage == "smallest" or expands_int8_fast() else "dense"
    with PackedWriter(path, **packed_companions(source)) as writer:
        for index, name in enumerate(names, start=1):
            if name == HEAD and round_head:
                matrix, error = _write_rounded(writer, source, int8)
            else:
                matrix = _write_matrix(writer, source, name, int8)
            metrics = {
                "storage": matrix.storage,
                "values": matrix.values,
                "sparsity": round(matrix.sparsity, 4),
            }
            progress(Event("pack", name, index, len(names), metrics))
        for name in vector_sizes(source.architecture):
            writer.vector(name, source.float32(name))
    integers = [matrix for matrix in writer.matrices.values() if matrix.values == "i8"]
    dense = int8 == "dense" and any(matrix.sparsity > SMALLER_SPARSE for matrix in integers)
    return Packing(writer.matrices, error, dense)


def expands_int8_fast() -> bool:
    """Whether sparse int8 is as fast here as its bytes are few: `vpexpandb` came with AVX-512 VBMI2.

    AVX2 takes 20 cycles for 64 weights at any sparsity, a dense 64 bytes 5 (docs/results/kernels.jsonl).
    """
    return _native.isa() in ("avx512", "amx")


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


def _write_matrix(
    writer: PackedWriter, source: Checkpoint, name: str, int8: Literal["auto", "dense"]
) -> StoredMatrix:
    dtype = source.dtype(f"{name}.weight")
    if dtype == "I8" and (scheme := scheme_of(source)) and scheme.grouped:
        q_NK, scale_NG = source.raw(f"{name}.weight"), source.float32(f"{name}.weight_scale")
        scale_N, multiplier_NG = row_scales_and_multipliers(scale_NG, q_NK.shape[1], name)
        return writer.int4(name, q_NK, multiplier_NG, scale_N)
    if dtype == "I8":
        return writer.int8(name, source.raw(f"{name}.weight"), stored_scales(source, name), int8)
    if dtype in ("F32", "BF16"):
        return writer.floats(name, source.raw(f"{name}.weight"))
    return writer.floats(name, source.float32(f"{name}.weight"))


def stored_scales(source: Checkpoint, name: str) -> np.ndarray:
    """float32 [N]: the scales of an int8 linear of a checkpoint."""
    scale_N = source.float32(f"{name}.weight_scale")[:, 0]
    if (scale_N < 0).any():
        raise CheckpointError(f"{source.path}: {name}.weight_scale is negative somewhere; expected none")
    return scale_N


def _write_rounded(
    writer: PackedWriter, source: Checkpoint, int8: Literal["auto", "dense"]
) -> tuple[StoredMatrix, float]:
    """Store the head in int8, some rows at a time; returns |w - rounded w| / |w| too."""
    tensor = f"{EMBEDDING if source.architecture.tie_word_embeddings else HEAD}.weight"
    raw_NK, dtype = source.raw(tensor), source.dtype(tensor)
    q_NK, scale_N = np.empty(raw_NK.shape, np.int8), np.empty(len(raw_NK), np.float32)
    square_error = square = 0.0
    for begin, end in panel_chunks(*raw_NK.shape):
        w_NK = to_float32(raw_NK[begin:end], dtype)
        q_NK[begin:end], scale_N[begin:end] = round_rows(w_NK)
        back_NK = q_NK[begin:end] * scale_N[begin:end, None]
        square_error += float(np.square(w_NK - back_NK).sum(dtype=np.float64))
        square += float(np.square(w_NK).sum(dtype=np.float64))
    return writer.int8(HEAD, q_NK, scale_N, int8), (square_error / square) ** 0.5 if square else 0.0


def round_rows(w_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round float32 weights to int8 [N, K], scales [N] = max |row| / 127; a row of zeros has scale 0."""
    scale_N = np.abs(w_NK).max(axis=1) / np.float32(127)
    divisor_N1 = np.where(scale_N > 0, scale_N, np.float32(1))[:, None]
    return np.clip(np.rint(w_NK / divisor_N1), -127, 127).astype(np.int8), scale_N
