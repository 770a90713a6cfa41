"""Qwen2 and Qwen2.5: the standard block with biases of queries, keys and values."""

from gossamer.architecture import prenorm
from gossamer.architecture.anatomy import Anatomy
from gossamer.architecture.config import Config
from gossamer.architecture.rope import Rope
from gossamer.architecture.windows import blocks_by_window

SUMMARY = "Qwen2ForCausalLM"


def anatomy(config: Config) -> Anatomy:
    """Blocks are alike but for their windows."""
    config = config.with_defaults(num_key_value_heads=32, max_position_embeddings=32768)
    config.expect(hidden_act="silu")
    heads = prenorm.attention(config, Rope.read(config))
    return prenorm.model(config, "qwen2", blocks_by_window(config, heads, biases=("q", "k", "v")))
