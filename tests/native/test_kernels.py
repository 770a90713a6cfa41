"""Every cell of the kernel table against NumPy in float64 or exact integers."""

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from gossamer import _native
from gossamer.errors import ConfigError, UnsupportedError
from gossamer.weights import to_float32

ROWS = [row for row in _native.kernels() if row["isa"] in {"scalar", _native.isa()}]
MATMUL = [row for row in ROWS if row["family"] == "matmul"]
INT8 = [row for row in MATMUL if row["values"] == "i8"]
ISAS = sorted({row["isa"] for row in ROWS})
EMPTY_PARTS = -0.5  # half zeros, and nothing in the first panel, every third row and the last columns
SHAPES = [(1, 1), (16, 4), (17, 5), (31, 66), (40, 515), (80, 1030)]
SPARSITIES = [0.0, 0.5, 0.7, 0.99, 1.0, EMPTY_PARTS]
TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 24]
cell = pytest.mark.parametrize("row", MATMUL, ids=lambda row: "-".join(row.values()))


def weights(values: str, shape: tuple[int, int], sparsity: float, rng: np.random.Generator) -> np.ndarray:
    """Random weights of a type; `sparsity` may be EMPTY_PARTS."""
    kept = rng.random(shape) >= abs(sparsity)
    if sparsity == EMPTY_PARTS:
        kept[:16] = kept[::3] = kept[:, -7:] = False
    if values == "i8":
        return (rng.integers(-128, 128, shape) * kept).astype(np.int8)
    w_NK = (rng.standard_normal(shape) * kept).astype(np.float32)
    return w_NK if values == "f32" else (w_NK.view(np.uint32) >> 16).astype(np.uint16)


@cell
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_equals_numpy(
    row: dict[str, str], shape: tuple[int, int], sparsity: float, matrix: Callable
) -> None:
    rng = np.random.default_rng(shape[0])
    w_NK = weights(row["values"], shape, sparsity, rng)
    scale_N = rng.random(shape[0]).astype(np.float32)
    found = matrix(row["values"], row["storage"], w_NK, scale_N)
    for tokens in TOKENS:
        x_TK = rng.standard_normal((tokens, shape[1])).astype(np.float32)
        y_TN = _native.matmul(row["isa"], **found.arguments, x_TK=x_TK)
        if row["values"] == "i8":
            q_TK, x_scale_T1 = _native.quantize("scalar", x_TK)
            sums_TN = (q_TK.astype(np.int64) - 128) @ w_NK.T.astype(np.int64)
            np.testing.assert_array_equal(y_TN, sums_TN.astype(np.float32) * (x_scale_T1 * scale_N))
        else:
            w = (w_NK if row["values"] == "f32" else to_float32(w_NK, "BF16")).astype(np.float64)
            bound_TN = 4 * np.sqrt(shape[1]) * 2.0**-24 * (np.abs(x_TK) @ np.abs(w.T))
            assert (np.abs(y_TN - x_TK @ w.T) <= bound_TN).all()


@pytest.mark.parametrize("storage", ["dense", "sparse"])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_integer_sums_are_the_same_bits_on_every_level(storage: str, tokens: int, matrix: Callable) -> None:
    rng = np.random.default_rng(tokens)
    w_NK = weights("i8", (50, 1037), 0.6, rng)
    found = matrix("i8", storage, w_NK, np.ones(50))
    x_TK = rng.standard_normal((tokens, 1037)).astype(np.float32)
    q_TK, _ = _native.quantize("scalar", x_TK)
    expected_TN = (q_TK.astype(np.int64) - 128) @ w_NK.T.astype(np.int64)
    for isa in ISAS:
        np.testing.assert_array_equal(_native.accumulators(isa, **found.arguments, x_TK=x_TK), expected_TN)


def test_extreme_sums_do_not_saturate(matrix: Callable) -> None:
    w_NK = np.full((16, 8192), -128, np.int8)
    found, x_TK = matrix("i8", "sparse", w_NK, np.ones(16)), np.full((1, 8192), -127.5, np.float32)
    for isa in ISAS:
        sums_TN = _native.accumulators(isa, **found.arguments, x_TK=x_TK)
        assert (sums_TN == 128 * 128 * 8192).all()


@pytest.mark.parametrize("isa", ISAS)
def test_quantization_is_compressed_tensors(isa: str) -> None:
    rng = np.random.default_rng(1)
    x_TK = (rng.standard_normal((6, 203)) * np.logspace(-30, 4, 6)[:, None]).astype(np.float32)
    x_TK[3] = 0
    x_TK[4, 7] = -np.abs(x_TK[4]).max() * 2
    q_TK, scale_T1 = _native.quantize(isa, x_TK)
    expected_T1 = np.abs(x_TK).max(axis=1, keepdims=True) / np.float32(127.5)
    np.testing.assert_array_equal(scale_T1, np.where(expected_T1 == 0, np.finfo(np.float32).eps, expected_T1))
    np.testing.assert_array_equal(q_TK.astype(int) - 128, np.clip(np.rint(x_TK / scale_T1), -128, 127))


def test_rmsnorm_and_swiglu_equal_numpy_with_the_same_bits_on_every_level() -> None:
    rng = np.random.default_rng(2)
    for width in (1, 16, 37, 2048):
        x_TD, up_TD = 5 * rng.standard_normal((2, 3, width)).astype(np.float32)
        weight_D = rng.standard_normal(width).astype(np.float32)
        wide = x_TD.astype(np.float64)
        norm = weight_D * wide / np.sqrt(np.square(wide).mean(axis=1, keepdims=True) + 1e-2)
        silu = wide / (1 + np.exp(-wide)) * up_TD
        for isa in ISAS:
            found = _native.rmsnorm(isa, x_TD, weight_D, 1e-2), _native.swiglu(isa, x_TD, up_TD)
            np.testing.assert_allclose(found[0], norm, rtol=1e-6)
            np.testing.assert_allclose(found[1], silu, rtol=1e-6, atol=1e-30)
            np.testing.assert_array_equal(found[0], _native.rmsnorm("scalar", x_TD, weight_D, 1e-2))
            np.testing.assert_array_equal(found[1], _native.swiglu("scalar", x_TD, up_TD))


def test_bandwidth_reads_every_byte_in_some_time() -> None:
    rates = _native.read_bandwidth(2, 1024, np.ones(4 << 20, np.uint8), 3)
    assert len(rates) == 3 and min(rates) > 1e6


def test_unknown_levels_and_unsupported_storage_are_errors(matrix: Callable) -> None:
    found = matrix("i8", "dense", np.ones((1, 1), np.int8), np.ones(1))
    x_TK = np.ones((1, 1), np.float32)
    with pytest.raises(ConfigError, match="sse9"):
        _native.matmul("sse9", **found.arguments, x_TK=x_TK)
    found.layers["w"] |= {"storage": "sparse", "values": "f32"}
    with pytest.raises(UnsupportedError):
        _native.matmul("scalar", **found.arguments, x_TK=x_TK)


@pytest.mark.parametrize("cap", ["scalar", "avx512", "avx9"])
def test_the_environment_caps_the_level(cap: str) -> None:
    code = "from gossamer import _native; print(_native.isa())"
    environment = os.environ | {"GOSSAMER_ISA": cap, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if cap == "avx9":
        assert ran.returncode != 0 and "ConfigError: found instruction set 'avx9'" in ran.stderr
    else:
        assert ran.stdout.strip() in {"scalar", cap}
