"""Train what pruning left of one layer, and take the hidden states through it anew."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.compress.reconstruct import Rows, Schedule, reconstruct
from gossamer.job.report import Event, Progress
from gossamer.layerwise.options import PruneOptions
from gossamer.layerwise.states import States
from gossamer.modules.decoder import Block, in_pieces
from gossamer.training.sparse_linear import densify, sparsify

SPARSE_FROM = 0.5  # the share of zeros from which products of the nonzero weights alone are faster everywhere


def reconstruct_block(
    block: Block,
    inputs: Sequence[Tensor],
    rows: States,
    held_out: States,
    job: PruneOptions,
    progress: Progress,
) -> list[float]:
    """Train what is left of a pruned layer, and take the states through it anew from their `inputs`.

    Returns the error on held-out rows as pruned, and after each epoch.
    """
    weights = {linear.name: block.linear(role).weight for role, linear in block.anatomy.linears.items()}
    zeros = {name: torch.count_nonzero(weight == 0) / weight.numel() for name, weight in weights.items()}
    sparse = [name for name, share in zeros.items() if share >= SPARSE_FROM and job.device == "cpu"]
    sparsify(block.layer, sparse)
    errors = reconstruct(
        block,
        dict(block.layer.named_parameters()),
        {f"{name}.weight": weights[name] != 0 for name in weights if name not in sparse},
        Rows(inputs[0], rows.parent_BTD),
        Rows(inputs[1], held_out.parent_BTD),
        Schedule(job.epochs, job.reconstruct_learning_rate, job.seed),
    )
    densify(block.layer)
    if errors[0] <= min(errors):
        failed = f"layer {block.index} stays as pruned: training it did not lower its error on held-out rows"
        progress(Event("prune", failed, lasting=True))
    for states, input_BTD in zip((rows, held_out), inputs, strict=True):
        retake(states, block, input_BTD)
    return errors


def retake(states: States, block: Block, inputs_BTD: Tensor) -> None:
    """Take ours through a layer anew, from what went into it; the parent's stay where they are."""
    for h_BTD, x_BTD in zip(in_pieces(states.ours_BTD), in_pieces(inputs_BTD), strict=True):
        h_BTD.copy_(block(x_BTD))
