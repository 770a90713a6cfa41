"""Methods that choose weights by a score of their own and move no other: magnitude, and Wanda's."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from gossamer.compress.magnitude import magnitude
from gossamer.compress.pattern import parse_pattern
from gossamer.compress.wanda import wanda
from gossamer.layerwise.finite import finite
from gossamer.layerwise.options import PruneOptions
from gossamer.layerwise.states import States
from gossamer.modules.decoder import Block


def prune_by_scores(
    block: Block,
    parent: Block,
    rows: States,
    held_out: States,
    job: PruneOptions,
    shares: Mapping[str, float],
) -> Iterator[str]:
    """As `prune_block`. The parent does not matter here: its states are only taken through the layer."""
    pattern = parse_pattern(job.pattern)
    for group, inputs in block.walk(rows.ours_BTD):
        norm_K = input_norms(finite(inputs, group)) if job.method == "wanda" else torch.empty(0)
        for name, linear in group.items():
            w_NK, share = linear.weight.data, shares.get(name, job.sparsity)
            if job.method == "wanda":
                linear.weight.data = wanda(w_NK, norm_K, share, pattern=pattern, name=name)
            else:
                linear.weight.data = magnitude(w_NK, share, pattern=pattern)
            yield name
    for layer, hidden_BTD in (
        (block, held_out.ours_BTD), (parent, rows.parent_BTD), (parent, held_out.parent_BTD)
    ):  # fmt: skip
        for _ in layer.follow(hidden_BTD):
            pass


def input_norms(inputs: Iterable[Tensor]) -> Tensor:
    """|x_k| [K] over all tokens, from pieces of x [rows, T, K]."""
    return torch.stack([x_BTK.double().square().sum((0, 1)) for x_BTK in inputs]).sum(0).sqrt().float()
