"""The GPU's kernels on this CPU: their text compiled by g++ with native/gpu/warp.hpp, called through ctypes.

python tests/gpu/emulated.py LIBRARY... -- CASE...    says of each library whether NumPy agrees in all cases
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from gossamer.gpu import kernels, layout, products
from gossamer.gpu.driver import Module
from gossamer.gpu.kernels import Job, Kernel
from gossamer.gpu.packing import PackedWeights

ROOT = Path(__file__).resolve().parents[2]
KERNELS, EMULATION = ROOT / "src" / "gossamer" / "gpu" / "cuda", ROOT / "native" / "gpu"
COMPILER = "g++"
PATIENCE = 300  # seconds
TYPES = {
    np.dtype(np.int8): torch.int8, np.dtype(np.uint8): torch.uint8, np.dtype(np.uint16): torch.bfloat16
}  # fmt: skip

needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"no {COMPILER} to compile GPU kernels for this CPU with"
)


def build(to: Path, kernels: Path = KERNELS, *flags: str) -> Path:
    """The library of the kernels that lie in a folder; CalledProcessError where they do not compile."""
    library = to / "emulated.so"
    paths = [f"-I{kernels}", f"-I{EMULATION}", "-o", library, EMULATION / "emulate.cpp"]
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", *flags, *paths]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


class Emulated:
    """A device that is this CPU, as many processors as a test wants, behind a driver that is like CUDA's."""

    def __init__(
        self, library: Path, seed: int = 0, *, eager_copies: bool = False, processors: int = 1
    ) -> None:
        """`seed` 0 gives lanes their turns in order; copies come late unless they are `eager`."""
        self._library, self._arguments = ctypes.CDLL(str(library)), (seed, int(eager_copies))
        self._module = Module(self._library, b"\x7fELF")
        self.processors, self.launched = processors, list[str]()

    def launch(self, kernel: Kernel, blocks: int, job: Job) -> None:
        """Runs it to its end; EngineError for what a driver would refuse."""
        self.launched.append(kernel.name)
        self._library.emulate_with(*self._arguments)
        self._module.launch(kernel, blocks, job, 0)


@dataclass(frozen=True)
class Case:
    """A product: weights [rows, columns] with a share of zeros, `tokens` inputs, steps cut into `shares`."""

    weights: str  # i8, i4 or bf16
    rows: int
    columns: int
    zeros: float
    tokens: int
    shares: int

    def __str__(self) -> str:
        return f"{self.weights}-{self.rows}x{self.columns}-{self.zeros:g}-{self.tokens}-{self.shares}"

    @classmethod
    def parsed(cls, text: str) -> "Case":
        weights, shape, zeros, tokens, shares = text.split("-")
        rows, columns = map(int, shape.split("x"))
        return cls(weights, rows, columns, float(zeros), int(tokens), int(shares))

    def operands(self) -> tuple[layout.SparseMatrix, layout.Values, layout.Values]:
        """A matrix, its weights [N, K] and inputs [T, K]: int8, extremes among them, or bits of bfloat16.

        The latter are whole numbers up to 100: of these every sum of floats is exact. Of INT4 the weights are
        the int8 numbers that nibbles and multipliers make.
        """
        rng = np.random.default_rng(1)
        largest = 100 if self.weights == "bf16" else 127
        w_NK = rng.integers(-largest, largest + 1, (self.rows, self.columns)).astype(np.int8)
        w_NK[rng.random(w_NK.shape) < self.zeros] = 0
        x_TK = rng.integers(-largest - 1, largest + 1, (self.tokens, self.columns)).astype(np.int8)
        if self.weights == "i4":
            q_NK, multiplier_NS = random_int4(self.rows, self.columns, self.zeros)
            return layout.from_weights(q_NK, multiplier_NS), int8_weights(q_NK, multiplier_NS), x_TK
        if self.weights == "bf16":
            w_NK, x_TK = bfloat16(w_NK), bfloat16(x_TK)
        return layout.from_weights(w_NK), w_NK, x_TK


SIZES = [
    (16, 128, 0.5, 1, 1),
    (48, 512, 0.7, 8, 1),
    (40, 1000, 0.8, 5, 3),  # rows and inputs that fill no whole pieces
    (33, 2052, 0.9, 16, 2),
    (32, 1024, 0.0, 8, 2),  # every slot full
    (64, 1024, 0.7, 1, 4),
    (16, 640, 1.0, 2, 1),  # no weights at all
    (80, 384, 0.6, 32, 5),  # more shares than steps
    (16, 896, 0.3, 60, 2),
]
WAYS = [(0, False), (1, False), (1, True)]  # seeds of turns, and whether copies are eager
CASES = [Case(weights, *sizes) for weights in ("i8", "bf16", "i4") for sizes in SIZES]


