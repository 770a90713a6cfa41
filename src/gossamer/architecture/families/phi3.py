"""Phi-3: the standard block, stored with queries, keys and values as one matrix, gate and up as another."""

from dataclasses import replace

from gossamer.architecture import prenorm
from gossamer.architecture.anatomy import Anatomy
from gossamer.architecture.config import Config
from gossamer.architecture.rope import Rope
from gossamer.architecture.windows import window_of_all

SUMMARY = "Phi3ForCausalLM (rope default)"


def anatomy(config: Config) -> Anatomy:
    """Every block alike."""
    config = config.with_defaults(
        max_position_embeddings=4096, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=32000
    )
    config.expect(hidden_act="silu", attention_bias=False)
    for key in ("rope_scaling", "rope_parameters"):
        if rope := config.section(key):
            rope.expect(rope_type="default", type="default")
    heads = replace(prenorm.attention(config, Rope.read(config)), window=window_of_all(config))
    fused = {"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")}
    block = replace(prenorm.block(config, heads), fused=fused)
    return prenorm.model(config, "phi3", [block] * config.num_layers())
