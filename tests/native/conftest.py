"""Matrices as the engine finds them in a mapped file, and small int8 models."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.architecture.families import read_anatomy
from gossamer.packed import blocks, panels, streams
from gossamer.packed.reader import Packed
from gossamer.packed.rounding import round_rows
from gossamer.packed.writer import PackedWriter

DTYPES = {"f32": "F32", "bf16": "BF16", "i8": "I8", "i4": "U8"}


def aligned(num_bytes: int) -> np.ndarray:
    memory = np.zeros(num_bytes + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + num_bytes]


@dataclass(frozen=True)
class Matrix:
    """One matrix `w` in a buffer of its own."""

    buffer: np.ndarray
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]
    matrices: dict[str, dict[str, Any]]

    @property
    def arguments(self) -> dict[str, Any]:
        return {"buffer": self.buffer, "tensors": self.tensors, "matrices": self.matrices, "name": "w"}

    def with_buffer(self, buffer: np.ndarray) -> "Matrix":
        copy = aligned(buffer.size)
        copy[:] = buffer
        return replace(self, buffer=copy)


def make_matrix(
    values: str,
    storage: str,
    w_NK: np.ndarray,
    scale_N: np.ndarray,
    multiplier_NG: np.ndarray | None = None,
) -> Matrix:
    """`w_NK` is float32, bfloat16 bit patterns (uint16), int8, or int8 from -8 to 7 for "i4".

    Scales are for i8 and i4; multipliers, uint8 1 to 16, one a row and group of 128 inputs, for i4.
    """
    rows, columns = w_NK.shape
    arrays: dict[str, tuple[str, np.ndarray]] = {}
    if storage != "dense":
        sparse = storage == "sparse"
        stream, offsets = streams.encode(values, w_NK) if sparse else blocks.encode(w_NK)
        arrays = {"w.weight.stream": ("U8", stream), "w.weight.offsets": ("U64", offsets)}
    else:
        arrays["w.weight"] = (DTYPES[values], panels.to_panels(values, w_NK))
    if values in ("i8", "i4"):
        if values == "i4":
            assert multiplier_NG is not None
            arrays["w.weight_multiplier"] = ("U8", panels.to_multipliers(multiplier_NG))
            w_NK = panels.multiply_groups(w_NK, multiplier_NG)
        pad = (0, -rows % 16)
        arrays["w.weight_scale"] = ("F32", np.pad(scale_N.astype(np.float32), pad))
        arrays["w.weight_sum"] = ("I32", np.pad(w_NK.sum(axis=1, dtype=np.int32), pad))
    tensors, position = {}, 0
    for name, (dtype, array) in arrays.items():
        tensors[name] = (dtype, array.shape, position, array.nbytes)
        position += array.nbytes
    buffer = aligned(position)
    for name, (_, array) in arrays.items():
        begin = tensors[name][2]
        buffer[begin : begin + array.nbytes] = array.reshape(-1).view(np.uint8)
    entry = {"storage": storage, "values": values, "rows": rows, "columns": columns}
    return Matrix(buffer, tensors, {"w": entry})


@pytest.fixture(scope="session")
def matrix() -> Callable[..., Matrix]:
    return make_matrix


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "num_hidden_layers": 3,
    "vocab_size": 331,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_int8(path: Path, sparsity: float) -> Packed:
    """A random W8A8 Llama: sparse or dense int8 linears and head, a float32 embedding."""
    rng = np.random.default_rng(5)
    with PackedWriter(path, config=json.dumps(CONFIG)) as writer:
        for tensor, shape in read_anatomy(CONFIG).tensor_shapes.items():
            name = tensor.removesuffix(".weight")
            if len(shape) == 1:
                writer.vector(tensor, 1 + 0.1 * rng.standard_normal(shape).astype(np.float32))
                continue
            w_NK = rng.standard_normal(shape).astype(np.float32) / np.float32(
                np.sqrt(shape[1] * (1 - sparsity))
            )
            w_NK[rng.random(shape) < sparsity] = 0
            if name == "model.embed_tokens":
                writer.floats(name, w_NK)
            else:
                writer.int8(name, *round_rows(w_NK))
    return Packed.open(path)


@pytest.fixture(scope="session", params=[0.7, 0.0], ids=["sparse", "dense"])
def int8_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return write_int8(tmp_path_factory.mktemp("int8") / "model.goss", request.param)
