"""The Llama family: which configurations are understood, and the shapes that follow from them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gossamer.errors import CheckpointError, UnsupportedError

SUPPORTED = "LlamaForCausalLM (Llama 2 and 3.x: SiLU, RMSNorm, no biases, rope default, linear or llama3)"
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
GROUPS = (LINEARS[0:3], LINEARS[3:4], LINEARS[4:6], LINEARS[6:7])


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base and, for `linear` and `llama3`, how its frequencies are stretched."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Llama:
    """Shape of one Llama: D hidden_size, A num_heads, G num_kv_heads, E head_dim, V vocab_size."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def parse(cls, config: Mapping[str, Any], source: str = "config.json") -> "Llama":
        """Read a Hugging Face `config.json`; raises UnsupportedError for any other architecture."""
        _refuse_unknown(config, source)
        num_heads = _positive(config, "num_attention_heads", source)
        hidden_size = _positive(config, "hidden_size", source)
        num_kv_heads = _positive(config, "num_key_value_heads", source, num_heads)
        if num_heads % num_kv_heads:
            raise CheckpointError(
                f"{source}: {num_heads} query heads do not divide by {num_kv_heads} key heads"
            )
        eos = config.get("eos_token_id")
        llama = cls(
            num_layers=_positive(config, "num_hidden_layers", source),
            hidden_size=hidden_size,
            intermediate_size=_positive(config, "intermediate_size", source),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_positive(config, "head_dim", source, hidden_size // num_heads),
            vocab_size=_positive(config, "vocab_size", source),
            rms_norm_eps=_number(config, "rms_norm_eps", source, 1e-6),
            rope=_rope(config, source),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=_positive(config, "max_position_embeddings", source, 2048),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        )
        if llama.head_dim % 2:
            raise UnsupportedError(
                f"{source}: head_dim {llama.head_dim} is odd; rotary embeddings need pairs"
            )
        return llama

    def linear_shapes(self, layer: int) -> dict[str, tuple[int, int]]:
        """Name -> (N, K) of the layer's seven linears, in the order q k v o gate up down."""
        D, F = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = ((q, D), (kv, D), (kv, D), (D, q), (F, D), (F, D), (D, F))
        return {f"model.layers.{layer}.{name}": shape for name, shape in zip(LINEARS, shapes, strict=True)}

    def linear_names(self) -> list[str]:
        """Every decoder linear of the model, layer by layer (only these are ever pruned)."""
        return [name for layer in range(self.num_layers) for name in self.linear_shapes(layer)]

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of an unquantized checkpoint and its shape."""
        D, V = self.hidden_size, self.vocab_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
        for layer in range(self.num_layers):
            shapes |= {f"{name}.weight": shape for name, shape in self.linear_shapes(layer).items()}
            shapes[f"model.layers.{layer}.input_layernorm.weight"] = (D,)
            shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (D,)
        shapes["model.norm.weight"] = (D,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (V, D)
        return shapes

    def inverse_frequencies(self) -> np.ndarray:
        """float32 [E/2]: the angle each pair turns by per position (as transformers computes it)."""
        rope, exponents = self.rope, np.arange(0, self.head_dim, 2, dtype=np.float32) / self.head_dim
        inverse = (1.0 / np.float32(rope.theta) ** exponents.astype(np.float32)).astype(np.float32)
        if rope.kind == "linear":
            return inverse / np.float32(rope.factor)
        return _llama3(inverse, rope) if rope.kind == "llama3" else inverse


def _llama3(inverse: np.ndarray, rope: Rope) -> np.ndarray:
    """Llama 3.1's stretch: long wavelengths divided by `factor`, short ones kept, a ramp between."""
    wavelength = 2 * math.pi / inverse
    low = rope.original_max_position_embeddings / rope.low_freq_factor
    high = rope.original_max_position_embeddings / rope.high_freq_factor
    ramp = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - ramp) * inverse / rope.factor + ramp * inverse
    return np.where(
        wavelength > low, inverse / rope.factor, np.where(wavelength < high, inverse, blended)
    ).astype(np.float32)


def _refuse_unknown(config: Mapping[str, Any], source: str) -> None:
    found = config.get("architectures") or [config.get("model_type", "no architecture")]
    if found != ["LlamaForCausalLM"] and not (found == ["llama"]):
        raise UnsupportedError(
            f"{source}: found architecture {', '.join(map(str, found))}; supported: {SUPPORTED}"
        )
    for key, expected in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("partial_rotary_factor", 1.0),
    ):
        if (value := config.get(key, expected)) != expected:
            raise UnsupportedError(f"{source}: found {key} = {value!r}; supported: {expected!r}")


def _positive(config: Mapping[str, Any], key: str, source: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"{source}: {key} is {value!r}; expected a positive whole number")
    return value


def _number(config: Mapping[str, Any], key: str, source: str, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise CheckpointError(f"{source}: {key} is {value!r}; expected a number")
    return float(value)


def _rope(config: Mapping[str, Any], source: str) -> Rope:
    """transformers 5 writes `rope_parameters`; older files `rope_theta` and `rope_scaling`."""
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = _number(settings, "rope_theta", source, _number(config, "rope_theta", source, 10000.0))
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind not in ("linear", "llama3"):
        raise UnsupportedError(f"{source}: found rope_type {kind!r}; supported: default, linear, llama3")
    needed = ("factor",) if kind == "linear" else _LLAMA3_KEYS
    if missing := [key for key in needed if key not in settings]:
        raise CheckpointError(f"{source}: rope_type {kind} lacks {', '.join(missing)}")
    return Rope(theta, kind, **{key: settings[key] for key in needed})


_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
