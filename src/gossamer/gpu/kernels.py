"""The kernels of `cuda/` as they are called: their names, threads and shared memory, and what each is given.

The structures are those of the same names in `cuda/*.cuh`. Who launches them is a `Device`: a GPU
(driver.py), or in tests this computer's CPU.
"""

import ctypes
import itertools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

_WARPS, _SLOTS, _VECTORS_BYTES = 4, 3, 32 * 16
_STEP_WEIGHTS, _NIBBLES = 32 * 64, 16
_NAMES = {
    torch.int8: "i8",
    torch.uint8: "i4",
    torch.bfloat16: "bf16",
}  # in those of kernels, by packed values


@dataclass(frozen=True)
class Kernel:
    """A kernel's name, the threads of a block, and the bytes of shared memory that a block is given."""

    name: str
    threads: int
    shared_bytes: int = 0


class Job(ctypes.Structure):
    """What a kernel is given: tensors as the addresses of their data. They have to outlive the launch."""

    def __init__(self, **values: Any) -> None:
        """A field of each name; None is the address 0."""
        super().__init__(**{k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in values.items()})


class SparseProduct(Job):
    """sums [shares, tiles x 8, P x 16] of masks, values, starts, multipliers and inputs in fragments."""

    _fields_ = [
        (name, ctypes.c_void_p) for name in ("masks", "values", "starts", "multipliers", "inputs", "sums")
    ] + [(name, ctypes.c_int32) for name in ("panels", "steps", "shares")]


class Expand(Job):
    """w [P x 16, S x 128] of masks, values, starts and multipliers."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("masks", "values", "starts", "multipliers", "w")] + [
        (name, ctypes.c_int32) for name in ("panels", "steps")
    ]


class RoundInputs(Job):
    """x [T, K] as INT8, in fragments or (tiles 0) row by row, and a scale for each token."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "rounded", "scales")] + [
        (name, ctypes.c_int32) for name in ("tokens", "inputs", "steps", "tiles", "bfloat16")
    ]


class OrderInputs(Job):
    """x bfloat16 [T, K] in fragments."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "ordered")] + [
        (name, ctypes.c_int32) for name in ("tokens", "inputs", "steps", "tiles")
    ]


class ScaleSums(Job):
    """y [T, N] of sums, int32 with both scales or float32 without."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("sums", "input_scales", "scales", "y")] + [
        (name, ctypes.c_int32) for name in ("tokens", "sum_tokens", "outputs", "panels", "shares", "bfloat16")
    ]


class Device(Protocol):
    """What runs kernels, in the order in which they are launched."""

    processors: int  # that a launch should have blocks for

    def launch(self, kernel: Kernel, blocks: int, job: Job) -> None:
        """Begins it; errors of the kernel itself may show later."""
        ...


def sparse_product(weights: torch.dtype, tiles: int) -> Kernel:
    """Of packed weights of this type, for 1, 2, 4 or 8 tiles; a block does four shares of panels."""
    warp = _SLOTS * _slot_bytes(weights) + _VECTORS_BYTES
    return Kernel(f"sparse_{_NAMES[weights]}_{tiles}", _WARPS * 32, _table_bytes(weights) + _WARPS * warp)


def expand(weights: torch.dtype) -> Kernel:
    """Of packed weights of this type; a block does four steps."""
    shared = _table_bytes(weights) + _WARPS * _slot_bytes(weights)
    return Kernel(f"expand_{_NAMES[weights]}", _WARPS * 32, shared)


ROUND_INPUTS = Kernel("round_inputs", 128, 4 * 4)  # a block a token
ORDER_INPUTS = Kernel("order_inputs", 128)
SCALE_SUMS = Kernel("scale_sums", 256)  # a thread an output
UNITS_OF_BLOCK = _WARPS
TILES = (1, 2, 4, 8)


def all_kernels() -> list[Kernel]:
    """Each that `cuda/` has."""
    of_weights = [[expand(it), *(sparse_product(it, tiles) for tiles in TILES)] for it in _NAMES]
    return [ROUND_INPUTS, ORDER_INPUTS, SCALE_SUMS, *itertools.chain(*of_weights)]


def _slot_bytes(weights: torch.dtype) -> int:
    if weights == torch.uint8:  # a byte has two; what is read ahead of them
        return _STEP_WEIGHTS // 2 + 32 + 16
    return _STEP_WEIGHTS * weights.itemsize + 32


def _table_bytes(weights: torch.dtype) -> int:
    return _NIBBLES * 4 * weights.itemsize
