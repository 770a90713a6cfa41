"""Qwen2 and Qwen2.5: the standard block with biases of queries, keys and values."""

from gossamer.architecture import prenorm
from gossamer.architecture.anatomy import Anatomy
from gossamer.architecture.config import Config
from gossamer.architecture.rope import Rope

SUMMARY = "Qwen2ForCausalLM (no sliding window)"


def anatomy(config: Config) -> Anatomy:
    """Every block alike."""
    config = config.with_defaults(num_key_value_heads=32, max_position_embeddings=32768)
    config.expect(hidden_act="silu", use_sliding_window=False)
    config.expect(layer_types=["full_attention"] * config.num_layers())
    heads = prenorm.attention(config, Rope.read(config))
    block = prenorm.block(config, heads, biases=("q", "k", "v"))
    return prenorm.model(config, "qwen2", [block] * config.num_layers())
