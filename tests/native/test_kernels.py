"""Every cell of the kernel table against NumPy in float64 or exact integers."""

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from gossamer import _native
from gossamer.checkpoint.weights import to_float32
from gossamer.errors import ConfigError, UnsupportedError
from native.conftest import Matrix, make_matrix

LEVELS = tuple(_native.levels())
RUNNABLE = tuple(level for level, runs in _native.levels().items() if runs)
EMULATED = ["amx-emulated"] if "avx512" in RUNNABLE else []  # its weights are expanded by avx512
ROWS = _native.kernels()
MATMUL = [row for row in ROWS if row["family"] == "matmul"]
VECTORS = {  # inputs of one length [1, n] -> outputs that every level must give with the bits of scalar
    "rmsnorm": lambda isa, a, b: _native.rmsnorm(isa, a, b[0], 1e-5),
    "layernorm": lambda isa, a, b: _native.layernorm(isa, a, b[0], a[0], 1e-5),
    "gelu": lambda isa, a, b: _native.gelu(isa, a),
    "geglu": lambda isa, a, b: _native.geglu(isa, a, b),
    "swiglu": lambda isa, a, b: _native.swiglu(isa, a, b),
    "largest": lambda isa, a, b: _native.largest(isa, a[0]),
    "quantize": lambda isa, a, b: _native.quantize(isa, a),
    "split": lambda isa, a, b: _native.split(isa, a),
    "highest": lambda isa, a, b: _native.highest(isa, a[0]),
    "mass": lambda isa, a, b: _native.mass(isa, a[0], a.max(), 0.5, -1.0),
    "keep": lambda isa, a, b: _native.keep(isa, a[0], -1.0, 1.0),
}
# What has tests of its own: below, test_attention.py, test_sparse_plan.py, test_adamw.py, test_sweep.py,
# test_native_head_loss.py (peak, total, gradient), test_bench.py.
TESTED_APART = {"matmul", "accumulate", "attention", "rope", "multiply", "project", "adamw", "sweep"}
TESTED_APART |= {"peak", "total", "gradient"}
PROBES = {"read", "multiply_int8", "multiply_f32"}
CELLS = sorted({(row["values"], row["storage"]) for row in MATMUL})
ISAS = [isa for isa in RUNNABLE if isa in {row["isa"] for row in ROWS if row["family"] == "rmsnorm"}]
EMPTY_PARTS = -0.5  # half zeros, and nothing in the first panel, every third row and the last columns
SHAPES = [(1, 1), (16, 4), (17, 5), (31, 66), (40, 515), (80, 1030)]
SPARSITIES = [0.0, 0.5, 0.7, 0.99, 1.0, EMPTY_PARTS]
TOKENS = [1, 2, 3, 4, 5, 7, 8, 13, 33]


@dataclass(frozen=True)
class Problem:
    """A matrix of a type, and what it means: exact int8 weights, or the float64 values that are stored."""

    matrix: Matrix
    values: str
    w_NK: np.ndarray
    scale_N: np.ndarray


