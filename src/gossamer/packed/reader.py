"""The packed model, one .goss file, as its readers see it: mapped, checked, decoded (docs/format.md)."""

import json
import math
import mmap
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from gossamer.architecture.anatomy import Anatomy, Block
from gossamer.architecture.frequencies import inverse_frequencies, rotary_scale
from gossamer.architecture.rope import Rope
from gossamer.checkpoint.gguf import refuse_gguf
from gossamer.checkpoint.provenance import Provenance
from gossamer.checkpoint.weights import is_finite, to_float32
from gossamer.errors import FormatError, UnsupportedError
from gossamer.job.report import Table
from gossamer.packed import blocks, panels, streams
from gossamer.packed.header import (
    DEFLATED,
    DTYPES,
    Stored,
    StoredMatrix,
    check_tensors,
    read_header,
    read_model,
    read_pooling,
    tokenizer_tensor,
    vector_tensors,
)
from gossamer.packed.values import PANEL_ROWS
from gossamer.tokens.pooling import Pooling

MAX_TOKENIZER_BYTES = 1 << 28  # seven times the largest tokenizers that there are


@dataclass(frozen=True, eq=False)
class Packed:
    """An open .goss file, memory-mapped and read-only.

    `config` is the model's config.json, `tensors` says where everything lies (offsets from the beginning of
    `buffer`, the whole file as uint8), `matrices` is the header's table of them: the embedding, every decoder
    linear and, unless the head is the embedding itself, `lm_head`; an encoder has no head. `provenance` says
    where the model is from.
    """

    path: Path
    config: dict[str, Any]
    architecture: Anatomy
    metadata: dict[str, str]
    tensors: dict[str, Stored]
    matrices: dict[str, StoredMatrix]
    buffer: np.ndarray
    provenance: Provenance = field(default_factory=Provenance)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Map a file and check its header; raises FormatError for anything but a sound packed model."""
        path = Path(path)
        if not path.is_file():
            raise FormatError(f"{path}: no such file; expected a packed model (.goss)")
        refuse_gguf(path)
        with path.open("rb") as file:
            if not (num_bytes := os.fstat(file.fileno()).st_size):
                raise FormatError(f"{path}: the file is empty; expected a packed model (.goss)")
            mapped = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)
        metadata, tensors = read_header(memoryview(mapped), str(path))
        config, provenance, architecture, matrices = read_model(metadata, len(tensors), str(path))
        check_tensors(tensors, architecture, matrices, metadata["version"], str(path))
        buffer = np.frombuffer(mapped, np.uint8)
        return cls(path, config, architecture, metadata, tensors, matrices, buffer, provenance)

    @property
    def file_bytes(self) -> int:
        return self.buffer.size

    @property
    def head(self) -> str:
        """Name of the matrix that makes the logits: `lm_head`, or the embedding where they are tied.

        UnsupportedError of an encoder, which has none.
        """
        self.refuse_encoder()
        return _head(self.architecture, self.matrices)

    def refuse_encoder(self) -> None:
        """UnsupportedError of a model that foretells no tokens."""
        if self.architecture.is_encoder:
            raise UnsupportedError(
                f"{self.path}: a {self.architecture.model_type}, an encoder, which continues no text; "
                "gossamer.Encoder, `embed` and `serve` work with it, and `evaluate --kind sts` (retrieval, "
                "classification, tokens, qa) measures it"
            )

    @property
    def pooling(self) -> Pooling:
        """How an encoder makes the vector of a text; UnsupportedError of a decoder."""
        self.refuse_decoder()
        return read_pooling(self.metadata, self.architecture, str(self.path))

    def refuse_decoder(self) -> None:
        """UnsupportedError of a model that is no encoder."""
        if not self.architecture.is_encoder:
            raise UnsupportedError(
                f"{self.path}: a {self.architecture.model_type}, a decoder, which makes no vectors of texts; "
                "gossamer.LLM continues texts with it"
            )

    @property
    def tokenizer_json(self) -> bytes | None:
        """The tokenizer.json text, or None in a file without one (a synthetic model)."""
        name = tokenizer_tensor(self.metadata["version"])
        if name not in self.tensors:
            return None
        stored = self.array(name).tobytes()
        return self._inflated(stored, name) if name == DEFLATED else stored.rstrip(b"\0")

    def _inflated(self, stored: bytes, name: str) -> bytes:
        """What zlib made of a text; FormatError where that is damaged, or far larger than any tokenizer."""
        stream = zlib.decompressobj()
        try:
            text = stream.decompress(stored, MAX_TOKENIZER_BYTES)
        except zlib.error as error:
            raise FormatError(f"{self.path}: {name} cannot be inflated ({error})") from error
        if not stream.eof or stream.unused_data.strip(b"\0"):
            raise FormatError(
                f"{self.path}: {name} is cut off, or more than {MAX_TOKENIZER_BYTES:,} bytes, or has bytes "
                "behind its end; the file is damaged"
            )
        return text

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

        An int4 matrix comes as the int8 weights that it stands for, multipliers applied. Decodes panels and
        streams, and raises FormatError where they contradict the header.
        """
        w_NK = self._weights(name)
        if self.matrices[name].type.paired:
            return panels.multiply_groups(w_NK, self.multiplier(name))
        return w_NK

    def _weights(self, name: str) -> np.ndarray:
        """What the panels of `name` hold, [N, K]."""
        matrix, source = self.matrices[name], f"{self.path}: {name}"
        if matrix.storage != "dense":
            stream, offsets = self.array(f"{name}.weight.stream"), self.array(f"{name}.weight.offsets")
            place = (stream, offsets, matrix.rows, matrix.columns, source)
            sparse = matrix.storage == "sparse"
            w_NK = streams.decode(matrix.values, *place) if sparse else blocks.decode(*place)
        else:
            w_NK = panels.from_panels(
                matrix.values, self.array(f"{name}.weight"), matrix.rows, matrix.columns, source
            )
        if (nonzeros := panels.count_nonzero(w_NK)) != matrix.nonzeros:
            raise FormatError(
                f"{source}: found {nonzeros} nonzero weights; the table of matrices says {matrix.nonzeros}"
            )
        if not is_finite(w_NK, self.matrices[name].type.stored):
            raise FormatError(f"{source} holds NaN or infinite weights; the file is damaged")
        return w_NK

    def multiplier(self, name: str) -> np.ndarray:
        """uint8 [N, G] multipliers of an int4 matrix: groups of 128 inputs; FormatError unless 1..16."""
        stored, matrix = self.array(f"{name}.weight_multiplier"), self.matrices[name]
        return panels.from_multipliers(stored, matrix.rows, matrix.columns, f"{self.path}: {name}")

    def scale(self, name: str) -> np.ndarray:
        """float32 [N] scales of an int8 or int4 matrix; FormatError unless finite and not negative."""
        padded, rows = self.array(f"{name}.weight_scale"), self.matrices[name].rows
        if not np.isfinite(padded).all() or (padded < 0).any() or padded[rows:].any():
            raise FormatError(
                f"{self.path}: {name}: scales must be finite, not negative, and 0 in the padding"
            )
        return padded[:rows]

    def linear(self, name: str) -> np.ndarray:
        """Matrix `name` as float32 [N, K]."""
        w_NK = self.stored(name)
        if self.matrices[name].type.integer:
            return w_NK * self.scale(name)[:, None]
        return to_float32(w_NK, self.matrices[name].type.stored)

    def vector(self, name: str) -> np.ndarray:
        """float32: a norm's weight, such as `model.norm.weight`, bias or table; FormatError unless finite."""
        if not np.isfinite(padded := self.array(name)).all():
            raise FormatError(f"{self.path}: {name} holds NaN or infinite values; the file is damaged")
        shape = {**self.architecture.optional, **self.architecture.tensor_shapes}[name]
        return padded[: math.prod(shape)].reshape(shape)

    def check(self) -> None:
        """Decode everything; FormatError for the first matrix or vector that is not sound."""
        for name, matrix in self.matrices.items():
            w_NK = self.stored(name)
            if not matrix.type.integer:
                continue
            self.scale(name)
            sum_N = self.array(f"{name}.weight_sum")
            if not np.array_equal(sum_N, panels.padded(w_NK.sum(axis=1, dtype=np.int32), PANEL_ROWS)):
                raise FormatError(f"{self.path}: {name}: the row sums are not those of its weights")
        for name in vector_tensors(self.architecture, self.tensors):
            self.vector(name)

    def matrix_bytes(self, name: str) -> int:
        """Bytes in the file of matrix `name`: values, masks, offsets, multipliers, scales and sums."""
        return sum(self.tensors[tensor].nbytes for tensor in self.matrices[name].tensors(name))

    def bytes_by_part(self) -> dict[str, int]:
        """The file's bytes: embedding, head (unless it is the embedding), linears, tokenizer, and the rest.

        The rest is the header, with the texts that the file carries, the weights of norms and biases, and an
        encoder's small tables.
        """
        head = self.architecture.head
        embedding = "embedding" if head is None or head in self.matrices else "embedding and head"
        parts = {embedding: self.matrix_bytes(self.architecture.embedding)}
        if head is not None and head in self.matrices:
            parts["head"] = self.matrix_bytes(head)
        parts["linears"] = sum(map(self.matrix_bytes, self.decoder))
        tokenizer = self.tensors.get(tokenizer_tensor(self.metadata["version"]))
        parts["tokenizer"] = tokenizer.nbytes if tokenizer else 0
        return parts | {"header, norms and biases": self.file_bytes - sum(parts.values())}

    @property
    def decoder(self) -> list[str]:
        """Names of the decoder's linears: every matrix but the embedding and the head."""
        others = (self.architecture.embedding, self.architecture.head)
        return [name for name in self.matrices if name not in others]

    def sparsity(self, names: Iterable[str]) -> float:
        """Fraction of zeros over all of the named matrices."""
        matrices = [self.matrices[name] for name in names]
        return 1 - sum(matrix.nonzeros for matrix in matrices) / sum(
            matrix.num_weights for matrix in matrices
        )

    def bits_per_weight(self, names: Iterable[str]) -> float:
        """Bits in the file per weight of the named matrices, all that belongs to them included."""
        names = list(names)
        return 8 * sum(map(self.matrix_bytes, names)) / sum(self.matrices[name].num_weights for name in names)

    def native_tensors(self) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
        """Name -> (dtype, shape, byte offset in `buffer`, byte length), for `_native.Model`."""
        return {name: (t.dtype, t.shape, t.offset, t.nbytes) for name, t in self.tensors.items()}

    def native_config(self) -> dict[str, Any]:
        """What the model is made of and the table of its matrices, as `_native.Model` wants them.

        UnsupportedError of an encoder.
        """
        self.refuse_encoder()
        return native_config(self.architecture, self.matrices)

    def native_encoder_config(self) -> dict[str, Any]:
        """The same of an encoder, as `_native.Encoder` wants it; UnsupportedError of a decoder."""
        self.refuse_decoder()
        return native_encoder_config(self.architecture, self.matrices)


