"""SquareHead against the formula written in NumPy."""

import numpy as np
import pytest
import torch

from gossamer.compress.squarehead import squarehead_loss


def numpy_squarehead(student: np.ndarray, teacher: np.ndarray, mask_BT: np.ndarray) -> float:
    """Sum over layers of the mean over kept tokens of |s - t|^2 / |t|^2; [L, B, T, D], token by token."""
    total = 0.0
    for s_BTD, t_BTD in zip(student, teacher, strict=True):
        errors = []
        for b, t in zip(*np.nonzero(mask_BT), strict=True):
            errors.append(np.sum((s_BTD[b, t] - t_BTD[b, t]) ** 2) / np.sum(t_BTD[b, t] ** 2))
        total += float(np.mean(errors))
    return total


@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_formula(padded: bool) -> None:
    generator = np.random.default_rng(0)
    scale_L = np.array([0.1, 1.0, 30.0])[:, None, None, None]
    teacher = generator.normal(size=(3, 2, 5, 8)) * scale_L
    student = teacher + generator.normal(size=teacher.shape) * scale_L * 0.3
    mask_BT = np.ones((2, 5), dtype=bool)
    mask_BT[1, 3:] = not padded
    ours = squarehead_loss(
        torch.from_numpy(student).float().unbind(),
        torch.from_numpy(teacher).float().unbind(),
        torch.from_numpy(mask_BT).long() if padded else None,
    )
    assert float(ours) == pytest.approx(numpy_squarehead(student, teacher, mask_BT), rel=1e-5)


def test_gradient_reaches_the_student_only() -> None:
    """Of one token, d/ds of |s-t|^2/|t|^2 is 2(s-t)/|t|^2."""
    student = torch.tensor([[[1.0, 2.0]]], requires_grad=True)
    teacher = torch.tensor([[[3.0, 4.0]]], requires_grad=True)
    squarehead_loss([student], [teacher]).backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.tensor([[[-4.0 / 25, -4.0 / 25]]]))
    assert teacher.grad is None


def test_an_attention_sink_hides_no_other_token() -> None:
    """Of ten tokens one is 1e4 times as large and without error; the others are lost."""
    teacher = torch.ones(1, 10, 4)
    teacher[:, 0] *= 1e4
    student = teacher.clone()
    student[:, 1:] = 0
    student.requires_grad_(True)
    loss = squarehead_loss([student], [teacher])
    loss.backward()
    assert loss.item() == pytest.approx(0.9)
    assert student.grad is not None and student.grad[:, 1:].norm(dim=-1).min().item() > 0.09


def test_padding_may_hold_anything() -> None:
    student = torch.zeros(1, 3, 4, requires_grad=True)
    teacher = torch.ones(1, 3, 4)
    teacher[:, 2] = float("nan")
    loss = squarehead_loss([student], [teacher], torch.tensor([[1, 1, 0]]))
    loss.backward()
    assert loss.item() == pytest.approx(1.0) and student.grad is not None
    torch.testing.assert_close(student.grad[0, :, 0], torch.tensor([-0.25, -0.25, 0.0]))


def test_layers_must_pair_up() -> None:
    hidden = [torch.ones(1, 1, 2)] * 3
    with pytest.raises(ValueError, match="found 3 hidden states of the student and 2"):
        squarehead_loss(hidden, hidden[:2])
