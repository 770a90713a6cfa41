"""SquareHead: per-layer distillation with a normalized squared error.

    loss = sum over layers l = 1..L of  mean((s_l - t_l)^2) / mean(t_l^2)

s_l, t_l: hidden states [B, T, D] of student and teacher after layer l, the means taken over D and the tokens
that are not padding. Dividing by the teacher's mean square makes the layers weigh the same although the
magnitude of hidden states grows with depth.
Source: Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models" (2023).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


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
    kept = None if token_mask_BT is None else token_mask_BT.bool()
    return torch.stack([_layer_loss(s, t, kept) for s, t in zip(student, teacher, strict=True)]).sum()


def _layer_loss(student_BTD: Tensor, teacher_BTD: Tensor, kept_BT: Tensor | None) -> Tensor:
    """mean((s - t)^2) / mean(t^2) over the kept tokens; both means share their denominator, so it cancels."""
    teacher = teacher_BTD.detach().float()
    square_error, square = (student_BTD.float() - teacher).square(), teacher.square()
    if kept_BT is not None:
        square_error, square = square_error[kept_BT], square[kept_BT]
    return square_error.sum() / square.sum()
