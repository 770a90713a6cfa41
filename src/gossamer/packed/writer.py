"""The packed model, one .goss file: reader and writer (docs/format.md specifies it).

A .goss file is a valid safetensors file: u64 header length, JSON header padded with spaces so that the data
begin at a multiple of 64 bytes, then the tensors, contiguous and each a multiple of 64 bytes long.

    with PackedWriter(path, config=config_text, tokenizer=tokenizer_json) as writer:
        writer.vector("model.norm.weight", w_D)
        writer.int8("model.layers.0.self_attn.q_proj", q_NK, scale_N)
        ...                                            # every tensor of the model, in any order
    packed = Packed.open(path)
    packed.linear("model.layers.0.self_attn.q_proj")   # float32 [N, K]

The writer is here, the reader in `reader`; `panels` and `streams` lay out the weights, `header` checks the
header. None of them needs torch, and all hold one tensor at a time. Opening checks everything that
the header says; streams are checked when they are decoded, by `Packed.stored` and in the engine before the
first kernel runs.
"""

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

import numpy as np

from gossamer.architecture.families import read_anatomy
from gossamer.checkpoint.provenance import Provenance
from gossamer.packed import blocks, panels, streams
from gossamer.packed.header import (
    DEFLATED,
    DTYPES,
    PROVENANCE,
    TABLE,
    StorageKind,
    StoredMatrix,
    matrix_shapes,
    needed_version,
    tokenizer_tensor,
    vector_sizes,
)
from gossamer.packed.panels import ALIGNMENT, count_nonzero, padded
from gossamer.packed.reader import Packed
from gossamer.packed.values import NUMBER_TYPES, PANEL_ROWS, Values

Storage = StorageKind | Literal["auto"]
Purpose = Literal["decode", "prompts", "both"]

# Multiply-adds a second of a dense product over those of live blocks: 1.6 to 2.0 on a Xeon without its tiles
# (docs/results/skipping.jsonl), 1.1 on Zen 4 by the probe (docs/LOG.md).
DENSE_GAIN = 1.7
_COPY_BYTES = 1 << 24
_VECTOR_BYTES, _MATRIX_BYTES = 256, 1024  # room in the header: more than the entry of either takes


