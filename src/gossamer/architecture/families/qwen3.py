"""Qwen3: the standard block with an RMSNorm over each query and key head, whose width is set apart."""

from dataclasses import replace

from gossamer.architecture import prenorm
from gossamer.architecture.anatomy import Anatomy, Norm
from gossamer.architecture.config import Config
from gossamer.architecture.rope import Rope
from gossamer.architecture.windows import layer_windows

SUMMARY = "Qwen3ForCausalLM (dense, no biases)"


def anatomy(config: Config) -> Anatomy:
    """Blocks are alike but for their windows."""
    config = config.with_defaults(head_dim=128, num_key_value_heads=32, max_position_embeddings=32768)
    config.expect(hidden_act="silu", attention_bias=False)
    heads, windows = prenorm.attention(config, Rope.read(config)), layer_windows(config)
    query, key = (Norm(f"self_attn.{name}_norm", heads.head_dim) for name in ("q", "k"))
    blocks = {
        window: prenorm.block(config, replace(heads, window=window), norms={"query": query, "key": key})
        for window in set(windows)
    }
    return prenorm.model(config, "qwen3", [blocks[window] for window in windows])
