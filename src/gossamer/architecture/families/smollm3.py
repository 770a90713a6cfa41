"""SmolLM3: the standard block, in some layers without rope."""

from gossamer.architecture import prenorm
from gossamer.architecture.anatomy import Anatomy
from gossamer.architecture.config import Config
from gossamer.architecture.rope import Rope
from gossamer.errors import CheckpointError

SUMMARY = "SmolLM3ForCausalLM (no windows)"


def anatomy(config: Config) -> Anatomy:
    """Blocks of two kinds: with rope and without."""
    config = config.with_defaults(
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rope_theta=2e6,
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=128001,
    )
    config.expect(hidden_act="silu", use_sliding_window=False)
    config.expect(layer_types=["full_attention"] * config.num_layers())
    biases, rope = prenorm.biases(config), Rope.read(config)
    without, plain = (
        prenorm.block(config, prenorm.attention(config, found), biases) for found in (None, rope)
    )
    return prenorm.model(config, "smollm3", [plain if has else without for has in layers_with_rope(config)])


def layers_with_rope(config: Config) -> list[bool]:
    """Of each layer, whether it has rope: `no_rope_layers` lists 0 for none, despite its name.

    Where there is no such list, every `no_rope_layer_interval`-th layer has none.
    """
    num_layers, found = config.num_layers(), config.get("no_rope_layers")
    if found is None:
        interval = config.size("no_rope_layer_interval", 4)
        return [index % interval != 0 for index in range(1, num_layers + 1)]
    if not isinstance(found, list) or len(found) < num_layers or any(item not in (0, 1) for item in found):
        raise CheckpointError(
            f"{config.source}: no_rope_layers is {found!r}; expected a 0 or 1 for each of {num_layers} layers"
        )
    return [bool(item) for item in found[:num_layers]]
