"""Small .goss files written from known matrices."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.architecture.families import read_anatomy
from gossamer.packed.header import StoredMatrix
from gossamer.packed.writer import PackedWriter, Storage
from packed.matrices import random_matrix, random_multipliers

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 36,
    "intermediate_size": 137,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "num_hidden_layers": 2,
    "vocab_size": 101,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEARS = ("i8", "i4", "f32", "bf16")  # types of the decoder linears, in turns
TOKENIZER = b'{"model": {"type": "BPE"}}'


@dataclass(frozen=True)
class Synthetic:
    """A packed file and what went into it: weights as they were written, and as they are read (`stored`)."""

    path: Path
    values: dict[str, str] = field(default_factory=dict)
    written: dict[str, np.ndarray] = field(default_factory=dict)
    stored: dict[str, np.ndarray] = field(default_factory=dict)
    scales: dict[str, np.ndarray] = field(default_factory=dict)
    multipliers: dict[str, np.ndarray] = field(default_factory=dict)
    norms: dict[str, np.ndarray] = field(default_factory=dict)

    def make(self, name: str, values: str, shape: tuple[int, int], sparsity: float, number: int) -> None:
        """A random matrix under this name; int4 is stored as the int8 weights that it stands for."""
        self.values[name] = values
        self.written[name] = self.stored[name] = random_matrix(values, shape, sparsity, number)
        if values in ("i8", "i4"):
            self.scales[name] = np.random.default_rng(number).random(shape[0]).astype(np.float32)
        if values == "i4":
            multiplier_NG = self.multipliers[name] = random_multipliers(shape, number)
            factor_NK = np.repeat(multiplier_NG.astype(np.int32), 128, axis=1)[:, : shape[1]]
            self.stored[name] = (self.written[name] * factor_NK).astype(np.int8)

    def write(self, writer: PackedWriter, name: str, storage: Storage = "auto") -> StoredMatrix:
        w_NK = self.written[name]
        if self.values[name] == "i8":
            return writer.int8(name, w_NK, self.scales[name], storage)
        if self.values[name] == "i4":
            return writer.int4(name, w_NK, self.multipliers[name], self.scales[name], storage)
        return writer.floats(name, w_NK, storage)


def write_synthetic(path: Path, config: dict[str, Any] = CONFIG, seed: int = 0) -> Synthetic:
    """Linears of every type, nearly dense in the first layer, sparse in the second; a bfloat16 embedding."""
    rng, made = np.random.default_rng(seed), Synthetic(path)
    with PackedWriter(path, config=json.dumps(config), tokenizer=TOKENIZER, parent="ab" * 32) as writer:
        for index, (tensor, shape) in enumerate(read_anatomy(config).tensor_shapes.items()):
            name = tensor.removesuffix(".weight")
            if len(shape) == 1:
                made.norms[tensor] = rng.standard_normal(shape).astype(np.float32)
                writer.vector(tensor, made.norms[tensor])
                continue
            values = {"model.embed_tokens": "bf16", "lm_head": "f32"}.get(name)
            if values is None:
                values = LINEARS[sum(".layers." in other for other in made.values) % len(LINEARS)]
            sparsity = 0.7 if ".layers.1." in name else 0.02 if ".layers.0." in name else 0
            made.make(name, values, (shape[0], shape[1]), sparsity, seed + index)
            made.write(writer, name)
    return made


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    return write_synthetic(tmp_path_factory.mktemp("packed") / "synthetic.goss")


@pytest.fixture(scope="session")
def make_synthetic() -> Callable[..., Synthetic]:
    return write_synthetic


@pytest.fixture(scope="session")
def make_empty() -> type[Synthetic]:
    return Synthetic
