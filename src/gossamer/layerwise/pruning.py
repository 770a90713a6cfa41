"""Prune one layer, group by group; later groups see the earlier ones pruned."""

from collections.abc import Callable, Iterator, Mapping

from torch import nn

from gossamer.compress.hessian import dampened, inverse_factor
from gossamer.compress.sparsegpt import sparsegpt
from gossamer.compress.target import Evidence, target
from gossamer.layerwise.options import PruneOptions
from gossamer.layerwise.states import States
from gossamer.modules.decoder import Block


def prune_block(
    block: Block,
    parent: Block,
    rows: States,
    held_out: States,
    job: PruneOptions,
    shares: Mapping[str, float],
    dampening: dict[str, float],
) -> Iterator[str]:
    """Prune a layer in place; yields the names of its linears. The states end as those after the layer.

    `shares`: the sparsity of each linear by its name, or of none, and then it is the job's; `dampening`
    receives what the Hessian of a linear took instead of the job's.
    """
    if job.method in ("wanda", "magnitude"):
        from gossamer.layerwise.scores import prune_by_scores

        yield from prune_by_scores(block, parent, rows, held_out, job, shares)
        return
    walks = zip(rows.walk(block, parent), held_out.walk(block, parent), strict=True)
    for (group, evidence), (_, held_evidence) in walks:
        prune_group(group, evidence, held_evidence, job, shares, dampening)
        yield from group


def prune_group(
    group: Mapping[str, nn.Linear],
    rows: Callable[[], Evidence],
    held_out: Callable[[], Evidence],
    job: PruneOptions,
    shares: Mapping[str, float],
    dampening: dict[str, float],
) -> None:
    """Prune the linears that share an input, in place, by what calibration and held-out rows say of it.

    `shares`, `dampening`: as `prune_block` has them.
    """
    seen, unseen, pattern = rows(), held_out(), None
    if job.pattern != "unstructured":
        from gossamer.compress.pattern import parse_pattern

        pattern = parse_pattern(job.pattern)
    factor = inverse_factor(seen.h_KK, job.dampening_frac, name=", ".join(group))
    if factor.dampening_frac != job.dampening_frac:
        dampening |= dict.fromkeys(group, factor.dampening_frac)
    for name, linear in group.items():
        w_NK = linear.weight.data.masked_fill(factor.dead_K, 0.0)
        target_NK, share = target(w_NK, factor, seen, unseen), shares.get(name, job.sparsity)
        if job.method == "admm":
            from gossamer.compress.admm import admm

            H_KK = dampened(seen.h_KK, factor.dampening_frac)
            linear.weight.data = admm(w_NK, H_KK, share, target_NK=target_NK, pattern=pattern)
        else:
            linear.weight.data = sparsegpt(
                w_NK, factor, share, block_size=job.block_size, target_NK=target_NK, pattern=pattern
            )
