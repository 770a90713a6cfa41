"""Smooth and round one layer, group by group; later groups see the earlier ones rounded."""

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.architecture.anatomy import Group
from gossamer.checkpoint.directory import Checkpoint
from gossamer.compress import fp8, int4, int8
from gossamer.compress.gptq import gptq
from gossamer.compress.hessian import InverseFactor, inverse_factor
from gossamer.compress.smooth import divide_norm, share_over_query_heads, smoothing_scales, value_rows
from gossamer.compress.straight_through import through
from gossamer.compress.target import Evidence, target, token_error
from gossamer.data.calibration import CalibrationOptions
from gossamer.job.options import option
from gossamer.layerwise.states import States
from gossamer.modules.decoder import TORCH_DTYPE, Block

SAMPLE_TOKENS, SEARCH_TOKENS = 4096, 512
STRENGTHS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True, kw_only=True)
class RoundingOptions(CalibrationOptions):
    """What `quantize` is told of the weights; `compress` passes it on."""

    scheme: Literal["W8A8", "W4A8", "FP8_DYNAMIC"] = option(
        "W8A8",
        help="INT8 weights per row, INT4 weights per 128 inputs (both with INT8 activations per token), or, "
        "for vLLM on GPUs, FP8 for both",
    )
    smoothing_strength: Literal["auto"] | float = option(
        "auto",
        help="how much of the activations' outliers moves into the weights, from 0 (no smoothing) to 1; "
        "auto: each group of linears what leaves its outputs the smallest error",
    )
    ignore: tuple[str, ...] = option(
        (), help="linears to leave as they are, such as '*.layers.0.mlp.down_proj'"
    )
    reconstruct_epochs: int = option(
        0,
        help="passes over the calibration rows in which each rounded layer is trained, through the rounding, "
        "towards what the unrounded model gives after it",
    )
    reconstruct_learning_rate: float = option(
        3e-2,
        help="highest learning rate of that training, in sevenths of the largest weight (the default is for "
        "W4A8; 8 bits want less)",
    )


@dataclass(frozen=True)
class Numbers:
    """What a scheme makes of activations, and of weights [N, K] that are rounded to nearest.

    `whole` rounds what has been divided by its scale, and is at most `largest`, to the scheme's numbers.
    """

    activations: Callable[[Tensor], Tensor]
    nearest: Callable[[Tensor], Tensor]
    whole: Callable[[Tensor], Tensor]
    largest: float


NUMBERS = {
    "W8A8": Numbers(int8.fake_quantize_tokens, int8.nearest, torch.round, 127),
    "W4A8": Numbers(int8.fake_quantize_tokens, int4.nearest, torch.round, int4.LARGEST),
    "FP8_DYNAMIC": Numbers(fp8.fake_quantize_tokens, fp8.nearest, fp8.to_e4m3, fp8.LARGEST),
}


@dataclass(frozen=True)
class Smoothed:
    """A group after smoothing: by what strength, and a sample [T, K] of its inputs in floating point."""

    strength: float
    sample_TK: Tensor


