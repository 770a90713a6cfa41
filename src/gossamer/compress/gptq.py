"""GPTQ (Frantar et al., arXiv 2210.17323) under a mask: rounding with second-order compensation.

The sweep is SparseGPT's (see hessian.py) with another projection: each input's weights are rounded to
their row's INT8 grid, zeros to zero, and the error is pushed to the inputs on the right. Rounding a kept
weight may give zero; a zero always stays one.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from gossamer.compress.hessian import InverseFactor, fix_rows, moments


def hessian(inputs: Iterable[Tensor]) -> Tensor:
    """H = 2/n X X^T, float32 [K, K], over the n tokens in batches [..., K] of a linear's input."""
    H_KK, _ = moments((x, x) for x in inputs)
    return H_KK


def gptq(w_NK: Tensor, scale_N1: Tensor, factor: InverseFactor, *, block_size: int = 128) -> Tensor:
    """INT8 weights [N, K] on the grid of `scale_N1`, zero wherever W is zero."""
    w_KN, scale_N = w_NK.T.contiguous(), scale_N1[:, 0]
    kept_KN = w_KN != 0
    for start in range(0, len(w_KN), block_size):
        block = slice(start, start + block_size)
        error_BN = fix_rows(w_KN[block], factor.u_KK[block, block], kept_KN[block], scale_N)
        w_KN[block.stop :].addmm_(factor.u_KK[block, block.stop :].T, error_BN, alpha=-1)
    return (w_KN.T / scale_N1).round().to(torch.int8)


def reconstruction_error(w_NK: Tensor, changed_NK: Tensor, H_KK: Tensor) -> float:
    """Squared error of the layer's outputs over the squared outputs, both averaged over the tokens of H."""
    delta_NK = changed_NK - w_NK
    signal = ((w_NK @ H_KK) * w_NK).sum()
    return (((delta_NK @ H_KK) * delta_NK).sum() / signal.clamp_min(torch.finfo(signal.dtype).tiny)).item()