class PackedWriter:
    """Writes a .goss file tensor by tensor to `FILE.partial`, and renames it when it is whole and checked.

    `config` is the text of the model's config.json, to which `provenance` is added, `tokenizer` that of its
    tokenizer.json; `metadata` may add chat_template, tokenizer_config, generation_config, and an encoder's
    pooling. Any exception, a full disk included, removes the partial file. An existing `path` is replaced.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        config: str,
        tokenizer: bytes = b"",
        parent: str = "",
        metadata: Mapping[str, str] | None = None,
        provenance: Provenance | None = None,
    ) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.matrices: dict[str, StoredMatrix] = {}
        self._anatomy = anatomy = read_anatomy(json.loads(config))
        if provenance and (known := provenance.to_json()):
            config = json.dumps(json.loads(config) | {PROVENANCE: known})
        version = needed_version(anatomy)  # of what is known so far
        self._metadata = {"format": "gossamer", "version": version, "config": config, "parent": parent}
        self._metadata |= dict(metadata or {})
        self._tokenizer = tokenizer
        self._entries: dict[str, dict[str, Any]] = {}
        num_vectors = len(vector_sizes(anatomy, anatomy.optional))
        room = (len(matrix_shapes(anatomy)) + 2) * _MATRIX_BYTES + num_vectors * _VECTOR_BYTES
        self._data_begin = panels.round_up(len(json.dumps(self._metadata)) + room, ALIGNMENT)
        self._position = self._data_begin
        self._file: BinaryIO

    def __enter__(self) -> Self:
        self._file = self.partial.open("w+b", buffering=0)
        try:
            self._file.seek(self._data_begin)
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._abandon()  # nothing is left to remove after a rename

    def vector(self, name: str, vector: np.ndarray) -> None:
        """Add a norm's weight, a bias or a small table, as float32, under its name: `model.norm.weight`."""
        self._tensor(name, "F32", [padded(vector.astype("<f4").reshape(-1), ALIGNMENT // 4)])

    def floats(self, name: str, w_NK: np.ndarray, storage: Storage = "auto") -> StoredMatrix:
        """Add a matrix of float32, or of bfloat16 bit patterns (uint16), under its name without `.weight`.

        "auto" stores every matrix sparse where that takes fewer bytes, but the embedding, whose rows are
        looked up one by one: it is always dense.
        """
        values = "f32" if w_NK.dtype == NUMBER_TYPES["f32"].dtype else "bf16"
        return self._matrix(name, values, w_NK, storage)

    def int8(
        self, name: str, q_NK: np.ndarray, scale_N: np.ndarray, storage: Storage = "auto"
    ) -> StoredMatrix:
        """Add an int8 matrix with its row scales.

        "auto" takes the way of the three that takes the fewest bytes.
        """
        assert scale_N.shape == q_NK.shape[:1]
        matrix = self._matrix(name, "i8", q_NK, storage)
        self._rows(name, scale_N, q_NK)
        return matrix

    def int4(
        self,
        name: str,
        q_NK: np.ndarray,
        multiplier_NG: np.ndarray,
        scale_N: np.ndarray,
        storage: Storage = "auto",
    ) -> StoredMatrix:
        """Add a matrix of weights q x multiplier x scale: q from -8 to 7, as int8.

        A multiplier, 1 to 16, is for a row and group of 128 inputs; a scale for a row. q times multiplier is
        the int8 weight of the kernels.
        """
        assert scale_N.shape == q_NK.shape[:1] and q_NK.min() >= -8 and q_NK.max() <= 7
        assert multiplier_NG.min() >= 1 and multiplier_NG.max() <= panels.MAX_MULTIPLIER
        matrix = self._matrix(name, "i4", q_NK, storage)
        self._tensor(f"{name}.weight_multiplier", "U8", [panels.to_multipliers(multiplier_NG)])
        self._rows(name, scale_N, panels.multiply_groups(q_NK, multiplier_NG))
        return matrix

    def _rows(self, name: str, scale_N: np.ndarray, w_NK: np.ndarray) -> None:
        """The scales and sums of a matrix of int8 weights."""
        sum_N = w_NK.sum(axis=1, dtype=np.int32)
        self._tensor(f"{name}.weight_scale", "F32", [padded(scale_N.astype("<f4"), PANEL_ROWS)])
        self._tensor(f"{name}.weight_sum", "I32", [padded(sum_N, PANEL_ROWS)])

    def repeat(self, name: str, written: str) -> StoredMatrix:
        """Add a matrix equal to one already written, as other bytes of the file: for synthetic models."""
        matrix = self.matrices[name] = self.matrices[written]
        for tensor, former in zip(matrix.tensors(name), matrix.tensors(written), strict=True):
            entry = self._entries[former]
            self._tensor(tensor, entry["dtype"], self._read(*entry["data_offsets"]), tuple(entry["shape"]))
        return matrix

    def _read(self, begin: int, end: int) -> Iterable[np.ndarray]:
        for at in range(begin, end, _COPY_BYTES):
            data = os.pread(self._file.fileno(), min(_COPY_BYTES, end - at), self._data_begin + at)
            yield np.frombuffer(data, np.uint8)

    def _matrix(self, name: str, values: Values, w_NK: np.ndarray, storage: Storage) -> StoredMatrix:
        if name == self._anatomy.embedding:
            storage = "dense"
        elif storage == "auto":
            storage = smallest_storage(values, w_NK)
        matrix = self.matrices[name] = StoredMatrix(
            storage, values, *w_NK.shape, nonzeros=count_nonzero(w_NK)
        )
        spans = panels.panel_chunks(*w_NK.shape)
        if storage == "dense":
            pieces = (panels.to_panels(values, w_NK[i:j]) for i, j in spans)
            dtype, shape = matrix.tensors(name)[f"{name}.weight"]
            self._tensor(f"{name}.weight", dtype, pieces, shape)
            return matrix
        lengths: list[np.ndarray] = []

        def stream() -> Iterable[np.ndarray]:
            for i, j in spans:
                piece, lengths_P = blocks.panels_stored_as(storage, values, w_NK[i:j])
                lengths.append(lengths_P)
                yield piece
            yield streams.slack(int(sum(part.sum() for part in lengths)))

        self._tensor(f"{name}.weight.stream", "U8", stream())
        self._tensor(f"{name}.weight.offsets", "U64", [streams.panel_offsets(np.concatenate(lengths))])
        return matrix

    def _tensor(
        self, name: str, dtype: str, pieces: Iterable[np.ndarray], shape: tuple[int, ...] | None = None
    ) -> None:
        """Append one tensor; without a `shape` it is a vector of all that came."""
        assert name not in self._entries, f"{name} is written twice"
        begin = self._position
        for piece in pieces:
            self._write(piece)
        size = (self._position - begin) // DTYPES[dtype].itemsize
        span = [begin - self._data_begin, self._position - self._data_begin]
        self._entries[name] = {"dtype": dtype, "shape": list(shape or (size,)), "data_offsets": span}

    def _write(self, data: np.ndarray) -> None:
        rest = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        self._position += len(rest)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            reason = f"cannot write the packed model: {error.strerror}"
            raise OSError(error.errno, reason, str(self.path)) from error

    def _write_tokenizer(self) -> None:
        """As the version has it: so it comes last."""
        name, text = tokenizer_tensor(self._metadata["version"]), self._tokenizer
        stored = zlib.compress(text, 9) if name == DEFLATED else text
        self._tensor(name, "U8", [padded(np.frombuffer(stored, np.uint8), ALIGNMENT)])

    def _finish(self) -> None:
        embedding, in_blocks = self.matrices.get(self._anatomy.embedding), "blocks" in self._storages()
        values = embedding.values if embedding else "f32"
        self._metadata["version"] = needed_version(self._anatomy, values, in_blocks)
        if self._tokenizer:
            self._write_tokenizer()
        table = json.dumps({name: asdict(matrix) for name, matrix in self.matrices.items()})
        header = {"__metadata__": self._metadata | {TABLE: table}} | self._entries
        text = json.dumps(header, separators=(",", ":")).encode()
        room = self._data_begin - 8
        assert len(text) <= room, f"the header takes {len(text)} bytes; {room} were set aside"
        self._file.seek(0)
        self._write(np.frombuffer(room.to_bytes(8, "little") + text.ljust(room), np.uint8))
        os.fsync(self._file.fileno())
        Packed.open(self.partial)
        self.partial.replace(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _storages(self) -> set[StorageKind]:
        return {matrix.storage for matrix in self.matrices.values()}

    def _abandon(self) -> None:
        self._file.close()
        self.partial.unlink(missing_ok=True)


def stored_bytes(values: str, w_NK: np.ndarray) -> dict[StorageKind, float]:
    """Bytes of a matrix in each way that its type can be stored; streams with their offsets.

    Dense is counted without its padding, which would store small matrices sparse that have no zeros at all.
    """
    rows, columns = w_NK.shape
    offsets = 8 * streams.num_offsets(rows)
    stream = streams.stream_bytes(values, rows, columns, streams.count_value_bytes(values, w_NK))
    found: dict[StorageKind, float] = {
        "dense": NUMBER_TYPES[values].bits / 8 * w_NK.size, "sparse": stream + offsets
    }  # fmt: skip
    if values == "i8":
        found["blocks"] = blocks.stream_bytes(rows, columns, blocks.count_live(w_NK)) + offsets
    return found


def smallest_storage(values: str, w_NK: np.ndarray) -> StorageKind:
    """The way that takes the fewest bytes: what is best for decoding."""
    return best_storage("decode", values, w_NK)


def best_storage(purpose: Purpose, values: str, w_NK: np.ndarray) -> StorageKind:
    """The way that suits a purpose, where products skip the blocks that are not live.

    Decoding takes as long as its bytes, a prompt as its live blocks; a dense product multiplies faster than
    they are: DENSE_GAIN. For both, what one loses must not be more than the other gains.
    """
    num_bytes = stored_bytes(values, w_NK)
    smallest = min(num_bytes, key=lambda storage: num_bytes[storage])
    if values != "i8" or purpose == "decode" or smallest == "blocks":
        return smallest
    work = DENSE_GAIN * blocks.count_live(w_NK) / blocks.num_blocks(*w_NK.shape)
    if purpose == "both":
        work *= num_bytes["blocks"] / num_bytes[smallest]
    return "blocks" if work < 1 else smallest
