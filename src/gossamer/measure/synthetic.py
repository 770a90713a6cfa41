"""Models of real shapes with random weights: the cost of decoding hangs on shapes and zeros, not on training.

Random rows are made once and repeated, each time as other bytes of the file or of memory: no cache helps.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gossamer.architecture.anatomy import EMBEDDING, HEAD, Anatomy
from gossamer.architecture.families import read_anatomy
from gossamer.job.report import Event, Progress, quiet
from gossamer.machine import cache_directory
from gossamer.packed import blocks, panels, streams
from gossamer.packed.header import StoredMatrix, matrix_shapes, vector_sizes
from gossamer.packed.reader import native_config
from gossamer.packed.values import NUMBER_TYPES, PANEL_ROWS, Values
from gossamer.packed.writer import PackedWriter, Storage, smallest_storage

Shape = Literal["llama-2-7b", "llama-3.2-1b", "tinyllama-1.1b"]

BLOCK_ROWS = 256
CONTENT = 2  # grows when a recipe's file holds something else than before: files in the cache are made anew


def _config(layers: int, hidden: int, inner: int, heads: tuple[int, int], vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 4096,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
    }


CONFIGS: dict[Shape, dict[str, Any]] = {
    "llama-2-7b": _config(32, 4096, 11008, (32, 32), 32000),
    "llama-3.2-1b": _config(16, 2048, 8192, (32, 8), 128256) | {"tie_word_embeddings": True},
    "tinyllama-1.1b": _config(22, 2048, 5632, (32, 4), 32000),
}


@dataclass(frozen=True)
class Recipe:
    """Which synthetic model: a shape with `layers` decoder layers of `values`, `sparsity` of them zero.

    Its embedding and head are dense: float32, or bfloat16 for all other types; int8 the head of i8 and i4.
    """

    shape: Shape
    values: Values
    sparsity: float
    layers: int
    vocabulary: int
    together: int = field(default=1, kw_only=True)  # weights of a row that are zero or not as one: 4 of "1x4"
    storage: Storage = field(default="auto", kw_only=True)  # of the decoder's linears

    @classmethod
    def of(
        cls,
        shape: Shape,
        values: Values,
        sparsity: float,
        layers: int | None = None,
        vocabulary: int | None = None,
    ) -> "Recipe":
        """The shape's own layers and vocabulary unless others are given."""
        config = CONFIGS[shape]
        num_layers, vocab_size = config["num_hidden_layers"], config["vocab_size"]
        return cls(shape, values, sparsity, layers or num_layers, vocabulary or vocab_size)

    @property
    def config(self) -> dict[str, Any]:
        return CONFIGS[self.shape] | {"num_hidden_layers": self.layers, "vocab_size": self.vocabulary}

    @property
    def file_name(self) -> str:
        size = f"{self.layers}x-{self.vocabulary}"
        pattern = f"-1x{self.together}" * (self.together > 1) + f"-{self.storage}" * (self.storage != "auto")
        return f"{self.shape}-{size}-{self.values}-{self.sparsity:g}{pattern}-v{CONTENT}.goss"

    @property
    def integer(self) -> bool:
        return NUMBER_TYPES[self.values].integer

    def kind(self, name: str) -> tuple[Values, float]:
        """Type and sparsity of matrix `name`."""
        if name == EMBEDDING:
            return "f32" if self.values == "f32" else "bf16", 0.0
        if name == HEAD:
            return "i8" if self.integer else self.values, 0.0
        return self.values, self.sparsity


