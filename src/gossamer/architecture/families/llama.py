"""Llama 2 and 3.x: the standard block, with biases where the configuration says so."""

from gossamer.architecture import prenorm
from gossamer.architecture.anatomy import Anatomy
from gossamer.architecture.config import Config
from gossamer.architecture.rope import Rope

SUMMARY = "LlamaForCausalLM (Llama 2, 3.x)"


def anatomy(config: Config) -> Anatomy:
    """Every block alike."""
    config = config.with_defaults(bos_token_id=1, eos_token_id=2)
    config.expect(hidden_act="silu")
    block = prenorm.block(config, prenorm.attention(config, Rope.read(config)), prenorm.biases(config))
    return prenorm.model(config, "llama", [block] * config.num_layers())
