"""Training through rounding: the straight-through estimator (Bengio et al., arXiv 1308.3432).

Rounding has no slope to follow, so its gradient is taken to be that of the identity. A weight is stored as
q s: q is a number of its scheme, s the scale of its row or group. What is trained is a float u beside it:

    forward   w = numbers(u r) s        backward   dw/du = r s, and 0 where |u r| exceeds the largest number

The reach r is a seventh of the scheme's largest number: 1 for INT4, whose u so counts steps, 18.1 for INT8.
Thus one learning rate moves the weights of every scheme, row and group by the same share of what they can be.

Weights that the loss wants between two numbers end near the border of both and change sides at every step,
which is noise to all others (Nagel et al., arXiv 2203.11086). So after a step of learning rate l each u is
drawn towards the number that it is rounded to, by a share of l `DRAWN`: only what gradients keep asking for
crosses. On stories3m at W4A8 both more and less than that left a larger error.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

DRAWN = 0.5

Function = Callable[[Tensor], Tensor]


class _StraightThrough(torch.autograd.Function):
    """A function whose gradient is taken to be the identity's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Function) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def through(function: Function) -> Function:
    """The function, for gradients to pass as if it were the identity."""
    return lambda x: _StraightThrough.apply(x, function)  # type: ignore[no-any-return]


class OnGrid(nn.Module):
    """The parametrization of a weight [N, K]: u [N, K] -> numbers of a scheme times their scales [N, K].

    `numbers` rounds to the scheme's, of which `largest` is the largest. The scales are fixed.
    """

    def __init__(self, numbers: Function, largest: float, scale_NK: Tensor) -> None:
        super().__init__()
        self.round, self.largest, self.reach, self.scale_NK = numbers, largest, largest / 7, scale_NK

    def forward(self, u_NK: Tensor) -> Tensor:
        """The weights as they are stored."""
        return self.numbers(u_NK) * self.scale_NK

    def right_inverse(self, w_NK: Tensor) -> Tensor:
        """u, from weights that are numbers times scales."""
        return w_NK / (self.scale_NK * self.reach)

    def numbers(self, u_NK: Tensor) -> Tensor:
        """q, floating point still; gradients pass."""
        return through(self.round)((u_NK * self.reach).clamp(-self.largest, self.largest))

    @torch.no_grad()
    def draw(self, u_NK: Tensor, learning_rate: float) -> None:
        """Draw u towards what it is rounded to, in place, as is due after a step."""
        u_NK.lerp_(self.numbers(u_NK) / self.reach, min(1.0, DRAWN * learning_rate))


class InType(nn.Module):
    """The parametrization of a parameter that is stored in floating point of type `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored = through(lambda value: value.to(dtype).to(value.dtype))

    def forward(self, value: Tensor) -> Tensor:
        """The values as they are stored."""
        return self.stored(value)