def table_of_parts(parts: Mapping[str, int]) -> Table:
    """`Packed.bytes_by_part` for people."""
    total = sum(parts.values())
    rows = [(part, f"{size:,}", f"{size / total:.1%}") for part, size in parts.items()]
    return Table("", ("part", "bytes", "of the file"), rows)


def native_config(anatomy: Anatomy, matrices: Mapping[str, StoredMatrix]) -> dict[str, Any]:
    """What `_native.Model` wants to know of a decoder: its sizes, and what each tensor of the file is for."""
    assert anatomy.final_norm is not None
    heads = anatomy.attention
    rope = next((block.attention.rope for block in anatomy.blocks if block.attention.rope), Rope(1.0))
    return {
        "hidden_size": anatomy.hidden_size,
        "vocab_size": anatomy.vocab_size,
        "num_heads": heads.num_heads,
        "num_kv_heads": heads.num_kv_heads,
        "head_dim": heads.head_dim,
        "intermediate_size": anatomy.blocks[0].feed_forward.width,
        "norm_eps": anatomy.norm_eps,
        "inverse_frequencies": inverse_frequencies(rope, heads.head_dim),
        "rotary_scale": rotary_scale(rope),
        "embedding": anatomy.embedding,
        "final_norm": f"{anatomy.final_norm.name}.weight",
        "head": _head(anatomy, matrices),
        "blocks": [_native_block(anatomy.prefix(i), block) for i, block in enumerate(anatomy.blocks)],
        "linears": {name: asdict(matrix) for name, matrix in matrices.items()},
    }


