"""Sparse linears by their numbers, for compilers that keep what they made for other runs: vLLM's.

A graph that is given the tensors of a sparse linear is made for as many weights as it has, so that no two
layers would share one, and a directory that is pruned anew would meet the graph of the last one. A number is
a tensor like any other's.
"""

from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from gossamer.gpu.linear import SparseLinear

_linears = WeakValueDictionary[int, SparseLinear]()
_next = count()


def number_of(linear: SparseLinear) -> Tensor:
    """int64 [1] on the CPU, by which this process finds the linear as long as somebody holds it."""
    number = next(_next)
    _linears[number] = linear
    return torch.tensor([number], device="cpu")


@torch.library.custom_op("gossamer::numbered_linear", mutates_args=())
def numbered_linear(x: Tensor, number: Tensor, rows: int) -> Tensor:
    """y [..., N] of x [..., K], by the linear with this number and so many rows."""
    return _linears[int(number)](x)


@numbered_linear.register_fake
def _(x: Tensor, number: Tensor, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)
