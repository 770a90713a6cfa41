"""Llama 2 and 3.x: the standard block, no biases."""

from gossamer.architecture import prenorm
from gossamer.architecture.anatomy import Anatomy
from gossamer.architecture.config import Config
from gossamer.architecture.rope import Rope

SUMMARY = "LlamaForCausalLM (Llama 2 and 3.x: SiLU, RMSNorm, no biases, rope default, linear or llama3)"


def anatomy(config: Config) -> Anatomy:
    """Every block alike."""
    config.expect(hidden_act="silu", attention_bias=False, mlp_bias=False, partial_rotary_factor=1.0)
    block = prenorm.block(config, prenorm.attention(config, Rope.read(config)))
    return prenorm.model(config, "llama", [block] * config.num_layers())
