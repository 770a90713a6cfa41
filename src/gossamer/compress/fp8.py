"""FP8 numbers, E4M3: weights rounded to nearest on a scale per row, activations on a scale per token.

    s_n = max_k |w_nk| / 448      q = E4M3(w / s_n)        448 is the largest E4M3; ties to even

The activations' arithmetic is compressed-tensors' (0.20, dynamic TOKEN strategy): the same with a token's
values, in float32; a token of zeros has float32's epsilon, 2^-23, for a scale. Eight bits of a floating-point
number leave so little to make up for that weights are rounded one by one, as vLLM and llm-compressor do.
"""

import torch
from torch import Tensor

from gossamer.compress.int8 import nonzero, storable_scales

LARGEST = 448.0
E4M3 = torch.float8_e4m3fn


def row_scales(w_NK: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scales [N, 1] of the weights' output rows, float32, to values that `dtype` holds exactly."""
    return storable_scales(w_NK.float().abs().amax(1, keepdim=True) / LARGEST, dtype)


def quantize_e4m3(w: Tensor, scale: Tensor) -> Tensor:
    """The nearest E4M3 numbers of w / scale, clamped to the largest."""
    return (w.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3)


def to_e4m3(x: Tensor) -> Tensor:
    """The nearest E4M3 numbers, in the type of x."""
    return x.to(E4M3).to(x.dtype)


def nearest(w_NK: Tensor) -> Tensor:
    """Weights rounded to nearest on the scales of their rows, and back."""
    scale_N1 = row_scales(w_NK)
    return quantize_e4m3(w_NK, scale_N1).float() * scale_N1


def fake_quantize_tokens(x_TK: Tensor) -> Tensor:
    """Activations rounded to E4M3 on a scale per token and back, in their own type."""
    scale_T1 = nonzero(x_TK.float().abs().amax(-1, keepdim=True) / LARGEST)
    return (quantize_e4m3(x_TK, scale_T1).float() * scale_T1).to(x_TK.dtype)
