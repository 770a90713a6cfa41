"""SquareHead: per-layer distillation with a normalized squared error, here a token's own.

    loss = sum over layers l = 1..L of  mean over tokens of |s_l - t_l|^2 / |t_l|^2

s_l, t_l: hidden states [B, T, D] of student and teacher after layer l; tokens that are padding are left out.
Dividing by the teacher's square makes the layers weigh the same although the magnitude of hidden states grows
with depth. The published loss divides the mean square of a layer's error by that of its states. One token,
the attention sink, may hold 97% of both, so that nothing is learned of the others; a token at a time, each
counts once.
Source: Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models" (2023).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.compress.target import token_error


def squarehead_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], token_mask_BT: Tensor | None = None
) -> Tensor:
    """The scalar loss over layers 1..L, in float32.

    student, teacher: L hidden states [B, T, D] each, the embeddings not among them;
    token_mask_BT: nonzero where the token is not padding (None: no padding).
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"found {len(student)} hidden states of the student and {len(teacher)} of the teacher"
        )
    kept_BT = None if token_mask_BT is None else token_mask_BT.bool()
    errors = [
        token_error(s.float(), t.detach().float(), kept_BT) for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).sum()
