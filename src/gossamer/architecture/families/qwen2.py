"""Qwen2 and Qwen2.5: the standard block with biases of queries, keys and values."""

from dataclasses import replace

from gossamer.architecture import prenorm
from gossamer.architecture.anatomy import Anatomy
from gossamer.architecture.config import Config
from gossamer.architecture.rope import Rope
from gossamer.architecture.windows import layer_windows

SUMMARY = "Qwen2ForCausalLM"


def anatomy(config: Config) -> Anatomy:
    """Blocks are alike but for their windows."""
    config = config.with_defaults(num_key_value_heads=32, max_position_embeddings=32768)
    config.expect(hidden_act="silu")
    heads, windows = prenorm.attention(config, Rope.read(config)), layer_windows(config)
    blocks = {
        window: prenorm.block(config, replace(heads, window=window), biases=("q", "k", "v"))
        for window in set(windows)
    }
    return prenorm.model(config, "qwen2", [blocks[window] for window in windows])