def random_weights(
    values: str, rows: int, columns: int, sparsity: float, rng: np.random.Generator, together: int = 1
) -> np.ndarray:
    """[rows, columns] as PackedWriter takes them: nonzero everywhere but for a random fraction `sparsity`.

    `together` neighbours of a row, which divide the columns, are zero or not as one.
    """
    shape = (rows, columns)
    if values == "i8":
        w_NK = rng.integers(1, 128, shape, np.int8)
    elif values == "i4":
        w_NK = rng.integers(-8, 7, shape, np.int8)
        w_NK += w_NK >= 0
    else:
        w_NK = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(columns * (1 - sparsity)))
        if values == "bf16":
            w_NK = (w_NK.view(np.uint32) >> 16).astype(np.uint16)
    zero = rng.random((rows, columns // together), np.float32) < sparsity
    w_NK[zero.repeat(together, axis=1)] = 0
    return w_NK


def random_multipliers(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [rows, groups of inputs] from 1 to 16, of int4 weights."""
    groups = -(-columns // panels.MULTIPLIER_INPUTS)
    return rng.integers(1, panels.MAX_MULTIPLIER + 1, (rows, groups), np.uint8)


def plausible_scales(rows: int, columns: int) -> np.ndarray:
    """float32 [rows] that keep outputs about as large as inputs."""
    return np.full(rows, 1 / (80 * np.sqrt(columns)), np.float32)


def plausible_vector(name: str, size: int) -> np.ndarray:
    """float32 [size] that changes nothing: ones for a norm's weight, zeros for a bias."""
    return np.zeros(size, np.float32) if name.endswith(".bias") else np.ones(size, np.float32)


def synthetic_file(recipe: Recipe, progress: Progress = quiet) -> Path:
    """The recipe's .goss file in the cache, written on first use."""
    path = cache_directory() / recipe.file_name
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    rng, anatomy = np.random.default_rng(0), read_anatomy(recipe.config)
    names = list(matrix_shapes(anatomy))
    if recipe.integer and HEAD not in names:
        names.append(HEAD)
    with PackedWriter(path, config=json.dumps(recipe.config)) as writer:
        for index, name in enumerate(names, start=1):
            progress(Event("write synthetic model", name, index, len(names)))
            _write(writer, anatomy, name, recipe, rng)
        for name, size in vector_sizes(anatomy).items():
            writer.vector(name, plausible_vector(name, size))
    return path


def _write(
    writer: PackedWriter, anatomy: Anatomy, name: str, recipe: Recipe, rng: np.random.Generator
) -> None:
    """One matrix; of a decoder's, all but the first layer's repeat that one in bytes of their own."""
    first = ".".join(["model.layers.0", *name.split(".")[3:]]) if ".layers." in name else name
    if first in writer.matrices:
        writer.repeat(name, first)
        return
    rows, columns = anatomy.tensor_shapes[f"{EMBEDDING if name == HEAD else name}.weight"]
    values, sparsity = recipe.kind(name)
    block = random_weights(values, min(rows, BLOCK_ROWS), columns, sparsity, rng, recipe.together)
    w_NK, scale_N = np.resize(block, (rows, columns)), plausible_scales(rows, columns)
    if values == "i8":
        writer.int8(name, w_NK, scale_N, "auto" if name == HEAD else recipe.storage)
    elif values == "i4":
        writer.int4(name, w_NK, random_multipliers(rows, columns, rng), scale_N)
    else:
        writer.floats(name, w_NK)


@dataclass(frozen=True, eq=False)
class Image:
    """A packed model in memory: the arguments of `_native.Model`, and the bytes of its decoder matrices."""

    buffer: np.ndarray
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]
    config: dict[str, Any]
    num_bytes: int


def synthetic_image(recipe: Recipe) -> Image:
    """The recipe in memory with float32 for embedding and head, its panels copies of 16 random ones."""
    rng, anatomy = np.random.default_rng(0), read_anatomy(recipe.config)
    pieces: dict[str, tuple[str, np.ndarray]] = {}
    table: dict[str, StoredMatrix] = {}
    for name, linear in anatomy.linears(0).items():
        matrix, arrays = _matrix(recipe, linear.rows, linear.columns, rng)
        for index in range(anatomy.num_layers):
            other = name.replace(".0.", f".{index}.", 1)
            table[other] = matrix
            pieces |= {f"{other}.{suffix}": array for suffix, array in arrays.items()}
    num_bytes = sum(array.nbytes for _, array in pieces.values())
    block = random_weights("f32", PANEL_ROWS, anatomy.hidden_size, 0.0, rng)
    embedding = np.resize(block, (anatomy.vocab_size, anatomy.hidden_size))
    table[EMBEDDING] = StoredMatrix("dense", "f32", *embedding.shape, nonzeros=embedding.size)
    pieces[f"{EMBEDDING}.weight"] = ("F32", panels.to_panels("f32", embedding))
    for name, size in vector_sizes(anatomy).items():
        pieces[name] = ("F32", plausible_vector(name, size))
    buffer, tensors = _lay_out(pieces)
    return Image(buffer, tensors, native_config(anatomy, table), num_bytes)


def _matrix(
    recipe: Recipe, rows: int, columns: int, rng: np.random.Generator
) -> tuple[StoredMatrix, dict[str, tuple[str, np.ndarray]]]:
    """A matrix of `rows` (a multiple of 256) and the tensors that hold it, by suffix."""
    values, (repeats, rest) = recipe.values, divmod(rows, BLOCK_ROWS)
    assert rest == 0, f"{rows} rows are no multiple of {BLOCK_ROWS}"
    block = random_weights(values, BLOCK_ROWS, columns, recipe.sparsity, rng, recipe.together)
    nonzeros, storage = panels.count_nonzero(block) * repeats, recipe.storage
    if storage == "auto":
        storage = smallest_storage(values, block)
    if storage == "dense":
        weight = np.concatenate([panels.to_panels(values, block)] * repeats)
        arrays = {"weight": (NUMBER_TYPES[values].stored, weight)}
    else:
        piece, lengths_P = blocks.panels_stored_as(storage, values, block)
        stream = np.concatenate([*[piece] * repeats, streams.slack(piece.size * repeats)])
        arrays = {
            "weight.stream": ("U8", stream),
            "weight.offsets": ("U64", streams.panel_offsets(np.tile(lengths_P, repeats))),
        }
    if NUMBER_TYPES[values].paired:
        multiplier_NG = random_multipliers(BLOCK_ROWS, columns, rng)
        multipliers = panels.to_multipliers(np.tile(multiplier_NG, (repeats, 1)))
        arrays["weight_multiplier"] = ("U8", multipliers)
        block = panels.multiply_groups(block, multiplier_NG)
    if recipe.integer:
        sum_N = np.tile(block.sum(axis=1, dtype=np.int32), repeats)
        arrays["weight_scale"] = ("F32", plausible_scales(rows, columns))
        arrays["weight_sum"] = ("I32", sum_N)
    return StoredMatrix(storage, values, rows, columns, nonzeros), arrays


def _lay_out(
    pieces: dict[str, tuple[str, np.ndarray]],
) -> tuple[np.ndarray, dict[str, tuple[str, tuple[int, ...], int, int]]]:
    """One buffer that begins at a multiple of 64 bytes with all pieces in it, and where each lies."""
    total = sum(array.nbytes for _, array in pieces.values())
    memory = np.empty(total + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    buffer, tensors, position = memory[begin : begin + total], {}, 0
    for name, (dtype, array) in pieces.items():
        assert array.nbytes % 64 == 0, f"{name} takes {array.nbytes} bytes, no multiple of 64"
        tensors[name] = (dtype, array.shape, position, array.nbytes)
        buffer[position : position + array.nbytes] = array.reshape(-1).view(np.uint8)
        position += array.nbytes
    return buffer, tensors
