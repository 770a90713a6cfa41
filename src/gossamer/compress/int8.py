"""INT8 numbers: symmetric weights with a scale per output row, symmetric activations with a scale per token.

    weights      s_n = max_k |w_nk| / 127        q = round(w / s_n) in [-127, 127]         (stored)
    activations  s_t = max_k |x_tk| / 127.5      q = round(clamp(x / s_t, -128, 127))      (at run time)
    linear       y_tn = float(sum_k q_tk q_nk) * (s_t * s_n), the sum in INT32

The activations' arithmetic is compressed-tensors' (0.20, `calculate_qparams` and `_quantize_dequantize`,
dynamic TOKEN strategy): float32; half the range is (127 + 128) / 2 = 127.5, so a token's largest positive
value clamps to 127 and its largest negative one can reach -128; `round` is to nearest, ties to even; a token
whose scale comes out as 0 (all inputs zero) gets float32's epsilon, 2^-23. So does a weight row of zeros.
The divisor of the weights is ours to choose (the file stores the scale): 127 clamps nothing.
"""

import torch
from torch import Tensor


def token_scales(x_TK: Tensor) -> Tensor:
    """Scales [..., T, 1] of dynamic per-token activations, float32."""
    return nonzero(x_TK.float().abs().amax(-1, keepdim=True) / 127.5)


def quantize_tokens(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Activations as INT8 [..., T, K] and their scales [..., T, 1]."""
    scale_T1 = token_scales(x_TK)
    return (x_TK.float() / scale_T1).clamp(-128, 127).round().to(torch.int8), scale_T1


def fake_quantize_tokens(x_TK: Tensor) -> Tensor:
    """Activations rounded to INT8 and back, in their own type."""
    q_TK, scale_T1 = quantize_tokens(x_TK)
    return (q_TK * scale_T1).to(x_TK.dtype)


def fake_quantize_twice(x_TK: Tensor) -> Tensor:
    """Activations as the engine's head reads them: rounded to INT8, and so is what that took from them."""
    first_TK = fake_quantize_tokens(x_TK)
    return first_TK + fake_quantize_tokens(x_TK - first_TK)


def row_scales(w_NK: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scales [N, 1] of the weights' output rows, float32, to values that `dtype` holds exactly."""
    return storable_scales(w_NK.float().abs().amax(1, keepdim=True) / 127, dtype)


def storable_scales(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest scales that `dtype` holds exactly, none of them zero, float32.

    Whoever loads the model casts the scales to the model's type; so it changes nothing. Below 2^-18 float16
    grows too coarse for a scale; smoothing makes rows that small.
    """
    least = 2.0**-18 if dtype == torch.float16 else torch.finfo(dtype).tiny
    return nonzero(scale).clamp_min(least).to(dtype).float()


def quantize_weights(w: Tensor, scale: Tensor, largest: int = 127) -> Tensor:
    """Round weights to nearest on their scale: whole numbers in [-largest, largest], still floating point."""
    return (w / scale).round().clamp(-largest, largest)


def nearest(w_NK: Tensor) -> Tensor:
    """Weights rounded to nearest on the scales of their rows, and back."""
    scale_N1 = row_scales(w_NK)
    return quantize_weights(w_NK, scale_N1) * scale_N1


def nonzero(scale: Tensor) -> Tensor:
    """The scales, float32's epsilon in the place of zeros."""
    return scale.masked_fill(scale == 0, torch.finfo(torch.float32).eps)