def sums(device: Emulated, matrix: layout.SparseMatrix, inputs: np.ndarray, shares: int) -> np.ndarray:
    """[shares, tiles 8, P 16] of inputs in fragments, whose tiles are 1, 2, 4 or 8."""
    panels, steps, _ = matrix.masks.shape
    tiles, packed, given = inputs.shape[1], on_device(matrix), aligned(inputs)
    shape = (shares, tiles * layout.TILE_TOKENS, panels * 16)
    is_float = packed.values.dtype == torch.bfloat16
    found = torch.full(shape, 77, dtype=torch.float32 if is_float else torch.int32)
    job = kernels.SparseProduct(
        masks=packed.masks, values=packed.values, starts=packed.starts, multipliers=packed.multipliers,
        inputs=given, sums=found, panels=panels, steps=steps, shares=shares,
    )  # fmt: skip
    kernel = kernels.sparse_product(packed.values.dtype, tiles)
    device.launch(kernel, -(-panels * shares // kernels.UNITS_OF_BLOCK), job)
    return found.numpy()


def expanded(device: Emulated, matrix: layout.SparseMatrix) -> np.ndarray:
    """Weights int8 or bits of bfloat16 [P 16, S 128]."""
    found = products.expanded(device, on_device(matrix))
    return found.view(torch.int16).numpy().view(np.uint16) if found.is_floating_point() else found.numpy()


def on_device(matrix: layout.SparseMatrix) -> PackedWeights:
    values = aligned(matrix.values).view(TYPES[matrix.values.dtype])
    multipliers = None if matrix.multipliers is None else aligned(matrix.multipliers)
    masks, starts = aligned(matrix.masks), aligned(matrix.starts)
    return PackedWeights(matrix.rows, matrix.columns, masks, values, starts, multipliers)


def aligned(array: np.ndarray, to: int = 16) -> torch.Tensor:
    """The same bytes, in memory that begins at a multiple of `to` bytes and at none of twice that."""
    signed = {2: np.int16, 4: np.int32, 8: np.int64}.get(array.itemsize, np.int8)
    room = np.empty(array.nbytes + 2 * to, np.uint8)
    at = (to - room.ctypes.data) % (2 * to)
    copy = room[at : at + array.nbytes].view(signed).reshape(array.shape)
    copy[...] = array.view(signed)
    return torch.from_numpy(copy)


def num_tiles(tokens: int) -> int:
    """Tiles of 8 tokens that a kernel is there for."""
    return next(it for it in kernels.TILES if layout.TILE_TOKENS * it >= tokens)


def padded(x_TK: np.ndarray, tiles: int) -> np.ndarray:
    return np.pad(x_TK, ((0, tiles * layout.TILE_TOKENS - len(x_TK)), (0, 0)))


def is_equal(device: Emulated, case: Case) -> bool:
    """Whether the shares' sums are together NumPy's, 0 without tokens or rows, and expanded the weights."""
    matrix, w_NK, x_TK = case.operands()
    inputs = layout.fragments(padded(x_TK, num_tiles(case.tokens)))
    found = sums(device, matrix, inputs, case.shares).sum(axis=0)
    expected = np.zeros_like(found)
    expected[: case.tokens, : case.rows] = numbers(x_TK) @ numbers(w_NK).T
    dense = np.zeros((matrix.masks.shape[0] * 16, matrix.masks.shape[1] * 128), w_NK.dtype)
    dense[: case.rows, : case.columns] = w_NK
    return np.array_equal(found, expected) and np.array_equal(expanded(device, matrix), dense)


def random_int4(rows: int, columns: int, zeros: float, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """int8 [N, K] from -8 to 7, and multipliers uint8 [N, S] from 1 to 16, extremes among both."""
    rng = np.random.default_rng(seed)
    q_NK = rng.choice(np.array([*range(-8, 0), *range(1, 8)], np.int8), (rows, columns))
    q_NK[rng.random(q_NK.shape) < zeros] = 0
    multiplier_NS = rng.integers(1, 17, (rows, -(-columns // layout.STEP_INPUTS))).astype(np.uint8)
    multiplier_NS[::3, 0], multiplier_NS[1::3, -1] = 16, 1
    return q_NK, multiplier_NS


def int8_weights(q_NK: np.ndarray, multiplier_NS: np.ndarray) -> np.ndarray:
    """What INT4 weights stand for, [N, K]."""
    of_inputs_NK = np.repeat(multiplier_NS, layout.STEP_INPUTS, axis=1)[:, : q_NK.shape[1]]
    return (q_NK.astype(np.int32) * of_inputs_NK).astype(np.int8)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, halves to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def numbers(values: np.ndarray) -> np.ndarray:
    """What int8 or bits of bfloat16 stand for, in float64."""
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def agrees(library: Path, cases: Iterable[Case]) -> bool:
    """With NumPy, whichever turns lanes take and whenever copies come."""
    devices = [Emulated(library, seed, eager_copies=eager) for seed, eager in WAYS]
    return all(is_equal(device, case) for device in devices for case in cases)


def main() -> None:
    """A library that breaks off or hangs, as one may that has a mistake, ends a process of its own."""
    border = sys.argv.index("--")
    cases = [Case.parsed(it) for it in sys.argv[border + 1 :]]
    for library in map(Path, sys.argv[1:border]):
        if (child := os.fork()) == 0:
            signal.alarm(PATIENCE)
            os._exit(0 if agrees(library, cases) else 1)
        print("different" if os.waitpid(child, 0)[1] else "equal", flush=True)


if __name__ == "__main__":
    main()
