"""Wanda (Sun et al., arXiv 2306.11695): small weights on small inputs go, and the others stay as they are.

    saliency_nk = |w_nk| * |x_k|        |x_k|: Euclidean norm of input k over all tokens of calibration

Weights are compared within each output, so that each loses the same share.
"""

import torch
from torch import Tensor

from gossamer.compress.pattern import Pattern
from gossamer.compress.sparsegpt import zeros_per_block
from gossamer.errors import CalibrationError


def wanda(
    w_NK: Tensor, norm_K: Tensor, sparsity: float, *, pattern: Pattern | None = None, name: str = "linear"
) -> Tensor:
    """Return W [N, K] with round(sparsity N K) zeros, or as many as it came with where these are more.

    With a pattern that fixes the sparsity, `sparsity` is the pattern's; blocks are compared within the whole
    matrix. Raises CalibrationError naming the layer if a norm is not
    finite.
    """
    if not torch.isfinite(norm_K).all():
        raise CalibrationError(
            f"{name}: its inputs hold infinite or NaN values; the activations overflow here"
        )
    zeros_NK, saliency_NK = w_NK == 0, w_NK.abs() * norm_K
    if pattern:
        return w_NK.masked_fill(pattern.choose(saliency_NK.square(), zeros_NK, sparsity), 0.0)
    quotas_N1 = torch.tensor(zeros_per_block(zeros_NK, sparsity, 1))[:, None].to(w_NK.device)
    ranks_NK = saliency_NK.masked_fill(zeros_NK, -1.0).argsort(dim=1, stable=True).argsort(dim=1)
    return w_NK.masked_fill(ranks_NK < quotas_N1, 0.0)
