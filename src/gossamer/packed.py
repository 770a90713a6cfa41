"""The packed model, one .goss file: reader and writer (docs/format.md specifies it).

A .goss file is a valid safetensors file: u64 header length, JSON header padded with spaces so that the data
begin at a multiple of 64 bytes, then the tensors, contiguous and each a multiple of 64 bytes long.

    with PackedWriter(path, config=config_text, tokenizer=tokenizer_json) as writer:
        writer.norm("model.norm.weight", w_D)
        writer.int8("model.layers.0.self_attn.q_proj", q_NK, scale_N)
        ...                                            # every matrix and norm of the config, in any order
    packed = Packed.open(path)
    packed.linear("model.layers.0.self_attn.q_proj")   # float32 [N, K]

`panels` lays out the weights and `packed_header` checks the header. None of them needs torch, and all hold
one tensor at a time. Opening checks everything that the header says; streams are checked when they are
decoded, here by `Packed.stored` and in the engine before the first kernel runs.
"""

import json
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

import numpy as np

from gossamer import panels, streams
from gossamer.architecture import Llama
from gossamer.errors import FormatError
from gossamer.packed_header import (
    DTYPES,
    EMBEDDING,
    HEAD,
    TOKENIZER,
    VERSION,
    Layer,
    Stored,
    check_tensors,
    norm_tensors,
    read_header,
    read_model,
)
from gossamer.panels import ALIGNMENT, PANEL_ROWS
from gossamer.weights import is_finite, to_float32

__all__ = ["EMBEDDING", "HEAD", "Layer", "Packed", "PackedWriter", "Stored", "native_config"]

_STORED = {np.dtype("<f4"): "F32", np.dtype("<u2"): "BF16", np.dtype("i1"): "I8"}
_VALUES: dict[np.dtype, Literal["f32", "bf16"]] = {np.dtype("<f4"): "f32", np.dtype("<u2"): "bf16"}
_COPY_BYTES = 1 << 24
_NORM_BYTES, _LAYER_BYTES = 256, 1024  # room in the header: more than the entries of a norm, a matrix take


