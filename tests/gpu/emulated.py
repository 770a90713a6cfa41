"""The GPU's kernels on this CPU: their text compiled by g++ with native/gpu/warp.hpp, called through ctypes.

python tests/gpu/emulated.py CASE...    "equal" where the emulated kernels and NumPy agree in all cases
"""

import ctypes
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.gpu import layout

ROOT = Path(__file__).resolve().parents[2]
KERNELS, EMULATION = ROOT / "src" / "gossamer" / "gpu" / "cuda", ROOT / "native" / "gpu"
COMPILER = "g++"


class _Job(ctypes.Structure):
    def __init__(self, **values: Any) -> None:
        """Arrays are given as pointers to them, and kept."""
        self.arrays = values
        pointers = {name: it.ctypes.data for name, it in values.items() if isinstance(it, np.ndarray)}
        super().__init__(**values | pointers)


class SparseI8(_Job):
    _fields_ = [(name, ctypes.c_void_p) for name in ("masks", "values", "starts", "inputs", "sums")] + [
        (name, ctypes.c_int32) for name in ("panels", "steps", "shares")
    ]


class RoundInputs(_Job):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "rounded", "scales")] + [
        (name, ctypes.c_int32) for name in ("tokens", "inputs", "steps", "tiles", "bfloat16")
    ]


class ScaleSums(_Job):
    _fields_ = [(name, ctypes.c_void_p) for name in ("sums", "input_scales", "scales", "y")] + [
        (name, ctypes.c_int32) for name in ("tokens", "outputs", "panels", "bfloat16")
    ]


@dataclass(frozen=True)
class Case:
    """A product: weights [rows, columns] with a share of zeros, `tokens` inputs, steps cut into `shares`."""

    rows: int
    columns: int
    zeros: float
    tokens: int
    shares: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}-{self.zeros:g}-{self.tokens}-{self.shares}"

    @classmethod
    def parsed(cls, text: str) -> "Case":
        shape, zeros, tokens, shares = text.split("-")
        rows, columns = map(int, shape.split("x"))
        return cls(rows, columns, float(zeros), int(tokens), int(shares))

    def operands(self) -> tuple[np.ndarray, np.ndarray]:
        """int8 weights [N, K], extremes among them, and int8 inputs [T, K]."""
        rng = np.random.default_rng(1)
        w_NK = rng.integers(-127, 128, (self.rows, self.columns)).astype(np.int8)
        w_NK[rng.random(w_NK.shape) < self.zeros] = 0
        return w_NK, rng.integers(-128, 128, (self.tokens, self.columns)).astype(np.int8)


CASES = [
    Case(16, 128, 0.5, 1, 1),
    Case(48, 512, 0.7, 8, 1),
    Case(40, 1000, 0.8, 5, 3),  # rows and inputs that fill no whole pieces
    Case(33, 2052, 0.9, 16, 2),
    Case(32, 1024, 0.0, 8, 2),  # every slot full
    Case(64, 1024, 0.7, 1, 4),
    Case(16, 640, 1.0, 2, 1),  # no weights at all
    Case(80, 384, 0.6, 32, 5),  # more shares than steps
    Case(16, 896, 0.3, 60, 2),
]


def build(to: Path, kernels: Path = KERNELS, *flags: str) -> Path:
    """The library of the kernels that lie in a folder; CalledProcessError where they do not compile."""
    library = to / "emulated.so"
    paths = [f"-I{kernels}", f"-I{EMULATION}", "-o", library, EMULATION / "emulate.cpp"]
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", *flags, *paths]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