def problem(
    values: str, storage: str, shape: tuple[int, int], sparsity: float, rng: np.random.Generator
) -> Problem:
    """Random weights; `sparsity` may be EMPTY_PARTS."""
    kept = rng.random(shape) >= abs(sparsity)
    if sparsity == EMPTY_PARTS:
        kept[:16] = kept[::3] = kept[:, -7:] = False
    scale_N = rng.random(shape[0]).astype(np.float32)
    if values in ("f32", "bf16"):
        w_NK = (rng.standard_normal(shape) * kept).astype(np.float32)
        if values == "f32":
            return Problem(make_matrix(values, storage, w_NK, scale_N), values, w_NK.astype(float), scale_N)
        bits_NK = (w_NK.view(np.uint32) >> 16).astype(np.uint16)
        wide_NK = to_float32(bits_NK, "BF16").astype(float)
        return Problem(make_matrix(values, storage, bits_NK, scale_N), values, wide_NK, scale_N)
    low, high = (-8, 8) if values == "i4" else (-128, 128)
    q_NK = (rng.integers(low, high, shape) * kept).astype(np.int8)
    if values == "i8":
        return Problem(make_matrix(values, storage, q_NK, scale_N), values, q_NK, scale_N)
    groups = -(-shape[1] // 128)
    multiplier_NG = rng.integers(1, 17, (shape[0], groups)).astype(np.uint8)
    matrix = make_matrix(values, storage, q_NK, scale_N, multiplier_NG)
    w_NK = (q_NK * np.repeat(multiplier_NG.astype(np.int16), 128, axis=1)[:, : shape[1]]).astype(np.int8)
    return Problem(matrix, values, w_NK, scale_N)


def exact_sums(w_NK: np.ndarray, x_TK: np.ndarray) -> np.ndarray:
    q_TK, _ = _native.quantize("scalar", x_TK)
    return (q_TK.astype(np.int64) - 128) @ w_NK.T.astype(np.int64)


def multiplied(isa: str, values: str, x_TK: np.ndarray) -> np.ndarray:
    """The inputs that float weights meet at a level: avx512-bf16 rounds those of more than 4 tokens."""
    if (isa, values) != ("avx512-bf16", "bf16") or len(x_TK) <= 4:
        return x_TK
    high_TK, _ = _native.split("scalar", x_TK)
    return to_float32(high_TK, "BF16")


def test_levels_that_this_machine_lacks() -> None:
    """Says in the summary what the tests below leave out."""
    if missing := [level for level in LEVELS if level not in RUNNABLE]:
        pytest.skip(
            f"no {' and no '.join(missing)} here; tiles are {'emulated' if EMULATED else 'not tested'}"
        )


@pytest.mark.parametrize("isa", [*RUNNABLE, *EMULATED])
@pytest.mark.parametrize(("values", "storage"), CELLS, ids="-".join)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_equals_numpy(
    isa: str, values: str, storage: str, shape: tuple[int, int], sparsity: float
) -> None:
    rng = np.random.default_rng(shape[0])
    asked = problem(values, storage, shape, sparsity, rng)
    for tokens in TOKENS if isa in RUNNABLE else (5, 33):
        x_TK = rng.standard_normal((tokens, shape[1])).astype(np.float32)
        y_TN = _native.matmul(isa, **asked.matrix.arguments, x_TK=x_TK)
        if values in ("i8", "i4"):
            _, x_scale_T1 = _native.quantize("scalar", x_TK)
            sums_TN = exact_sums(asked.w_NK, x_TK)
            np.testing.assert_array_equal(y_TN, sums_TN.astype(np.float32) * (x_scale_T1 * asked.scale_N))
        else:
            unit = 2.0**-16 if isa.startswith("amx") and values == "bf16" else np.sqrt(shape[1]) * 2.0**-22
            x_TK = multiplied(isa, values, x_TK)
            bound_TN = unit * (np.abs(x_TK) @ np.abs(asked.w_NK.T))
            assert (np.abs(y_TN - x_TK @ asked.w_NK.T) <= bound_TN).all()


@pytest.mark.parametrize("seed", range(2000 if os.environ.get("GOSSAMER_TORTURE") else 25))
def test_random_products_equal_the_specification(seed: int) -> None:
    """Any cell, shape, sparsity and number of tokens: what scalar code computes, to the bit but for tiles."""
    rng = np.random.default_rng(seed)
    values, storage = CELLS[rng.integers(len(CELLS))]
    shape = int(rng.integers(1, 120)), int(rng.integers(1, 1500))
    asked = problem(values, storage, shape, float(rng.random()), rng)
    x_TK = rng.standard_normal((int(rng.integers(1, 40)), shape[1])).astype(np.float32)
    expected_TN = _native.matmul("scalar", **asked.matrix.arguments, x_TK=x_TK)
    for isa in (*RUNNABLE, *EMULATED):
        found_TN = _native.matmul(isa, **asked.matrix.arguments, x_TK=x_TK)
        if isa.startswith("amx") and values == "bf16":
            assert (np.abs(found_TN - expected_TN) <= 2.0**-15 * (np.abs(x_TK) @ np.abs(asked.w_NK.T))).all()
        elif isa == "avx512-bf16" and values == "bf16":
            rounded_TK = multiplied(isa, values, x_TK)
            expected = _native.matmul("scalar", **asked.matrix.arguments, x_TK=rounded_TK)
            bound_TN = np.sqrt(shape[1]) * 2.0**-22 * (np.abs(rounded_TK) @ np.abs(asked.w_NK.T))
            assert (np.abs(found_TN - expected) <= bound_TN).all()
        else:
            np.testing.assert_array_equal(found_TN, expected_TN)


@pytest.mark.parametrize(("values", "storage"), CELLS, ids="-".join)
@pytest.mark.parametrize("tokens", [1, 7, 70, 300])
def test_sums_are_the_same_bits_on_every_level(values: str, storage: str, tokens: int) -> None:
    """Integer sums everywhere; floats too, in one order of fused operations, but for bfloat16 products."""
    rng = np.random.default_rng(tokens)
    asked = problem(values, storage, (50, 1037), 0.6, rng)
    x_TK = rng.standard_normal((tokens, 1037)).astype(np.float32)
    if values in ("i8", "i4"):
        expected_TN = exact_sums(asked.w_NK, x_TK)
        for isa in (*RUNNABLE, *EMULATED):
            found_TN = _native.accumulators(isa, **asked.matrix.arguments, x_TK=x_TK)
            np.testing.assert_array_equal(found_TN, expected_TN)
        return
    rows_TN = [
        _native.matmul("scalar", **asked.matrix.arguments, x_TK=x_TK[t : t + 1]) for t in range(tokens)
    ]
    for isa in RUNNABLE:
        if isa in ("amx", "avx512-bf16") and values == "bf16" and tokens > 4:
            continue
        found_TN = _native.matmul(isa, **asked.matrix.arguments, x_TK=x_TK)
        np.testing.assert_array_equal(found_TN, np.concatenate(rows_TN))


@pytest.mark.parametrize("values", ["f32", "bf16"])
def test_many_rows_and_tokens_that_skip_zeros_have_the_same_bits(values: str) -> None:
    """More rows than wait for the next run of inputs, and tiles of tokens of which the last is not full."""
    rng = np.random.default_rng(3)
    asked = problem(values, "sparse", (600, 421), 0.85, rng)
    x_TK = rng.standard_normal((90, 421)).astype(np.float32)
    expected_TN = _native.matmul("scalar", **asked.matrix.arguments, x_TK=x_TK)
    for isa in RUNNABLE:
        if isa not in ("amx", "avx512-bf16") or values != "bf16":
            found_TN = _native.matmul(isa, **asked.matrix.arguments, x_TK=x_TK)
            np.testing.assert_array_equal(found_TN, expected_TN)


@pytest.mark.skipif("avx512-bf16" not in RUNNABLE, reason="no avx512-bf16 here")
@pytest.mark.parametrize(("sparsity", "same"), [(0.6, False), (0.97, True)])
def test_products_of_pairs_leave_many_zeros_to_those_that_skip_them(sparsity: float, same: bool) -> None:
    rng = np.random.default_rng(4)
    asked = problem("bf16", "sparse", (40, 515), sparsity, rng)
    x_TK = rng.standard_normal((200, 515)).astype(np.float32)
    found_TN, exact_TN = (
        _native.matmul(isa, **asked.matrix.arguments, x_TK=x_TK) for isa in ("avx512-bf16", "avx512")
    )
    assert np.array_equal(found_TN, exact_TN) == same


@pytest.mark.skipif("avx512-bf16" not in RUNNABLE, reason="no avx512-bf16 here")
@pytest.mark.parametrize("storage", ["dense", "sparse"])
def test_products_of_pairs_at_the_ends_of_bfloat16(storage: str) -> None:
    """Infinity and what is no number stay so; halves round to even; what is below 2^-126 counts as zero."""
    w_NK = np.full((17, 3), 0x3F80, np.uint16)  # 1
    w_NK[1] = 0x0040  # 2^-127
    matrix = make_matrix("bf16", storage, w_NK, np.ones(17))
    x_TK = np.zeros((9, 3), np.float32)
    x_TK[:7, 1] = np.inf, -np.inf, np.nan, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**-127, 3e38
    x_TK[7] = np.finfo(np.float32).max, 0, np.inf
    x_TK[8] = np.inf, -np.inf, 0
    y_TN = _native.matmul("avx512-bf16", **matrix.arguments, x_TK=x_TK)
    expected = [
        np.inf,
        -np.inf,
        np.nan,
        1,
        1 + 2.0**-6,
        0,
        to_float32(np.array([0x7F62], np.uint16), "BF16")[0],
    ]
    np.testing.assert_array_equal(y_TN[:, 0], [*expected, np.inf, np.nan])
    np.testing.assert_array_equal(y_TN[:, 2:], np.repeat(y_TN[:, :1], 15, axis=1))
    np.testing.assert_array_equal(y_TN[3:7, 1], 0)


@pytest.mark.parametrize("values", ["i8", "i4"])
def test_extreme_sums_do_not_saturate(values: str) -> None:
    lowest = -128 if values == "i8" else -8
    w_NK, multiplier_NG = np.full((16, 8192), lowest, np.int8), np.full((16, 64), 16, np.uint8)
    found = make_matrix(values, "sparse", w_NK, np.ones(16), multiplier_NG)
    for tokens in (1, 5):
        x_TK = np.full((tokens, 8192), -127.5, np.float32)
        for isa in (*RUNNABLE, *EMULATED):
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
            found = _native.rmsnorm(isa, x_TD, weight_D, 1e-2)[0], _native.swiglu(isa, x_TD, up_TD)[0]
            np.testing.assert_allclose(found[0], norm, rtol=1e-6)
            np.testing.assert_allclose(found[1], silu, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("isa", ISAS)
def test_layernorm_equals_torch_in_float64(isa: str) -> None:
    """Of ordinary rows, of rows far from zero, of one number, and of equal numbers (nothing but the bias)."""
    rng = np.random.default_rng(2)
    for width, shift, eps in itertools.product((1, 2, 15, 16, 17, 37, 768, 2053), (0, -300), (1e-12, 1e-2)):
        x_TD = (shift + 5 * rng.standard_normal((4, width))).astype(np.float32)
        x_TD[3] = x_TD[3, 0]
        weight_D, bias_D = rng.standard_normal((2, width)).astype(np.float32)
        found_TD, largest_T1 = _native.layernorm(isa, x_TD, weight_D, bias_D, eps)
        x, weight, bias = (torch.from_numpy(array).double() for array in (x_TD, weight_D, bias_D))
        expected_TD = torch.nn.functional.layer_norm(x, (width,), weight, bias, eps).numpy()
        np.testing.assert_allclose(found_TD, expected_TD, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(found_TD[3], bias_D)
        np.testing.assert_array_equal(largest_T1, np.abs(found_TD).max(axis=1, keepdims=True))


@pytest.mark.parametrize("isa", ISAS)
def test_gelu_equals_torch_in_float64(isa: str) -> None:
    """Every 1021st float32, more of those from -14 to 14."""
    every = np.arange(0, 1 << 32, 1021, dtype=np.uint64).astype(np.uint32).view(np.float32)
    every = every[np.isfinite(every)]
    x = np.concatenate([every, np.linspace(-14, 14, 1 << 20, dtype=np.float32)])
    y_1N, largest_11 = _native.gelu(isa, x[None])
    wide = torch.from_numpy(x).double()
    expected = (wide / 2 * torch.special.erfc(-wide * 0.5**0.5)).numpy()  # erfc(-z) is 1 + erf(z)
    assert (np.abs(y_1N[0] - expected) <= 1.6e-7 * np.maximum(1, np.abs(x))).all()
    tail = (x < -4) & (x > -14)
    np.testing.assert_allclose(y_1N[0, tail], expected[tail], rtol=0, atol=1e-8)
    assert largest_11 == np.abs(y_1N).max()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [1, 5, 8, 16, 21])
def test_gelu_at_the_ends_of_float32(isa: str, width: int) -> None:
    found = {x: _native.gelu(isa, np.full((1, width), x, np.float32)) for x in (0.0, np.inf, -np.inf, np.nan)}
    assert (found[0.0][0] == 0).all() and not np.signbit(found[0.0][0]).any()
    assert np.signbit(_native.gelu(isa, np.full((1, width), -0.0, np.float32))[0]).all()
    assert (found[np.inf][0] == np.inf).all() and found[np.inf][1] == np.inf
    assert (np.abs(found[-np.inf][0]) < 1e-8).all()
    assert np.isnan(found[np.nan][0]).all() and found[np.nan][1] == 0


@pytest.mark.parametrize("isa", ISAS)
def test_geglu_is_gelu_of_the_gate_times_the_rest(isa: str) -> None:
    for width in (1, 7, 16, 37, 300):
        gate_TN, up_TN = 3 * np.random.default_rng(0).standard_normal((2, 3, width)).astype(np.float32)
        found_TN, largest_T1 = _native.geglu(isa, gate_TN, up_TN)
        np.testing.assert_array_equal(found_TN, _native.gelu(isa, gate_TN)[0] * up_TN)
        np.testing.assert_array_equal(largest_T1, np.abs(found_TN).max(axis=1, keepdims=True))


def test_every_family_of_the_table_is_tested() -> None:
    assert {row["family"] for row in ROWS} == {*VECTORS, *TESTED_APART, *PROBES}


@pytest.mark.parametrize(
    "row",
    [row for row in ROWS if row["family"] in VECTORS and row["isa"] in RUNNABLE],
    ids=lambda row: f"{row['family']}-{row['isa']}",
)
@pytest.mark.parametrize("spread", [0, 30])
def test_vectors_have_the_bits_of_scalar(row: dict[str, str], spread: int) -> None:
    """Every length to 70 and some long ones; magnitudes near 1, and from 1e-30 to 1e15; some zeros."""
    rng, run = np.random.default_rng(7), VECTORS[row["family"]]
    for width in (*range(1, 71), 127, 2048, 2053, 11008):
        a, b = rng.standard_normal((2, 1, width)) * 10 ** rng.uniform(-spread, spread / 2, (2, 1, width))
        a[rng.random((1, width)) < 0.05] = 0
        a, b = a.astype(np.float32), b.astype(np.float32)
        np.testing.assert_equal(as_bits(run(row["isa"], a, b)), as_bits(run("scalar", a, b)))


def as_bits(found: object) -> list[bytes]:
    return [np.asarray(array).tobytes() for array in (found if isinstance(found, tuple) else (found,))]


def test_bandwidth_reads_every_byte_in_some_time() -> None:
    rates = _native.read_bandwidth(2, 1024, np.ones(4 << 20, np.uint8), 3)
    assert len(rates) == 3 and min(rates) > 1e6


def test_unknown_and_missing_levels_are_errors() -> None:
    found = make_matrix("i8", "dense", np.ones((1, 1), np.int8), np.ones(1))
    x_TK = np.ones((1, 1), np.float32)
    with pytest.raises(ConfigError, match="sse9"):
        _native.matmul("sse9", **found.arguments, x_TK=x_TK)
    for isa in set(LEVELS) - set(RUNNABLE):
        with pytest.raises(UnsupportedError, match=isa):
            _native.matmul(isa, **found.arguments, x_TK=x_TK)


@pytest.mark.parametrize("cap", ["scalar", "avx2", "avx512", "avx512-bf16", "avx9"])
def test_the_environment_caps_the_level(cap: str) -> None:
    code = "from gossamer import _native; print(_native.isa())"
    environment = os.environ | {"GOSSAMER_ISA": cap, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if cap == "avx9":
        assert ran.returncode != 0 and "ConfigError: found instruction set 'avx9'" in ran.stderr
    else:
        assert ran.stdout.strip() in LEVELS[: LEVELS.index(cap) + 1]
