"""Products of training with a fixed mask, against dense products in float64."""

import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from gossamer import _native
from gossamer.errors import EngineError

LEVELS = tuple(_native.levels())
RUNNABLE = tuple(level for level, runs in _native.levels().items() if runs)
ISAS = [row["isa"] for row in _native.kernels() if row["family"] == "project" and row["isa"] in RUNNABLE]
EPS = float(np.finfo(np.float32).eps)

# (N, K), tokens, density: single ones, ends of strips (96) and tiles (64 tokens) and one beyond, nothing, all
CASES = [
    ((1, 1), 1, 1.0),
    ((5, 7), 3, 0.5),
    ((96, 96), 64, 0.3),
    ((97, 95), 65, 0.9),
    ((100, 300), 130, 0.1),
    ((193, 192), 63, 0.02),
    ((40, 100), 7, 0.0),
    ((200, 97), 200, 1.0),
    ((1700, 110), 70, 0.2),  # more rows than sums are held for at once
]


@dataclass
class Problem:
    """A masked matrix, its values in the plan's order, inputs, and gradients of the outputs."""

    plan: _native.SparsePlan
    w_NK: np.ndarray
    values: np.ndarray
    positions: np.ndarray
    x_TK: np.ndarray
    dy_TN: np.ndarray


def problem(shape: tuple[int, int], num_tokens: int, density: float, seed: int = 0) -> Problem:
    rng = np.random.default_rng(seed)
    mask_NK = rng.random(shape) < density
    plan = _native.SparsePlan(mask_NK)
    w_NK = np.where(mask_NK, rng.standard_normal(shape), 0).astype(np.float32)
    positions = plan.positions()
    x_TK, dy_TN = (rng.standard_normal((num_tokens, n)).astype(np.float32) for n in (shape[1], shape[0]))
    return Problem(plan, w_NK, w_NK.reshape(-1)[positions], positions, x_TK, dy_TN)


def products(
    p: Problem, num_threads: int, isa: str | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, dx and the gradient of the values; outputs hold NaN before, so that an unwritten one shows."""
    y, dx, dvalues = (np.full_like(a, np.nan) for a in (p.dy_TN, p.x_TK, p.values))
    p.plan.forward(p.values, p.x_TK, y, num_threads, isa)
    p.plan.backward_input(p.values, p.dy_TN, dx, num_threads, isa)
    p.plan.backward_values(p.x_TK, p.dy_TN, dvalues, num_threads, isa)
    return y, dx, dvalues


def assert_within(found: np.ndarray, a: np.ndarray, b: np.ndarray, places: np.ndarray | None = None) -> None:
    """|found - a b| <= 2 n eps |a| |b| for sums of n terms, at the places (all: None)."""
    exact, scale = a.astype(float) @ b.astype(float), np.abs(a).astype(float) @ np.abs(b).astype(float)
    if places is not None:
        exact, scale = exact.reshape(-1)[places], scale.reshape(-1)[places]
    assert found.shape == exact.shape
    assert (np.abs(found - exact) <= 2 * a.shape[1] * EPS * scale).all()


@pytest.mark.parametrize(("shape", "num_tokens", "density"), CASES)
def test_positions_are_the_masks(shape: tuple[int, int], num_tokens: int, density: float) -> None:
    p = problem(shape, num_tokens, density)
    assert np.array_equal(np.sort(p.positions), np.flatnonzero(p.w_NK))
    assert p.plan.num_values == len(p.positions)
    assert (p.plan.rows, p.plan.columns) == shape


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("shape", "num_tokens", "density"), CASES)
def test_products_equal_dense_ones(shape: tuple[int, int], num_tokens: int, density: float, isa: str) -> None:
    p = problem(shape, num_tokens, density)
    y, dx, dvalues = products(p, 1, isa)
    assert_within(y, p.x_TK, p.w_NK.T)
    assert_within(dx, p.dy_TN, p.w_NK)
    assert_within(dvalues, p.dy_TN.T, p.x_TK, p.positions)


@pytest.mark.parametrize("num_threads", [2, 3, 16])
def test_the_number_of_threads_changes_no_bit(num_threads: int) -> None:
    for shape, num_tokens, density in CASES:
        p = problem(shape, num_tokens, density)
        for one, several in zip(products(p, 1), products(p, num_threads), strict=True):
            assert np.array_equal(one, several), shape


@pytest.mark.skipif("avx512" not in ISAS, reason="this machine has no AVX-512")
def test_sums_over_inputs_are_the_same_bits_on_avx2_and_avx512() -> None:
    for shape, num_tokens, density in CASES:
        p = problem(shape, num_tokens, density)
        wide, narrow = products(p, 2, "avx512"), products(p, 2, "avx2")
        assert np.array_equal(wide[0], narrow[0])
        assert np.array_equal(wide[1], narrow[1])


def test_indices_cost_little_more_than_the_values() -> None:
    """4 bytes a value (two indices and a place), and one a row and strip in either order."""
    p = problem((512, 960), 1, 0.3)
    rows, columns = 512, 960
    per_strip = rows * 10 + columns * 6
    assert p.plan.num_bytes <= 4 * p.plan.num_values + per_strip + 16 * 10 * 6 + 100


def test_a_process_without_torch_has_threads_of_its_own() -> None:
    """Here torch may have brought OpenMP along; a fresh interpreter has none."""
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from native.test_sparse_plan import problem, products\n"
        "import numpy as np, ctypes\n"
        "assert 'torch' not in sys.modules and not hasattr(ctypes.CDLL(None), 'GOMP_parallel')\n"
        "p = problem((300, 200), 130, 0.3)\n"
        "assert all(np.array_equal(a, b) for a, b in zip(products(p, 1), products(p, 2)))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ), timeout=120)


def test_arrays_that_do_not_fit_are_refused() -> None:
    p = problem((5, 7), 3, 0.5)
    y_TN = np.empty((3, 5), np.float32)
    with pytest.raises(EngineError, match=r"values \[0\], inputs \[3, 7\].*do not fit a mask \[5, 7\]"):
        p.plan.forward(p.values[:0], p.x_TK, y_TN, 1)
    with pytest.raises(EngineError, match=r"inputs \[3, 6\]"):
        p.plan.forward(p.values, p.x_TK[:, :6].copy(), y_TN, 1)
    with pytest.raises(EngineError, match=r"outputs \[2, 5\]"):
        p.plan.backward_values(p.x_TK, p.dy_TN[:2], np.empty_like(p.values), 1)
    with pytest.raises(EngineError, match="rows and columns"):
        _native.SparsePlan(np.empty((0, 4), bool))
    with pytest.raises(TypeError):
        p.plan.forward(p.values, p.x_TK, y_TN.astype(np.float64), 1)


def test_all_calls_share_their_threads() -> None:
    """Each kind of call would otherwise keep a pool and scratch of its own."""
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path\n"
        "from native.test_sparse_plan import problem, products\n"
        "def threads(): return len(list(Path('/proc/self/task').iterdir()))\n"
        "p = problem((300, 200), 130, 0.3)\n"
        "before = threads()\n"
        "products(p, 6)\n"
        "assert threads() - before == 5, (before, threads())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ), timeout=120)