class Emulated:
    """The kernels as functions of arrays."""

    def __init__(self, library: Path, seed: int = 0, *, eager_copies: bool = False) -> None:
        """`seed` 0 gives lanes their turns in order; copies come late unless they are `eager`."""
        self._library, self._seed, self._eager = ctypes.CDLL(str(library)), seed, eager_copies

    def sums(self, matrix: layout.SparseMatrix, inputs: np.ndarray, shares: int) -> np.ndarray:
        """int32 [tiles 8, P 16] of inputs in fragments, whose tiles are 1, 2, 4 or 8."""
        panels, steps, _ = matrix.masks.shape
        tiles = inputs.shape[1]
        sums = np.zeros((tiles * layout.TILE_TOKENS, panels * 16), np.int32)
        masks, starts, given = map(aligned, (matrix.masks, matrix.starts, inputs))
        job = SparseI8(
            masks=masks, values=aligned(matrix.values), starts=starts, inputs=given, sums=sums,
            panels=panels, steps=steps, shares=shares,
        )  # fmt: skip
        self._library.emulate_sparse_i8(job, tiles, self._seed, int(self._eager))
        return sums

    def rounded(self, x_TK: np.ndarray, tiles: int) -> tuple[np.ndarray, np.ndarray]:
        """Fragments uint32 [S, tiles, 4, 32, 2] and scales float32 [T] of float32 or, uint16, bfloat16."""
        tokens, inputs = x_TK.shape
        steps = -(-inputs // layout.STEP_INPUTS)
        made = np.full((steps, tiles, 4, 32, 2), 0xA5A5A5A5, np.uint32)
        scales = np.full(tokens, np.nan, np.float32)
        job = RoundInputs(
            x=x_TK, rounded=made, scales=scales, tokens=tokens, inputs=inputs, steps=steps, tiles=tiles,
            bfloat16=int(x_TK.dtype == np.uint16),
        )  # fmt: skip
        self._library.emulate_round_inputs(job, self._seed)
        return made, scales

    def scaled(self, sums: np.ndarray, scales_T: np.ndarray, scales_N: np.ndarray, dtype: Any) -> np.ndarray:
        """y [T, N] as float32 or, uint16, bfloat16."""
        y_TN = np.full((scales_T.size, scales_N.size), 0xA5, dtype)
        job = ScaleSums(
            sums=sums, input_scales=scales_T, scales=scales_N, y=y_TN, tokens=scales_T.size,
            outputs=scales_N.size, panels=sums.shape[1] // 16, bfloat16=int(dtype == np.uint16),
        )  # fmt: skip
        self._library.emulate_scale_sums(job, self._seed)
        return y_TN


def aligned(array: np.ndarray, to: int = 16) -> np.ndarray:
    """The same in memory that begins at a multiple of `to` bytes, and at none of twice that."""
    room = np.empty(array.nbytes + 2 * to, np.uint8)
    at = (to - room.ctypes.data) % (2 * to)
    copy = room[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def num_tiles(tokens: int) -> int:
    """Tiles of 8 tokens that a kernel is there for."""
    return next(it for it in (1, 2, 4, 8) if layout.TILE_TOKENS * it >= tokens)


def padded(x_TK: np.ndarray, tiles: int) -> np.ndarray:
    return np.pad(x_TK, ((0, tiles * layout.TILE_TOKENS - len(x_TK)), (0, 0)))


def is_equal(emulated: Emulated, case: Case) -> bool:
    """Whether the sums are NumPy's, and 0 where there are no tokens or rows."""
    w_NK, x_TK = case.operands()
    inputs = layout.fragments(padded(x_TK, num_tiles(case.tokens)))
    found = emulated.sums(layout.from_weights(w_NK), inputs, case.shares)
    expected = np.zeros_like(found)
    expected[: case.tokens, : case.rows] = x_TK.astype(np.int32) @ w_NK.T.astype(np.int32)
    return np.array_equal(found, expected)


def main() -> None:
    library, *cases = sys.argv[1:]
    for eager in (False, True):
        for seed in (0, 1):
            emulated = Emulated(Path(library), seed, eager_copies=eager)
            wrong = [it for it in cases if not is_equal(emulated, Case.parsed(it))]
            if wrong:
                sys.exit(f"different: {', '.join(wrong)}")
    print("equal")


if __name__ == "__main__":
    main()
