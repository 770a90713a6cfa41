"""Tensors as native code goes through them: float32 in the CPU's memory, one element after another."""

from typing import Any

import torch
from torch import Tensor


def fits(tensor: Tensor) -> bool:
    """Whether native code can take the tensor; torch does otherwise."""
    dense = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return dense and tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()


def flat(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor as a flat NumPy array, not a copy."""
    return tensor.detach().view(-1).numpy()
