"""Which share of each linear's weights becomes zero: fixed by a pattern, or measured on the parent.

The measuring is a pass over at most `ROWS_TOKENS` tokens of the calibration rows, one layer in memory at a
time, before anything is pruned. For `auto` each linear of a layer is pruned at several shares of zeros. How
its error grows with them is told by the Hessian; how much it matters, by the layer's output with this one
linear pruned (`token_error`: no attention sink can dominate it).
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor, nn

from gossamer.checkpoint.directory import Checkpoint
from gossamer.compress.budget import (
    MIDDLE,
    Curve,
    exactly,
    least_error,
    outlier_ratio,
    owl,
    shares_to_measure,
)
from gossamer.compress.hessian import inverse_factor, moments
from gossamer.compress.magnitude import magnitude
from gossamer.compress.pattern import check_fits, parse_pattern
from gossamer.compress.sparsegpt import sparsegpt
from gossamer.compress.target import token_error
from gossamer.compress.wanda import wanda
from gossamer.errors import CalibrationError, ConfigError
from gossamer.job.report import Event, Progress, Table
from gossamer.layerwise.options import PruneOptions
from gossamer.layerwise.scores import input_norms
from gossamer.modules.decoder import Block, blocks, embed, in_pieces

ROWS_TOKENS = 4096


def check_budget(source: Checkpoint, job: PruneOptions) -> None:
    """Raise ConfigError where options contradict one another, UnsupportedError where a width does."""
    if not job.owl_m > 0 or not 0 <= job.owl_lambda < 1:
        raise ConfigError(
            f"--owl-m is {job.owl_m:g} and --owl-lambda {job.owl_lambda:g}; expected an M above 0 and a "
            "lambda of at least 0 and below 1"
        )
    if not (pattern := parse_pattern(job.pattern)):
        return
    fixed = pattern.sparsity
    if fixed is not None and job.sparsity_profile != "uniform":
        raise ConfigError(
            f"--sparsity-profile {job.sparsity_profile} gives linears different shares of zeros, and "
            f"--pattern {job.pattern} fixes them all at {fixed:g}; leave out one of the two"
        )
    if fixed is not None and abs(job.sparsity - fixed) > 5e-7:
        raise ConfigError(
            f"--pattern {job.pattern} fixes the sparsity at {fixed:g}, and --sparsity is "
            f"{job.sparsity:g}; give --sparsity {fixed:g}, or another pattern"
        )
    check_fits(pattern, job.pattern, source.linears, source.architecture.tensor_shapes)


def measured_shares(
    source: Checkpoint, ids_BT: Tensor, job: PruneOptions, progress: Progress
) -> dict[str, float]:
    """The sparsity of each linear, by the profile; together they have the total that is asked for."""
    hidden_BTD = embed(source, ids_BT[: max(1, ROWS_TOKENS // ids_BT.shape[1])]).to(job.device)
    curves: dict[str, Curve] = {}
    ratios: dict[str, float] = {}
    for block in blocks(source, device=job.device):
        if job.sparsity_profile == "auto":
            curves |= _curves(block, hidden_BTD, job)
        else:
            ratios |= dict.fromkeys(_linears(block), _outlier_ratio(block, hidden_BTD, job.owl_m))
        progress(Event("budget", f"layer {block.index}", block.index + 1, source.architecture.num_layers))
    if curves:
        return least_error(curves, job.sparsity)
    sizes = {name: math.prod(source.entries[f"{name}.weight"].shape) for name in ratios}
    zeros = {name: int(source.zeros(f"{name}.weight").sum()) for name in ratios}
    return exactly(owl(ratios, job.sparsity, job.owl_lambda), sizes, zeros, job.sparsity)


def _linears(block: Block) -> dict[str, nn.Linear]:
    return {name: linear for group in block.groups for name, linear in group.items()}


def _outlier_ratio(block: Block, hidden_BTD: Tensor, threshold: float) -> float:
    """Of a layer, through which the hidden states are taken."""
    weights = []
    for group, inputs in block.walk(hidden_BTD):
        norm_K = input_norms(inputs)
        weights += [(linear.weight.data, norm_K) for linear in group.values()]
    return outlier_ratio(weights, threshold)


def _per_token(pieces: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of the same input, each token divided by the norm of its hidden state."""
    for x_BTK, h_BTD in pieces:
        scaled_BTK = x_BTK / h_BTD.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        yield scaled_BTK, scaled_BTK