def _head(anatomy: Anatomy, matrices: Mapping[str, StoredMatrix]) -> str:
    """The head of a decoder, where it is stored; else the embedding."""
    return anatomy.head if anatomy.head and anatomy.head in matrices else anatomy.embedding


def native_encoder_config(anatomy: Anatomy, matrices: Mapping[str, StoredMatrix]) -> dict[str, Any]:
    """What `_native.Encoder` wants to know of an encoder; norms are named without `.weight` and `.bias`.

    An empty name is a table or a norm that the model does not have.
    """
    assert anatomy.added is not None
    heads, added, first = anatomy.attention, anatomy.added, anatomy.blocks[0]
    ropes = list(dict.fromkeys(it.attention.rope for it in anatomy.blocks if it.attention.rope is not None))
    return {
        "hidden_size": anatomy.hidden_size,
        "vocab_size": anatomy.vocab_size,
        "num_heads": heads.num_heads,
        "head_dim": heads.head_dim,
        "intermediate_size": first.feed_forward.width,
        "num_positions": added.num_positions or anatomy.max_position_embeddings,
        "first_position": added.offset,
        "num_types": added.num_types,
        "norm_eps": anatomy.norm_eps,
        "norm_first": first.order == "pre",
        "norm_bias": added.norm.bias,
        "gated": first.feed_forward.kind == "geglu",
        "embedding": anatomy.embedding,
        "positions": f"{added.positions}.weight" if added.positions else "",
        "types": f"{added.types}.weight" if added.types else "",
        "norm": added.norm.name,
        "final_norm": anatomy.final_norm.name if anatomy.final_norm else "",
        "ropes": [
            {"inverse_frequencies": inverse_frequencies(it, heads.head_dim), "scale": rotary_scale(it)}
            for it in ropes
        ],
        "blocks": [
            _native_encoder_block(anatomy.prefix(i), block, ropes) for i, block in enumerate(anatomy.blocks)
        ],
        "linears": {name: asdict(matrix) for name, matrix in matrices.items()},
    }


