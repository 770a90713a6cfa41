"""Qwen3: the standard block with an RMSNorm over each query and key head, whose width is set apart."""

from gossamer.architecture import prenorm
from gossamer.architecture.anatomy import Anatomy, Norm
from gossamer.architecture.config import Config
from gossamer.architecture.rope import Rope
from gossamer.architecture.windows import blocks_by_window

SUMMARY = "Qwen3ForCausalLM (no biases)"


def anatomy(config: Config) -> Anatomy:
    """Blocks are alike but for their windows."""
    config = config.with_defaults(head_dim=128, num_key_value_heads=32, max_position_embeddings=32768)
    config.expect(hidden_act="silu", attention_bias=False)
    heads = prenorm.attention(config, Rope.read(config))
    query, key = (Norm(f"self_attn.{name}_norm", heads.head_dim) for name in ("q", "k"))
    return prenorm.model(config, "qwen3", blocks_by_window(config, heads, norms={"query": query, "key": key}))