def _curves(block: Block, hidden_BTD: Tensor, job: PruneOptions) -> dict[str, Curve]:
    """The errors of each linear of a layer, through which the hidden states are taken."""
    before_BTD = hidden_BTD.clone()
    curves: dict[str, Curve] = {}
    pruned: dict[str, Tensor] = {}
    walk = zip(block.anatomy.groups, block.walk(hidden_BTD), strict=True)
    for anatomy, (group, inputs) in walk:
        pieces = zip(inputs, in_pieces(hidden_BTD), strict=True)
        seen = _per_token(pieces) if anatomy.adds_to_hidden else ((x_BTK, x_BTK) for x_BTK, _ in pieces)
        H_KK, _ = moments(seen)
        prunes = _pruner(job, H_KK, ", ".join(group))
        for name, linear in group.items():
            curves[name], pruned[name] = _curve(linear.weight.data, H_KK, prunes, job.sparsity)
    for name, linear in _linears(block).items():
        w_NK, linear.weight.data = linear.weight.data, pruned[name]
        pairs = zip(in_pieces(before_BTD), in_pieces(hidden_BTD), strict=True)
        errors = [token_error(block(x_BTD), y_BTD).item() for x_BTD, y_BTD in pairs]
        linear.weight.data = w_NK
        if not math.isfinite(error := sum(errors) / len(errors)):
            raise CalibrationError(
                f"{name}: the layer's outputs are infinite or NaN; activations overflow here"
            )
        curves[name] = curves[name].scaled_to(error, at=MIDDLE)
    return curves


def _pruner(job: PruneOptions, H_KK: Tensor, name: str) -> Callable[[Tensor, float], Tensor]:
    """How weights are pruned to a sparsity: by the job's method, and by SparseGPT in place of ADMM."""
    if job.method == "magnitude":
        return magnitude
    if job.method == "wanda":
        return lambda w_NK, share: wanda(w_NK, H_KK.diagonal().sqrt(), share, name=name)
    factor = inverse_factor(H_KK, job.dampening_frac, name=name)
    return lambda w_NK, share: sparsegpt(w_NK, factor, share, block_size=job.block_size)


def _curve(
    w_NK: Tensor, H_KK: Tensor, prune: Callable[[Tensor, float], Tensor], total: float
) -> tuple[Curve, Tensor]:
    """The errors in the outputs, and the weights pruned to the share of zeros in the middle."""
    zeros = int((w_NK == 0).sum())
    shares = shares_to_measure(zeros / w_NK.numel(), total)
    pruned = [prune(w_NK, share) for share in shares]
    errors = [(((v_NK - w_NK) @ H_KK) * (v_NK - w_NK)).sum().item() for v_NK in pruned]
    return Curve(w_NK.numel(), zeros, shares, errors), pruned[MIDDLE]


def budget_table(shares: Mapping[str, float]) -> Table:
    """The sparsity of each linear, a layer a line."""
    layers: dict[str, dict[str, str]] = {}
    for name, share in shares.items():
        found = re.search(r"\.(\d+)\.", name)
        cells = layers.setdefault(found[1] if found else "", {})
        cells[name.rpartition(".")[2].removesuffix("_proj")] = f"{share:.1%}"
    roles = list(dict.fromkeys(role for cells in layers.values() for role in cells))
    rows = [(layer, *(cells.get(role, "") for role in roles)) for layer, cells in layers.items()]
    return Table("zeros of each linear", ("layer", *roles), rows)
