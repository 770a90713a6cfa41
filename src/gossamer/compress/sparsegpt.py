"""SparseGPT (Frantar & Alistarh, arXiv 2301.00774): one-shot pruning with second-order compensation.

Inputs are taken in blocks of 128. In a block, the weights of least saliency are chosen among all of its
(rows x inputs), then the inputs are fixed one by one and the error is pushed into those to the right:

    saliency = w^2 / U_jj^2        H^-1 = U^T U (see hessian.py)

Zeros that the weights come with, and all weights of inputs that are always zero, stay zero and count.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gossamer.compress.hessian import InverseFactor, fix_rows

if TYPE_CHECKING:
    from gossamer.compress.pattern import Pattern


def sparsegpt(
    w_NK: Tensor,
    factor: InverseFactor,
    sparsity: float,
    *,
    block_size: int = 128,
    target_NK: Tensor | None = None,
    pattern: "Pattern | None" = None,
) -> Tensor:
    """Return weights near W [N, K] (or near `target_NK`) with W's zeros among theirs.

    They have round(sparsity N K) zeros, or as many as W and the dead inputs bring where these are more. With
    a pattern that fixes the sparsity, `sparsity` is the pattern's.
    """
    if pattern:
        block_size += -block_size % pattern.size  # whole groups
    zeros_KN = (w_NK.T == 0) | factor.dead_K[:, None]
    w_KN = (w_NK if target_NK is None else target_NK).T.contiguous().masked_fill(factor.dead_K[:, None], 0.0)
    for start, quota in enumerate(zeros_per_block(zeros_KN, sparsity, block_size)):
        block = slice(start * block_size, (start + 1) * block_size)
        u_BB = factor.u_KK[block, block]
        if pattern:
            error_BN = pattern.fix(w_KN[block], u_BB, zeros_KN[block], quota)
        else:
            saliency_BN = (w_KN[block] / u_BB.diagonal()[:, None]).square().masked_fill(zeros_KN[block], -1.0)
            error_BN = fix_rows(w_KN[block], u_BB, ~smallest(saliency_BN, quota))
        w_KN[block.stop :].addmm_(factor.u_KK[block, block.stop :].T, error_BN, alpha=-1)
    return w_KN.T.contiguous()


def zeros_per_block(zeros_KN: Tensor, sparsity: float, block_size: int) -> list[int]:
    """How many zeros each block of inputs gets: the same share, save where it comes with more already."""
    existing = [int(block_BN.sum()) for block_BN in zeros_KN.split(block_size)]
    sizes = [block_BN.numel() for block_BN in zeros_KN.split(block_size)]
    left, left_size = max(round(sparsity * zeros_KN.numel()), sum(existing)), sum(sizes)
    quotas = [0] * len(sizes)
    for block in sorted(range(len(sizes)), key=lambda b: existing[b] / sizes[b], reverse=True):
        quotas[block] = max(existing[block], round(left * sizes[block] / left_size))
        left, left_size = left - quotas[block], left_size - sizes[block]
    return quotas


def smallest(saliency: Tensor, count: int) -> Tensor:
    """Boolean mask of exactly `count` True: at all values below 0, and at the smallest of the others.

    `count` is at least the number of those below 0. Of equal values the first are taken.
    """
    flat = saliency.reshape(-1)
    chosen = flat < 0
    if missing := count - int(torch.count_nonzero(chosen)):
        largest = _in_order(flat[~chosen] if chosen.any() else flat, missing)
        chosen = flat < largest
        chosen[(flat == largest).nonzero()[: count - int(torch.count_nonzero(chosen))]] = True
    return chosen.view(saliency.shape)


def _in_order(values: Tensor, place: int) -> float:
    """The value at this place, from 1, if they were sorted: by selection, and NumPy's is the fastest here."""
    if values.device.type != "cpu":
        return values.kthvalue(place).values.item()
    return np.partition(values.numpy(), place - 1)[place - 1].item()