@dataclass(frozen=True, eq=False)
class Packed:
    """An open .goss file, memory-mapped and read-only.

    `config` is the model's config.json, `tensors` says where everything lies (offsets from the beginning of
    `buffer`, the whole file as uint8), `layers` lists the matrices: the embedding, every decoder linear and,
    unless the head is the embedding itself, `lm_head`.
    """

    path: Path
    config: dict[str, Any]
    architecture: Llama
    metadata: dict[str, str]
    tensors: dict[str, Stored]
    layers: dict[str, Layer]
    buffer: np.ndarray

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Map a file and check its header; raises FormatError for anything but a sound packed model."""
        path = Path(path)
        if not path.is_file():
            raise FormatError(f"{path}: no such file; expected a packed model (.goss)")
        with path.open("rb") as file:
            if not (num_bytes := os.fstat(file.fileno()).st_size):
                raise FormatError(f"{path}: the file is empty; expected a packed model (.goss)")
            mapped = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)
        metadata, tensors = read_header(memoryview(mapped), str(path))
        config, architecture, layers = read_model(metadata, len(tensors), str(path))
        check_tensors(tensors, architecture, layers, str(path))
        return cls(path, config, architecture, metadata, tensors, layers, np.frombuffer(mapped, np.uint8))

    @property
    def file_bytes(self) -> int:
        return self.buffer.size

    @property
    def head(self) -> str:
        """Name of the matrix that makes the logits: `lm_head`, or the embedding where they are tied."""
        return HEAD if HEAD in self.layers else EMBEDDING

    @property
    def tokenizer_json(self) -> bytes | None:
        """The tokenizer.json text, or None in a file without one (a synthetic model)."""
        return self.array(TOKENIZER).tobytes().rstrip(b"\0") if TOKENIZER in self.tensors else None

    @property
    def chat_template(self) -> str | None:
        return self.metadata.get("chat_template")

    @property
    def tokenizer_config(self) -> dict[str, Any]:
        return self._json("tokenizer_config")

    @property
    def generation_config(self) -> dict[str, Any]:
        return self._json("generation_config")

    def _json(self, key: str) -> dict[str, Any]:
        try:
            parsed = json.loads(self.metadata.get(key, "{}"))
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{self.path}: metadata {key} is not valid JSON ({str(error)!a})") from error
        if not isinstance(parsed, dict):
            raise FormatError(f"{self.path}: metadata {key} is no JSON object")
        return parsed

    def array(self, name: str) -> np.ndarray:
        """A tensor as it is stored, without a copy (bfloat16 as uint16 bit patterns)."""
        stored = self.tensors[name]
        piece = self.buffer[stored.offset : stored.offset + stored.nbytes]
        return piece.view(DTYPES[stored.dtype]).reshape(stored.shape)

    def stored(self, name: str) -> np.ndarray:
        """Matrix `name` as [rows, columns] of its values: float32, bfloat16 bit patterns (uint16) or int8.

        Decodes panels and streams, and raises FormatError where they contradict the header.
        """
        layer, source = self.layers[name], f"{self.path}: {name}"
        if layer.storage == "sparse":
            stream, offsets = self.array(f"{name}.weight.stream"), self.array(f"{name}.weight.offsets")
            w_NK = streams.decode(layer.values, stream, offsets, layer.rows, layer.columns, source)
        else:
            w_NK = panels.from_panels(
                layer.values, self.array(f"{name}.weight"), layer.rows, layer.columns, source
            )
        if (nonzeros := count_nonzero(w_NK)) != layer.nonzeros:
            raise FormatError(
                f"{source}: found {nonzeros} nonzero weights; the layer table says {layer.nonzeros}"
            )
        if not is_finite(w_NK, _STORED[w_NK.dtype]):
            raise FormatError(f"{source} holds NaN or infinite weights; the file is damaged")
        return w_NK

    def scale(self, name: str) -> np.ndarray:
        """float32 [N] scales of an int8 matrix, one a row; FormatError unless finite and not negative."""
        padded, rows = self.array(f"{name}.weight_scale"), self.layers[name].rows
        if not np.isfinite(padded).all() or (padded < 0).any() or padded[rows:].any():
            raise FormatError(
                f"{self.path}: {name}: scales must be finite, not negative, and 0 in the padding"
            )
        return padded[:rows]

    def linear(self, name: str) -> np.ndarray:
        """Matrix `name` as float32 [N, K]."""
        w_NK = self.stored(name)
        if w_NK.dtype == np.int8:
            return w_NK * self.scale(name)[:, None]
        return to_float32(w_NK, _STORED[w_NK.dtype])

    def norm(self, name: str) -> np.ndarray:
        """float32 [D] weights of an RMSNorm, such as `model.norm.weight`; FormatError unless finite."""
        if not np.isfinite(padded := self.array(name)).all():
            raise FormatError(f"{self.path}: {name} holds NaN or infinite values; the file is damaged")
        return padded[: self.architecture.hidden_size]

    def check(self) -> None:
        """Decode everything; FormatError for the first matrix or norm that is not sound."""
        for name, layer in self.layers.items():
            w_NK = self.stored(name)
            if layer.values != "i8":
                continue
            self.scale(name)
            sum_N = self.array(f"{name}.weight_sum")
            if not np.array_equal(sum_N, _padded(w_NK.sum(axis=1, dtype=np.int32), PANEL_ROWS)):
                raise FormatError(f"{self.path}: {name}: the row sums are not those of its weights")
        for name in norm_tensors(self.architecture):
            self.norm(name)

    def layer_bytes(self, name: str) -> int:
        """Bytes in the file of matrix `name`: values, masks, offsets, scales and sums."""
        return sum(self.tensors[tensor].nbytes for tensor in self.layers[name].tensors(name))

    @property
    def decoder(self) -> list[str]:
        """Names of the decoder's linears: every matrix but the embedding and the head."""
        return [name for name in self.layers if name not in (EMBEDDING, HEAD)]

    def sparsity(self, names: Iterable[str]) -> float:
        """Fraction of zeros over all of the named matrices."""
        layers = [self.layers[name] for name in names]
        return 1 - sum(layer.nonzeros for layer in layers) / sum(layer.num_weights for layer in layers)

    def bits_per_weight(self, names: Iterable[str]) -> float:
        """Bits in the file per weight of the named matrices, masks, offsets, scales and sums included."""
        names = list(names)
        return 8 * sum(map(self.layer_bytes, names)) / sum(self.layers[name].num_weights for name in names)

    def native_tensors(self) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
        """Name -> (dtype, shape, byte offset in `buffer`, byte length), for `_native.Model`."""
        return {name: (t.dtype, t.shape, t.offset, t.nbytes) for name, t in self.tensors.items()}

    def native_config(self) -> dict[str, Any]:
        """The numbers and the table of matrices that `_native.Model` wants."""
        return native_config(self.architecture, self.layers)


