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
from torch.nn.functional import mse_loss


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
    """mean((s - t)^2) / mean(t^2) over the kept tokens; both means share their denominator, so it cancels.

    At padding the target becomes the student itself, which adds neither error nor gradient and copies nothing
    of the student.
    """
    student, target = student_BTD.float(), teacher_BTD.detach().float()
    if kept_BT is None:
        return mse_loss(student, target, reduction="sum") / target.square().sum()
    square = target.square().sum(-1)[kept_BT].sum()
    target = torch.where(kept_BT.unsqueeze(-1), target, student.detach())
    return mse_loss(student, target, reduction="sum") / square
