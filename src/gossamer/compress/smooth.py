"""SmoothQuant (Xiao et al., arXiv 2211.10438): move activation outliers into the weights, exactly.

    s_k = max_t |x_tk|^strength / max_n |w_nk|^(1 - strength)        y = (W diag(s)) (diag(1/s) x)

diag(1/s) is folded into what produces x, so the float model computes the same function:
q,k,v and gate,up <- the RMSNorm's weight; o <- the rows of v_proj (attention is linear in the values; the
query heads of one key/value head share s); down <- the rows of up_proj (SwiGLU is linear in `up`). The row
scale of a linear producer is absorbed by its INT8 scale, so the last two cost nothing. Zeros stay zeros.
"""

import torch
from torch import Tensor


def smoothing_scales(x_amax_K: Tensor, w_amax_K: Tensor, strength: float) -> Tensor:
    """s [K]; 1 for an input that is never active or that no weight reads."""
    scale_K = x_amax_K.pow(strength) / w_amax_K.pow(1 - strength)
    usable_K = (x_amax_K > 0) & (w_amax_K > 0) & torch.isfinite(scale_K) & (scale_K > 0)
    return torch.where(usable_K, scale_K, 1.0)


def divide_norm(norm_K: Tensor, scale_K: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The RMSNorm's weight over s, as `dtype` can store it, and the s that this stored weight stands for."""
    divided_K = (norm_K / scale_K).to(dtype).to(norm_K.dtype)
    usable_K = torch.isfinite(divided_K) & (divided_K != 0)
    return torch.where(usable_K, divided_K, norm_K), torch.where(usable_K, norm_K / divided_K, 1.0)


def share_over_query_heads(amax_K: Tensor, num_kv_heads: int, head_dim: int) -> Tensor:
    """For o_proj's inputs [A E]: the largest value among the query heads of each key/value head."""
    amax_GAE = amax_K.view(num_kv_heads, -1, head_dim)
    return amax_GAE.amax(1, keepdim=True).expand_as(amax_GAE).reshape(-1)


def value_rows(scale_K: Tensor, num_kv_heads: int, head_dim: int) -> Tensor:
    """The scales of v_proj's rows [G E] from those of o_proj's inputs [A E]."""
    return scale_K.view(num_kv_heads, -1, head_dim)[:, 0].reshape(-1)
