"""The sweep of SparseGPT and GPTQ in torch: what the native one means, and what runs on other devices."""

import torch
from torch import Tensor

from gossamer.compress.int8 import quantize_weights


def plain_sweep(
    w_BN: Tensor, u_BB: Tensor, kept_BN: Tensor, scale_N: Tensor | None, largest: int = 127
) -> Tensor:
    """Fix row after row of a block in place and return what is left to make up for (see `fix_rows`)."""
    error_BN = torch.empty_like(w_BN)
    for j, row_N in enumerate(w_BN):
        rounded_N = row_N if scale_N is None else quantize_weights(row_N, scale_N, largest) * scale_N
        fixed_N = rounded_N.masked_fill(~kept_BN[j], 0.0)
        error_BN[j] = (row_N - fixed_N) / u_BB[j, j]
        w_BN[j + 1 :].addr_(u_BB[j, j + 1 :], error_BN[j], alpha=-1)
        w_BN[j] = fixed_N
    return error_BN
