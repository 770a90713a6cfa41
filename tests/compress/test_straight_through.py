"""Training through rounding: what the forward pass computes, and where gradients go."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.compress import fp8, int8
from gossamer.compress.straight_through import DRAWN, InType, OnGrid, through


def grid(largest: float, scale_NK: Tensor) -> OnGrid:
    return OnGrid(torch.round if largest < 400 else fp8.to_e4m3, largest, scale_NK)


@pytest.mark.parametrize("largest", [7, 127, 448.0])
def test_numbers_come_back_to_the_bit(largest: float) -> None:
    """All of a scheme's numbers, on scales of all sizes."""
    whole = torch.arange(-int(largest), int(largest) + 1).float()
    q_K = whole if largest < 400 else fp8.to_e4m3(whole)
    scale_N1 = torch.tensor([[3e-5], [0.1], [7.7]])
    q_NK, scale_NK = q_K.repeat(3, 1), scale_N1.repeat(1, len(q_K))
    linear = nn.Linear(len(q_K), 3, bias=False).requires_grad_(False)
    linear.weight.data = q_NK * scale_NK
    parametrize.register_parametrization(linear, "weight", on := grid(largest, scale_NK))
    assert torch.equal(linear.weight, q_NK * scale_NK)
    assert torch.equal(on.numbers(linear.parametrizations.weight.original), q_NK)  # type: ignore[union-attr, operator, arg-type]


def test_gradients_pass_as_if_nothing_was_rounded_but_beyond_the_largest_number() -> None:
    u_NK = torch.tensor([[0.2, -3.6, 7.4, -9.0]], requires_grad=True)
    w_NK = grid(7, torch.full((1, 4), 0.5))(u_NK)
    assert w_NK.tolist() == [[0.0, -2.0, 3.5, -3.5]]
    w_NK.sum().backward()
    assert u_NK.grad is not None and u_NK.grad.tolist() == [[0.5, 0.5, 0.0, 0.0]]


def test_activations_are_the_bits_of_the_engines_rounding_and_let_gradients_pass() -> None:
    x_TK = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y_TK = through(int8.fake_quantize_tokens)(x_TK)
    assert torch.equal(y_TK, int8.fake_quantize_tokens(x_TK.detach()))
    y_TK.square().sum().backward()
    assert x_TK.grad is not None and torch.equal(x_TK.grad, 2 * y_TK.detach())


def test_drawing_moves_towards_the_nearest_number_and_changes_no_weight() -> None:
    on, u_NK = grid(7, torch.ones(1, 4)), torch.tensor([[0.4, -0.6, 3.0, 8.0]])
    before_NK = on(u_NK)
    on.draw(u_NK, 0.1)
    share = DRAWN * 0.1
    expected = [[0.4 * (1 - share), -0.6 - 0.4 * share, 3.0, 8.0 - share]]
    assert u_NK.tolist() == [pytest.approx(expected[0], rel=1e-6)]
    assert torch.equal(on(u_NK), before_NK)


def test_a_parameter_of_few_bits_is_computed_with_as_it_is_stored() -> None:
    norm = nn.RMSNorm(4)
    norm.weight.data = torch.tensor([1.0, 1.001, 1.003, 300.7])
    parametrize.register_parametrization(norm, "weight", InType(torch.bfloat16))
    assert norm.weight.tolist() == [1.0, 1.0, 1.0, 300.0]
