"""Which layers attend to a window of the last positions, as configurations say it."""

from dataclasses import replace
from typing import Any

from gossamer.architecture import prenorm
from gossamer.architecture.anatomy import Attention, Block
from gossamer.architecture.config import Config
from gossamer.errors import CheckpointError, UnsupportedError

FULL, SLIDING = "full_attention", "sliding_attention"


def window_of_all(config: Config) -> int | None:
    """How many positions a token of any layer sees, where these are fewer than a context has; None: all."""
    if config.get("sliding_window") is None:
        return None
    found = config.size("sliding_window")
    return found if found < config.size("max_position_embeddings") else None


def blocks_by_window(config: Config, heads: Attention, **how: Any) -> list[Block]:
    """A block for each layer, alike but for their windows; `how` is what `prenorm.block` is told besides."""
    windows = layer_windows(config)
    made = {found: prenorm.block(config, replace(heads, window=found), **how) for found in set(windows)}
    return [made[found] for found in windows]


def layer_windows(config: Config) -> list[int | None]:
    """How many positions a token of each layer sees, itself included; None: all before it.

    No layer has a window unless `use_sliding_window` is set. `layer_types` names those that have it; where
    there is no such list, all layers from number `max_window_layers` on have it. An absent field means what
    Qwen's classes in transformers mean by it.
    """
    config = config.with_defaults(sliding_window=4096, max_window_layers=28)
    is_used = config.flag("use_sliding_window") and config.get("sliding_window") is not None
    window, num_layers = config.size("sliding_window") if is_used else None, config.num_layers()
    types = config.get("layer_types")
    if types is None and window is not None:
        first = 0 if config.get("max_window_layers") == 0 else config.size("max_window_layers")
        return [window if layer >= first else None for layer in range(num_layers)]
    types = [FULL] * num_layers if types is None else named_types(config)
    if window is None and SLIDING in types:
        raise CheckpointError(
            f"{config.source}: found {SLIDING} in layer_types without a window; expected use_sliding_window "
            "= true and a sliding_window"
        )
    return [window if found == SLIDING else None for found in types]


def named_types(config: Config) -> list[str]:
    """`layer_types`, one for each layer."""
    types, num_layers = config.get("layer_types"), config.num_layers()
    if not isinstance(types, list) or any(found not in (FULL, SLIDING) for found in types):
        raise UnsupportedError(
            f"{config.source}: found layer_types = {types!a:.200}; supported: a list of {FULL} and {SLIDING}"
        )
    if len(types) != num_layers:
        raise CheckpointError(f"{config.source}: {len(types)} layer_types of {num_layers} layers")
    return types