def native_config(llama: Llama, layers: Mapping[str, Layer]) -> dict[str, Any]:
    """What `_native.Model` wants to know of a model: its numbers and the table of its matrices."""
    names = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
    numbers = {name: getattr(llama, name) for name in (*names, "vocab_size", "rms_norm_eps")}
    linears = {name: asdict(layer) for name, layer in layers.items()}
    return numbers | {"inverse_frequencies": llama.inverse_frequencies(), "linears": linears}


class PackedWriter:
    """Writes a .goss file tensor by tensor to `FILE.partial`, and renames it when it is whole and checked.

    `config` is the text of the model's config.json, `tokenizer` of its tokenizer.json; `metadata` may add
    chat_template, tokenizer_config and generation_config. Any exception, a full disk included, removes the
    partial file. An existing `path` is replaced.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        config: str,
        tokenizer: bytes = b"",
        parent: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.layers: dict[str, Layer] = {}
        self._metadata = {"format": "gossamer", "version": str(VERSION), "config": config, "parent": parent}
        self._metadata |= dict(metadata or {})
        self._tokenizer = tokenizer
        self._entries: dict[str, dict[str, Any]] = {}
        num_layers = Llama.parse(json.loads(config)).num_layers
        room = (7 * num_layers + 3) * _LAYER_BYTES + 2 * num_layers * _NORM_BYTES
        self._data_begin = panels.round_up(len(json.dumps(self._metadata)) + room, ALIGNMENT)
        self._position = self._data_begin
        self._file: BinaryIO

    def __enter__(self) -> Self:
        self._file = self.partial.open("w+b", buffering=0)
        try:
            self._file.seek(self._data_begin)
            if self._tokenizer:
                self._tensor(TOKENIZER, "U8", [_padded(np.frombuffer(self._tokenizer, np.uint8), ALIGNMENT)])
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

    def norm(self, name: str, w_D: np.ndarray) -> None:
        """Add the float32 weights of an RMSNorm under its tensor name, such as `model.norm.weight`."""
        self._tensor(name, "F32", [_padded(w_D.astype("<f4"), ALIGNMENT // 4)])

    def dense(self, name: str, w_NK: np.ndarray) -> Layer:
        """Add a matrix of float32, or of bfloat16 bit patterns (uint16), under its name without `.weight`."""
        layer = Layer("dense", _VALUES[w_NK.dtype], *w_NK.shape, nonzeros=count_nonzero(w_NK))
        return self._matrix(name, layer, w_NK)

    def int8(
        self,
        name: str,
        q_NK: np.ndarray,
        scale_N: np.ndarray,
        storage: Literal["auto", "sparse", "dense"] = "auto",
    ) -> Layer:
        """Add an int8 matrix with its row scales; "auto" stores it sparse where that takes fewer bytes."""
        assert q_NK.dtype == np.int8 and scale_N.shape == q_NK.shape[:1]
        rows, columns = q_NK.shape
        nonzeros = count_nonzero(q_NK)
        if storage == "auto":
            sparse_bytes = streams.stream_bytes("i8", rows, columns, nonzeros) + 8 * streams.num_offsets(rows)
            storage = "sparse" if sparse_bytes < panels.dense_bytes("i8", rows, columns) else "dense"
        layer = self._matrix(name, Layer(storage, "i8", rows, columns, nonzeros), q_NK)
        sum_N = q_NK.sum(axis=1, dtype=np.int32)
        self._tensor(f"{name}.weight_scale", "F32", [_padded(scale_N.astype("<f4"), PANEL_ROWS)])
        self._tensor(f"{name}.weight_sum", "I32", [_padded(sum_N, PANEL_ROWS)])
        return layer

    def repeat(self, name: str, written: str) -> Layer:
        """Add a matrix equal to one already written, as other bytes of the file: for synthetic models."""
        layer = self.layers[name] = self.layers[written]
        for tensor, former in zip(layer.tensors(name), layer.tensors(written), strict=True):
            entry = self._entries[former]
            self._tensor(tensor, entry["dtype"], self._read(*entry["data_offsets"]), tuple(entry["shape"]))
        return layer

    def _read(self, begin: int, end: int) -> Iterable[np.ndarray]:
        for at in range(begin, end, _COPY_BYTES):
            data = os.pread(self._file.fileno(), min(_COPY_BYTES, end - at), self._data_begin + at)
            yield np.frombuffer(data, np.uint8)

    def _matrix(self, name: str, layer: Layer, w_NK: np.ndarray) -> Layer:
        self.layers[name] = layer
        spans = panels.panel_chunks(layer.rows, layer.columns)
        if layer.storage == "dense":
            dtype, shape = layer.tensors(name)[f"{name}.weight"]
            self._tensor(
                f"{name}.weight", dtype, (panels.to_panels(layer.values, w_NK[i:j]) for i, j in spans), shape
            )
            return layer
        lengths: list[np.ndarray] = []

        def stream() -> Iterable[np.ndarray]:
            for i, j in spans:
                piece, lengths_P = streams.encode_panels(layer.values, w_NK[i:j])
                lengths.append(lengths_P)
                yield piece
            num_bytes = int(sum(part.sum() for part in lengths))
            total_bytes = streams.stream_bytes(layer.values, layer.rows, layer.columns, layer.nonzeros)
            yield np.zeros(total_bytes - num_bytes, np.uint8)

        self._tensor(f"{name}.weight.stream", "U8", stream())
        self._tensor(f"{name}.weight.offsets", "U64", [streams.panel_offsets(np.concatenate(lengths))])
        return layer

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

    def _finish(self) -> None:
        layers = json.dumps({name: asdict(layer) for name, layer in self.layers.items()})
        header = {"__metadata__": self._metadata | {"layers": layers}} | self._entries
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

    def _abandon(self) -> None:
        self._file.close()
        self.partial.unlink(missing_ok=True)


def count_nonzero(w_NK: np.ndarray) -> int:
    """Weights that are not zero; -0.0 is zero, in bfloat16 bit patterns (uint16) too."""
    if w_NK.dtype == np.uint16:
        parts = np.array_split(w_NK, -(-w_NK.size // (1 << 24)))
        return sum(int(np.count_nonzero(part & 0x7FFF)) for part in parts)
    return int(np.count_nonzero(w_NK))


def _padded(vector: np.ndarray, multiple: int) -> np.ndarray:
    return np.pad(vector, (0, -vector.size % multiple))
