"""Mistral: the standard block; tokens see a window of the last positions, or all (since version 0.2)."""

from dataclasses import replace

from gossamer.architecture import prenorm
from gossamer.architecture.anatomy import Anatomy
from gossamer.architecture.config import Config
from gossamer.architecture.rope import Rope
from gossamer.architecture.windows import window_of_all

SUMMARY = "MistralForCausalLM (no biases)"


def anatomy(config: Config) -> Anatomy:
    """Every block alike."""
    config = config.with_defaults(
        num_key_value_heads=8,
        max_position_embeddings=131072,
        sliding_window=4096,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.expect(hidden_act="silu", layer_types=None)
    heads = replace(prenorm.attention(config, Rope.read(config)), window=window_of_all(config))
    block = prenorm.block(config, heads)
    return prenorm.model(config, "mistral", [block] * config.num_layers())