def smooth(
    block: Block,
    source: Checkpoint,
    inputs_BTD: Tensor,
    strength: Literal["auto"] | float,
    ignored: Collection[str],
    scheme: str = "W8A8",
) -> list[Smoothed]:
    """Fold smoothing factors into what produces each group's input, in place; the float output stays.

    `inputs_BTD` are inputs of the layer, by whose first rows factors and, for "auto", strengths are chosen.
    """
    sample_BTD = inputs_BTD[: max(1, SAMPLE_TOKENS // inputs_BTD.shape[1])]
    samples = [torch.cat([*inputs]).flatten(0, 1) for _, inputs in block.walk(sample_BTD.clone())]
    smoothed = []
    for group, linears, x_TK in zip(block.anatomy.groups, block.groups, samples, strict=True):
        rounded = [linear for name, linear in linears.items() if name not in ignored]
        chosen, scale_K = 0.0, x_TK.new_ones(x_TK.shape[1])
        if rounded and strength != 0 and group.fold != "none":
            factors = {s: factors_of(block, group, rounded, x_TK, s) for s in strengths(strength)}
            chosen = least_error(rounded, x_TK, factors, NUMBERS[scheme])
            scale_K = factors[chosen]
        if chosen:
            scale_K = fold(block, group, scale_K, source)
            for linear in linears.values():
                linear.weight.data *= scale_K
        smoothed.append(Smoothed(chosen, x_TK / scale_K))
    return smoothed


def strengths(strength: Literal["auto"] | float) -> tuple[float, ...]:
    """Those to choose from."""
    return STRENGTHS if strength == "auto" else (strength,)


def factors_of(
    block: Block, group: Group, linears: Collection[nn.Linear], x_TK: Tensor, strength: float
) -> Tensor:
    """Smoothing factors [K] of a group's inputs; 1 each for a strength of 0.

    Every token has a scale of its own, so an input counts by its share of its token's largest: the values of
    an attention sink, a thousand times those of other tokens, say nothing about them.
    """
    if strength == 0:
        return x_TK.new_ones(x_TK.shape[1])
    tiny = torch.finfo(x_TK.dtype).tiny
    x_amax_K = (x_TK / x_TK.abs().amax(1, keepdim=True).clamp_min(tiny)).abs().amax(0)
    w_amax_K = largest(linear.weight.data.abs().amax(0) for linear in linears)
    if group.fold == "value rows":
        x_amax_K, w_amax_K = (share_over_query_heads(m, *kv_heads(block)) for m in (x_amax_K, w_amax_K))
    return smoothing_scales(x_amax_K, w_amax_K, strength)


def least_error(
    linears: Collection[nn.Linear], x_TK: Tensor, factors: Mapping[float, Tensor], numbers: Numbers
) -> float:
    """The strength whose factors leave the outputs the least error, with weights rounded to nearest."""
    if len(factors) == 1:
        return next(iter(factors))
    x_TK = x_TK[:: -(-len(x_TK) // SEARCH_TOKENS)]
    weights = [linear.weight.data for linear in linears]
    outputs = [x_TK @ w_NK.T for w_NK in weights]
    errors = {}
    for strength, scale_K in factors.items():
        seen_TK = numbers.activations(x_TK / scale_K)
        changed = [seen_TK @ numbers.nearest(w_NK * scale_K).T for w_NK in weights]
        errors[strength] = sum(token_error(*pair).item() for pair in zip(changed, outputs, strict=True))
    return min(errors, key=lambda strength: errors[strength])


def fold(block: Block, group: Group, scale_K: Tensor, source: Checkpoint) -> Tensor:
    """Divide what produces a group's input by [K] factors; returns those that its stored type stands for."""
    producer = block.layer.get_submodule(group.producer)
    weight = producer.weight
    assert isinstance(weight, nn.Parameter)
    if group.fold == "norm":
        dtype = TORCH_DTYPE[source.dtype(f"{block.prefix}{group.producer}.weight")]
        weight.data, scale_K = divide_norm(weight.data, scale_K, dtype)
        if isinstance(bias := getattr(producer, "bias", None), nn.Parameter):
            bias.data /= scale_K
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


@dataclass(frozen=True)
class Rounded:
    """A linear as it is stored: the weights in the scheme's numbers, and their scales, [N, 1] or [N, G].

    `error`: mean over the sample's tokens of |rounded output - output|^2 / |output|^2, activations rounded
    as well.
    """

    name: str
    q_NK: Tensor
    scale_NG: Tensor
    error: float


def round_block(
    block: Block,
    smoothed: Collection[Smoothed],
    states: tuple[States, States],
    source: Checkpoint,
    job: RoundingOptions,
    ignored: Collection[str],
    dampening: dict[str, float],
) -> Iterator[Rounded]:
    """Round a smoothed layer in place, by calibration and held-out `states`, which end as those after it.

    The weights aim at what the layer gave before they were rounded, on the hidden states of the unrounded
    model (see `target`): so they make up for what rounding took from earlier layers and from their inputs.
    `dampening` receives what the Hessian of a linear took instead of the job's.
    """
    numbers = NUMBERS[job.scheme]
    parent = dataclasses.replace(block, layer=copy.deepcopy(block.layer))
    walks = zip(smoothed, *(each.walk(block, parent, numbers.activations) for each in states), strict=True)
    for before, (group, rows), (_, held_out) in walks:
        rounded = {name: linear for name, linear in group.items() if name not in ignored}
        if rounded:
            yield from round_group(rounded, rows(), held_out(), before.sample_TK, source, job, dampening)


def round_group(
    group: Mapping[str, nn.Linear],
    rows: Evidence,
    held_out: Evidence,
    sample_TK: Tensor,
    source: Checkpoint,
    job: RoundingOptions,
    dampening: dict[str, float],
) -> Iterator[Rounded]:
    """Round the linears that share an input, in place, and have them round their inputs from here on."""
    numbers = NUMBERS[job.scheme]
    factor = inverse_factor(rows.h_KK, job.dampening_frac, name=", ".join(group))
    if factor.dampening_frac != job.dampening_frac:
        dampening |= dict.fromkeys(group, factor.dampening_frac)
    seen_TK = numbers.activations(sample_TK)
    for name, linear in group.items():
        w_NK = linear.weight.detach()
        aim_NK = target(w_NK, factor, rows, held_out).masked_fill(w_NK == 0, 0.0)
        q_NK, scale_NG = rounded_weights(aim_NK, factor, TORCH_DTYPE[source.dtype(f"{name}.weight")], job)
        linear.weight.data = q_NK.float() * whole_scales(scale_NG, w_NK.shape[1], job.scheme)
        linear.register_forward_pre_hook(lambda _, inputs: through(numbers.activations)(inputs[0]))
        error = token_error(seen_TK @ linear.weight.data.T, sample_TK @ w_NK.T).item()
        yield Rounded(name, q_NK, scale_NG, error)


def whole_scales(scale_NG: Tensor, num_inputs: int, scheme: str) -> Tensor:
    """The scale [N, K] of each weight, from those of rows or of groups."""
    width = int4.GROUP_INPUTS if scheme == "W4A8" else num_inputs
    return scale_NG.repeat_interleave(width, 1)[:, :num_inputs]


def rounded_weights(
    w_NK: Tensor, factor: InverseFactor, dtype: torch.dtype, job: RoundingOptions
) -> tuple[Tensor, Tensor]:
    """Weights in the scheme's numbers, zeros where W has them, and the scales of rows or of groups."""
    if job.scheme == "W4A8":
        unit_N1 = int4.unit_scales(w_NK, dtype)
        q_NK, multiplier_NG = int4.gptq_in_groups(w_NK, unit_N1, factor)
        return q_NK, unit_N1 * multiplier_NG
    if job.scheme == "FP8_DYNAMIC":
        scale_N1 = fp8.row_scales(w_NK, dtype)
        return fp8.quantize_e4m3(w_NK, scale_N1), scale_N1
    scale_N1 = int8.row_scales(w_NK, dtype)
    return gptq(w_NK, scale_N1, factor, block_size=job.block_size), scale_N1
