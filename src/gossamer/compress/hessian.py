"""The layer-wise quadratic model that pruning and rounding minimize.

A linear y = W x is replaced by W' so that the mean of ||W x - W' x||^2 over calibration tokens stays small:

    H = 2/n X X^T                 [K, K], n tokens, one column of X each
    error(W') = tr((W - W') H (W - W')^T) / 2

Optimal Brain Surgeon (Hassibi & Stork 1993): fixing one input's weight w_j to a value q costs
(w_j - q)^2 / (2 [H^-1]_jj), and the other weights make up for it by moving along column j of H^-1.
SparseGPT (arXiv 2301.00774) and GPTQ (arXiv 2210.17323) fix inputs from left to right, the same for all
rows; what remains of H^-1 after each is a row of its upper Cholesky factor U, H^-1 = U^T U:

    error_j = (w_j - q) / U_jj        w_j.. <- w_j.. - error_j U_j,j..        cost = error_j^2 / 2
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer import _native
from gossamer.errors import CalibrationError

SLAB = 128
LADDER, LEAST_DAMPENING = (10, 100, 1000), 1e-3  # where a factorization fails


def moments(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """H = 2/n X X^T [K, K] and P = 2/n Y X^T [M, K], float32, from batches of X [..., K] and Y [..., M].

    Where Y is X itself, P is left at zero: H says the same.
    """
    num_tokens, H_KK, P_MK = 0, torch.zeros(0, 0), torch.zeros(0, 0)
    for x, y in pairs:
        x_TK, y_TM = x.reshape(-1, x.shape[-1]).float(), y.reshape(-1, y.shape[-1]).float()
        if not num_tokens:
            H_KK = x_TK.new_zeros(x_TK.shape[1], x_TK.shape[1])
            P_MK = x_TK.new_zeros(y_TM.shape[1], x_TK.shape[1])
        for start in range(0, len(H_KK), SLAB):  # the lower triangle, in slabs: H is symmetric
            slab = slice(start, start + SLAB)
            H_KK[start:, slab].addmm_(x_TK[:, start:].T, x_TK[:, slab])
        if y is not x:
            P_MK.addmm_(y_TM.T, x_TK)
        num_tokens += len(x_TK)
    H_KK = H_KK.tril() + H_KK.tril(-1).T
    return H_KK * (2.0 / num_tokens), P_MK * (2.0 / num_tokens)


@dataclass(frozen=True)
class InverseFactor:
    """Upper Cholesky factor of the dampened H^-1, and the inputs that never were anything but zero.

    `dampening_frac`: the one with which it succeeded.
    """

    u_KK: Tensor
    dead_K: Tensor
    dampening_frac: float


def dampened(H_KK: Tensor, dampening_frac: float) -> Tensor:
    """H + dampening_frac mean(diag H) I, and 1 more on the diagonal of inputs that are always zero."""
    diagonal_K = H_KK.diagonal()
    return H_KK + torch.diag((diagonal_K == 0).to(H_KK.dtype) + dampening_frac * diagonal_K.mean())


def inverse_factor(H_KK: Tensor, dampening_frac: float = 0.01, *, name: str = "linear") -> InverseFactor:
    """Factor (H + dampening_frac mean(diag H) I)^-1 = U^T U, dead inputs with 1 on the diagonal.

    With J the reversal, J H J = L L^T gives U = J L^-1 J: one Cholesky and one triangular inverse, in
    float64, and the inverse itself is never formed. Where that matrix is not positive definite, beyond the
    rounding errors of H's data type, ten times the dampening is tried, and so on (`LADDER`). Raises
    CalibrationError naming the layer if H is not finite or no dampening helps.
    """
    if not torch.isfinite(H_KK).all():
        raise CalibrationError(
            f"{name}: the Hessian holds infinite or NaN values; the activations overflow here"
        )
    tried = [dampening_frac, *(max(dampening_frac, LEAST_DAMPENING) * times for times in LADDER)]
    for fraction in tried:
        l_KK = _cholesky(dampened(H_KK.double(), fraction).flip(0, 1), torch.finfo(H_KK.dtype).eps)
        if l_KK is not None:
            eye_KK = torch.eye(len(l_KK), dtype=l_KK.dtype, device=l_KK.device)
            inverse_KK = torch.linalg.solve_triangular(l_KK, eye_KK, upper=False)
            u_KK = inverse_KK.flip(0, 1).to(H_KK.dtype).contiguous()
            return InverseFactor(u_KK, H_KK.diagonal() == 0, fraction)
    raise CalibrationError(
        f"{name}: factorization of the Hessian failed with a dampening_frac of "
        f"{', '.join(f'{fraction:g}' for fraction in tried)}: the calibration tokens do not span this "
        "layer's inputs; raise --num-calibration-samples, or give other text"
    )


def dampened_more(name: str, fraction: float) -> str:
    """What the user is told of a linear whose Hessian could not be factored as wanted."""
    return f"{name}: took a dampening_frac of {fraction:g}; its Hessian could not be factored with less"


def _cholesky(h_KK: Tensor, rounding: float) -> Tensor | None:
    """Its lower factor; None if a pivot is not positive, or within the rounding of its diagonal element."""
    l_KK, info = torch.linalg.cholesky_ex(h_KK)
    lost = l_KK.diagonal().square() <= rounding * h_KK.diagonal()
    return None if info.item() or lost.any() else l_KK


def fix_rows(
    w_BN: Tensor, u_BB: Tensor, kept_BN: Tensor, scale_N: Tensor | None = None, largest: int = 127
) -> Tensor:
    """Fix row after row of a block in place, those below making up for it: at 0 unless kept, else as it is.

    With `scale_N` the kept ones are fixed at whole numbers, up to `largest`, of their output's scale.
    `w_BN` holds B inputs of N outputs (a block of W^T), `u_BB` the block's part of U.
    Returns error_BN; the inputs after the block still have to move by -U[block, after]^T error_BN.
    """
    if w_BN.device.type != "cpu" or w_BN.dtype != torch.float32:
        from gossamer.compress.plain_sweep import plain_sweep

        return plain_sweep(w_BN, u_BB, kept_BN, scale_N, largest)
    error_BN = torch.empty_like(w_BN)
    arrays = (w_BN.numpy(), u_BB.numpy(), kept_BN.numpy(), None if scale_N is None else scale_N.numpy())
    _native.sweep(*arrays, error_BN.numpy(), largest=largest, num_threads=torch.get_num_threads())
    return error_BN
