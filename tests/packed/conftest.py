"""Small .goss files written from known matrices."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.architecture import Llama
from gossamer.packed import PackedWriter

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "num_hidden_layers": 2,
    "vocab_size": 101,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENIZER = b'{"model": {"type": "BPE"}}'


@dataclass(frozen=True)
class Synthetic:
    """A packed file and what went into it: `stored` raw matrices, `scales`, `norms`."""

    path: Path
    stored: dict[str, np.ndarray]
    scales: dict[str, np.ndarray]
    norms: dict[str, np.ndarray]


def random_int8(shape: tuple[int, int], sparsity: float, rng: np.random.Generator) -> np.ndarray:
    q_NK = rng.integers(-128, 128, shape).astype(np.int8)
    q_NK[rng.random(shape) < sparsity] = 0
    return q_NK


def write_synthetic(path: Path, config: dict[str, Any] = CONFIG, seed: int = 0) -> Synthetic:
    """Int8 linears of falling density, a bfloat16 embedding, a float32 head."""
    rng, written = np.random.default_rng(seed), Synthetic(path, {}, {}, {})
    with PackedWriter(path, config=json.dumps(config), tokenizer=TOKENIZER, parent="ab" * 32) as writer:
        for index, (tensor, shape) in enumerate(Llama.parse(config).tensor_shapes().items()):
            name = tensor.removesuffix(".weight")
            if len(shape) == 1:
                written.norms[tensor] = rng.standard_normal(shape).astype(np.float32)
                writer.norm(tensor, written.norms[tensor])
            elif ".layers." in name:
                written.stored[name] = random_int8((shape[0], shape[1]), index / 20, rng)
                written.scales[name] = rng.random(shape[0]).astype(np.float32)
                writer.int8(name, written.stored[name], written.scales[name])
            elif name == "lm_head":
                written.stored[name] = rng.standard_normal(shape).astype(np.float32)
                writer.dense(name, written.stored[name])
            else:
                bits = rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16
                written.stored[name] = bits.astype(np.uint16)
                writer.dense(name, written.stored[name])
    return written


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    return write_synthetic(tmp_path_factory.mktemp("packed") / "synthetic.goss")


@pytest.fixture(scope="session")
def make_synthetic() -> Callable[..., Synthetic]:
    return write_synthetic
