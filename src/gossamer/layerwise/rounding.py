"""Smooth and round one layer, group by group; later groups see the earlier ones rounded."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.architecture.anatomy import Group
from gossamer.checkpoint.directory import Checkpoint, Derived
from gossamer.checkpoint.schemes import SCHEMES
from gossamer.compress.gptq import gptq, reconstruction_error
from gossamer.compress.hessian import inverse_factor
from gossamer.compress.int8 import fake_quantize_tokens, row_scales
from gossamer.compress.smooth import divide_norm, share_over_query_heads, smoothing_scales, value_rows
from gossamer.data.calibration import CalibrationOptions
from gossamer.decoder import TORCH_DTYPE, Block
from gossamer.job.options import option


@dataclass(frozen=True, kw_only=True)
class RoundingOptions(CalibrationOptions):
    """What `quantize` is told of the weights; `compress` passes it on."""

    scheme: Literal["W8A8"] = option("W8A8", help="INT8 weights per row, INT8 activations per token")
    smoothing_strength: float = option(
        0.8, help="how much of the activations' outliers moves into the weights"
    )
    ignore: tuple[str, ...] = option(
        (), help="linears to leave as they are, such as '*.layers.0.mlp.down_proj'"
    )


def smooth(
    block: Block, source: Checkpoint, hidden_BTD: Tensor, strength: float, ignored: Collection[str]
) -> None:
    """Fold smoothing factors into what produces each group's input, in place; the float output stays."""
    amax = [largest(x.abs().amax((0, 1)) for x in inputs) for _, inputs in block.walk(hidden_BTD.clone())]
    for group, linears, x_amax_K in zip(block.anatomy.groups, block.groups, amax, strict=True):
        read = [linear.weight.data.abs().amax(0) for name, linear in linears.items() if name not in ignored]
        if not read:
            continue
        w_amax_K = largest(read)
        if group.fold == "value rows":
            x_amax_K, w_amax_K = (share_over_query_heads(m, *kv_heads(block)) for m in (x_amax_K, w_amax_K))
        scale_K = fold(block, group, smoothing_scales(x_amax_K, w_amax_K, strength), source)
        for linear in linears.values():
            linear.weight.data *= scale_K


def fold(block: Block, group: Group, scale_K: Tensor, source: Checkpoint) -> Tensor:
    """Divide what produces a group's input by [K] factors; returns those that its stored type stands for."""
    producer = block.layer.get_submodule(group.producer)
    weight = producer.weight
    assert isinstance(weight, nn.Parameter)
    if group.fold == "norm":
        dtype = TORCH_DTYPE[source.dtype(f"{block.prefix}{group.producer}.weight")]
        weight.data, scale_K = divide_norm(weight.data, scale_K, dtype)
        return scale_K
    scale_N = value_rows(scale_K, *kv_heads(block)) if group.fold == "value rows" else scale_K
    weight.data /= scale_N[:, None]
    if isinstance(bias := producer.bias, nn.Parameter):
        bias.data /= scale_N
    return scale_K


def kv_heads(block: Block) -> tuple[int, int]:
    """How many key/value heads, and their width."""
    return block.anatomy.attention.num_kv_heads, block.anatomy.attention.head_dim


def largest(amax: Iterable[Tensor]) -> Tensor:
    """Elementwise maximum of vectors [K]."""
    return torch.stack(list(amax)).amax(0)


def quantize_group(
    target: Derived,
    group: Mapping[str, nn.Linear],
    H_KK: Tensor,
    job: RoundingOptions,
    dampening: dict[str, float],
) -> list[float]:
    """Round the linears that share an input, in place and to disk; returns the relative error of each.

    `dampening` receives what the Hessian of a linear took instead of the job's.
    """
    errors, factor = [], inverse_factor(H_KK, job.dampening_frac, name=", ".join(group))
    if factor.dampening_frac != job.dampening_frac:
        dampening |= dict.fromkeys(group, factor.dampening_frac)
    for name, linear in group.items():
        w_NK = linear.weight.detach()
        scale_N1 = row_scales(w_NK, TORCH_DTYPE[target.parent.dtype(f"{name}.weight")])
        q_NK = gptq(w_NK, scale_N1, factor, block_size=job.block_size)
        target.write(f"{name}.weight", q_NK.numpy(), SCHEMES[job.scheme].dtype)
        target.write(f"{name}.weight_scale", scale_N1.numpy(), "F32")
        linear.weight.data = q_NK * scale_N1
        linear.register_forward_pre_hook(lambda _, inputs: fake_quantize_tokens(inputs[0]))
        errors.append(reconstruction_error(w_NK, linear.weight.data, H_KK))
    return errors
