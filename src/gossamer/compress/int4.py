"""INT4 numbers: weights of 15 values, on a scale per row and group of 128 inputs, and GPTQ onto them.

    weights   w_nk ~ q_nk (m_ng s_n)      q in [-7, 7]      m a whole number from 1 to 16      g = k // 128

q m is a whole number in [-112, 112], so that a row runs as INT8 with the row scale s, activations as in
`int8`. GPTQ (see `gptq`) takes a group at a time. What it has left of a group when it comes to it is rounded
on several scales, from one that clamps nothing to half of that, and each row keeps the one whose error is
smallest after the group's later inputs have made up for the earlier ones: sum_j error_j^2 of `hessian`.

Group scales m s are written to the file, and whoever loads the model casts them to its type. So s has as few
bits as leave 4 for m: then all m s are numbers of that type.
"""

import torch
from torch import Tensor

from gossamer.compress.hessian import InverseFactor, fix_rows
from gossamer.compress.int8 import quantize_weights

GROUP_INPUTS = 128
LARGEST = 7
MAX_MULTIPLIER = 16
_CLIPPED = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64, 0.58, 0.5)  # of the scale that clamps nothing
_BITS = {torch.float32: 20, torch.float16: 7, torch.bfloat16: 4}  # of s: those of the type, less 4


def unit_scales(w_NK: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """s [N, 1], float32: the least by which no weight exceeds 7 x 16 s, rounded up so that `dtype` holds m s.

    Below 2^-18 float16 grows too coarse for that; a row of zeros has a scale as well.
    """
    least = 2.0**-18 if dtype == torch.float16 else 2.0**-100
    wanted_N1 = (w_NK.float().abs().amax(1, keepdim=True) / (LARGEST * MAX_MULTIPLIER)).clamp_min(least)
    mantissa_N1, exponent_N1 = torch.frexp(wanted_N1.double())
    steps = 2.0 ** _BITS[dtype]
    return torch.ldexp((mantissa_N1 * steps).ceil() / steps, exponent_N1).float()


def nearest(w_NK: Tensor) -> Tensor:
    """Weights rounded to nearest, one by one, on the least scales that clamp nothing, and back."""
    unit_N1, K = unit_scales(w_NK), w_NK.shape[1]
    w_NGB = torch.nn.functional.pad(w_NK, (0, -K % GROUP_INPUTS)).unflatten(1, (-1, GROUP_INPUTS))
    needed_NG1 = w_NGB.abs().amax(2, keepdim=True) / (LARGEST * unit_N1[:, None])
    scale_NG1 = needed_NG1.ceil().clamp(1, MAX_MULTIPLIER) * unit_N1[:, None]
    return (quantize_weights(w_NGB, scale_NG1, LARGEST) * scale_NG1).flatten(1)[:, :K]


def gptq_in_groups(w_NK: Tensor, scale_N1: Tensor, factor: InverseFactor) -> tuple[Tensor, Tensor]:
    """int8 q [N, K], zero wherever W is zero, and multipliers m [N, G], float32, for the units `scale_N1`."""
    w_KN, scale_N = w_NK.T.contiguous(), scale_N1[:, 0]
    kept_KN, multipliers, whole = w_KN != 0, [], []
    for start in range(0, len(w_KN), GROUP_INPUTS):
        group = slice(start, start + GROUP_INPUTS)
        multiplier_N, fixed_BN, error_BN = _round_group(
            w_KN[group], factor.u_KK[group, group], kept_KN[group], scale_N
        )
        w_KN[group.stop :].addmm_(factor.u_KK[group, group.stop :].T, error_BN, alpha=-1)
        multipliers.append(multiplier_N)
        whole.append((fixed_BN / (multiplier_N * scale_N)).round().to(torch.int8))
    return torch.cat(whole).T.contiguous(), torch.stack(multipliers, 1)


def _round_group(
    w_BN: Tensor, u_BB: Tensor, kept_BN: Tensor, scale_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The best multipliers [N] of a group, its weights rounded by them, and what is left to make up for."""
    needed_N = w_BN.masked_fill(~kept_BN, 0.0).abs().amax(0) / (LARGEST * scale_N)
    tried_CN = torch.stack([(needed_N * share).ceil().clamp(1, MAX_MULTIPLIER) for share in _CLIPPED])
    C, (B, N) = len(tried_CN), w_BN.shape
    fixed_BCN = w_BN[:, None].repeat(1, C, 1)
    marks_BM = kept_BN[:, None].expand(B, C, N).reshape(B, C * N)
    error_BCN = fix_rows(
        fixed_BCN.view(B, C * N), u_BB, marks_BM, (tried_CN * scale_N).view(-1), LARGEST
    ).view(B, C, N)
    best_N = error_BCN.square().sum(0).argmin(0)
    chosen_B1N = best_N.expand(B, 1, N)
    fixed_BN, error_BN = (all_BCN.gather(1, chosen_B1N)[:, 0] for all_BCN in (fixed_BCN, error_BCN))
    return tried_CN.gather(0, best_N[None])[0], fixed_BN, error_BN
