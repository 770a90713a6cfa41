"""Which implementation of attention a run trains with, and our own for short rows in bfloat16 on a CPU.

transformers' eager form writes the scores [B, H, T, T] out five times, three of them in float32, and repeats
keys and values for every query head. Here they are written twice, in the type of the products, and the query
heads that share a head of keys and values are multiplied with it at once. PyTorch's fused form, which longer
rows take, needs no scores in memory, but its backward pass took twice as long at 512 tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

SHORT_ROWS = "gossamer_short_rows"
MOST_TOKENS = 512


def choose_attention(row_length: int, device: str, precision: str, *models: PreTrainedModel | None) -> None:
    """Set the fastest implementation in every model."""
    short = device == "cpu" and precision == "bf16" and row_length <= MOST_TOKENS
    for model in models:
        if model is not None:
            model.set_attn_implementation(SHORT_ROWS if short else "sdpa")


def short_rows_attention(
    module: nn.Module,
    q_BHTd: Tensor,
    k_BSTd: Tensor,
    v_BSTd: Tensor,
    mask_B1TT: Tensor,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(q k^T scaling + mask) v, [B, T, H, d], of S heads of keys and values that H / S queries share.

    The sums of products and of the softmax are float32, as everywhere in PyTorch; what is stored is of the
    type of `q_BHTd`. The mask is added, or says who is seen.
    """
    B, H, T, d = q_BHTd.shape
    S = k_BSTd.shape[1]
    shared = (B * S, H // S * T, d)
    scores = (q_BHTd * scaling).reshape(shared) @ k_BSTd.reshape(B * S, T, d).mT
    scores = scores.view(B, H, T, T)
    if mask_B1TT.dtype == torch.bool:
        scores.masked_fill_(~mask_B1TT, torch.finfo(scores.dtype).min)
    else:
        scores.add_(mask_B1TT.to(scores.dtype))
    weights = nn.functional.dropout(scores.softmax(-1), dropout, module.training)
    out = weights.view(B * S, H // S * T, T) @ v_BSTd.reshape(B * S, T, d)
    return out.view(B, H, T, d).transpose(1, 2).contiguous(), None


AttentionInterface.register(SHORT_ROWS, short_rows_attention)
AttentionMaskInterface.register(SHORT_ROWS, eager_mask)
