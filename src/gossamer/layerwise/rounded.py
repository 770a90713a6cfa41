"""How a rounded layer is stored: integers or FP8 with their scales, and a configuration that says so."""

from collections.abc import Collection
from typing import Any

import torch

from gossamer.checkpoint.directory import Checkpoint, Derived
from gossamer.checkpoint.fused import stored_names
from gossamer.checkpoint.schemes import GROUP_INPUTS, SCHEMES, Scheme, group_size
from gossamer.layerwise.rounding import Rounded
from gossamer.modules.decoder import Block, write_tensor


def shared_group(source: Checkpoint, scheme: str, ignored: Collection[str]) -> int:
    """How many inputs share a scale in the directory, where the scheme has scales for groups."""
    if not SCHEMES[scheme].grouped:
        return GROUP_INPUTS
    shapes = source.architecture.tensor_shapes
    return group_size({n: shapes[f"{n}.weight"][1] for n in source.linears if n not in ignored}, "--ignore")


def quantization_config(source: Checkpoint, scheme: str, ignored: Collection[str]) -> dict[str, Any]:
    """What the configuration will say of the linears, but for those `ignored`.

    ConfigError where they are a part of a stored matrix, UnsupportedError where no group fits.
    """
    stored = stored_names(source.architecture, ignored)
    return SCHEMES[scheme].config(stored, shared_group(source, scheme, ignored))


def write_rounded(output: Derived, rounded: Rounded, scheme: Scheme, group_size: int) -> None:
    """Store a linear's weights and scales; groups that are smaller than the engine's repeat its scales."""
    q_NK, scale_NG = rounded.q_NK, rounded.scale_NG
    if scheme.grouped:
        scale_NG = scale_NG.repeat_interleave(GROUP_INPUTS // group_size, 1)[:, : q_NK.shape[1] // group_size]
    stored_NK = q_NK if scheme.dtype == "I8" else q_NK.view(torch.uint8)
    output.write(f"{rounded.name}.weight", stored_NK.cpu().numpy(), scheme.dtype)
    output.write(f"{rounded.name}.weight_scale", scale_NG.cpu().contiguous().numpy(), "F32")


def write_unquantized(target: Derived, block: Block, ignored: Collection[str]) -> None:
    """Store what stays floating point: the norms and the ignored linears, smoothed."""
    rounded = {f"{name}.weight" for group in block.groups for name in group if name not in ignored}
    for name, parameter in block.layer.named_parameters():
        name = f"{block.prefix}{name}"
        if name not in rounded:
            write_tensor(target, name, parameter)