def _native_encoder_block(prefix: str, block: Block, ropes: Sequence[Rope]) -> dict[str, Any]:
    """Which tensor is what in one block of an encoder, and how its tokens see one another."""
    norms = {place: f"{prefix}{norm.name}" for place, norm in block.norms.items()}
    return _affine(prefix, block) | {
        "attention_norm": norms.get("attention", ""),
        "feed_forward_norm": norms["feed_forward"],
        "rope": ropes.index(block.attention.rope) if block.attention.rope else -1,
        "window": block.attention.window or 0,
    }


def _affine(prefix: str, block: Block) -> dict[str, Any]:
    """The matrices of a block and their biases, by role."""
    return {
        "linears": {role: f"{prefix}{it.name}" for role, it in block.linears.items()},
        "biases": {role: f"{prefix}{it.name}.bias" for role, it in block.linears.items() if it.bias},
    }


def _native_block(prefix: str, block: Block) -> dict[str, Any]:
    """Which tensor is what in one block; an empty name is a norm that the block does not have."""
    norms = {place: f"{prefix}{norm.name}.weight" for place, norm in block.norms.items()}
    return _affine(prefix, block) | {
        "attention_norm": norms["attention"],
        "feed_forward_norm": norms["feed_forward"],
        "query_norm": norms.get("query", ""),
        "key_norm": norms.get("key", ""),
        "rope": block.attention.rope is not None,
        "window": block.attention.window or 0,
    }
