"""Prune one layer, group by group; later groups see the earlier ones pruned."""

from collections.abc import Callable, Iterator, Mapping

from torch import nn

from gossamer.compress.hessian import dampened, inverse_factor
from gossamer.compress.sparsegpt import sparsegpt
from gossamer.compress.target import Evidence, target
from gossamer.decoder import Block
from gossamer.layerwise.options import PruneOptions
from gossamer.layerwise.states import States


def prune_block(
    block: Block, parent: Block, rows: States, held_out: States, job: PruneOptions
) -> Iterator[str]:
    """Prune a layer in place; yields the names of its linears. The states end as those after the layer."""
    walks = zip(rows.walk(block, parent), held_out.walk(block, parent), strict=True)
    for (group, evidence), (_, held_evidence) in walks:
        prune_group(group, evidence, held_evidence, job)
        yield from group


def prune_group(
    group: Mapping[str, nn.Linear],
    rows: Callable[[], Evidence],
    held_out: Callable[[], Evidence],
    job: PruneOptions,
) -> None:
    """Prune the linears that share an input, in place, by what calibration and held-out rows say of it."""
    if job.method == "magnitude":
        from gossamer.compress.magnitude import magnitude

        for linear in group.values():
            linear.weight.data = magnitude(linear.weight.data, job.sparsity)
        return
    seen, unseen = rows(), held_out()
    factor = inverse_factor(seen.h_KK, job.dampening_frac, name=", ".join(group))
    for linear in group.values():
        w_NK = linear.weight.data.masked_fill(factor.dead_K, 0.0)
        target_NK = target(w_NK, factor, seen, unseen)
        if job.method == "admm":
            from gossamer.compress.admm import admm

            H_KK = dampened(seen.h_KK, job.dampening_frac)
            linear.weight.data = admm(w_NK, H_KK, job.sparsity, target_NK=target_NK)
        else:
            linear.weight.data = sparsegpt(
                w_NK, factor, job.sparsity, block_size=job.block_size, target_NK=target_NK
            )
