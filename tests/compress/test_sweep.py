"""The native sweep of SparseGPT and GPTQ: every level against torch's loop in float64, and bad shapes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gossamer import _native
from gossamer.compress.hessian import fix_rows
from gossamer.errors import EngineError

RUNNABLE = tuple(level for level, runs in _native.levels().items() if runs)
ISAS = [row["isa"] for row in _native.kernels() if row["family"] == "sweep" and row["isa"] in RUNNABLE]
LARGEST = 60  # whole numbers of a scale; weights are up to 100 or 400 of them, so that some are clamped
SHAPES = [(1, 1), (3, 31), (5, 33), (64, 100), (128, 257)]


def block(inputs: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, a part of an upper factor (so its rows are not contiguous), marks and scales; float32."""
    generator = torch.Generator().manual_seed(seed)
    w_BN = torch.randn(inputs, outputs, generator=generator)
    u_KK = 0.1 * torch.randn(inputs + 7, inputs + 7, generator=generator).triu() + torch.eye(inputs + 7)
    kept_BN = torch.rand(inputs, outputs, generator=generator) > 0.5
    scale_N = torch.rand(outputs, generator=generator) / 50 + 0.01
    return w_BN, u_KK[2 : 2 + inputs, 2 : 2 + inputs], kept_BN, scale_N


def swept(isa: str, given: tuple[Any, ...], num_threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
    w_BN, u_BB, kept_BN, scale_N = given
    found, error = w_BN.clone().numpy(), np.full(tuple(w_BN.shape), np.nan, np.float32)
    scales = None if scale_N is None else scale_N.numpy()
    more: dict[str, Any] = {"largest": LARGEST, "num_threads": num_threads, "isa": isa}
    _native.sweep(found, u_BB.numpy(), kept_BN.numpy(), scales, error, **more)
    return found, error


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("isa", ISAS)
def test_every_level_equals_torch_in_float64(isa: str, shape: tuple[int, int], rounded: bool) -> None:
    w_BN, u_BB, kept_BN, scale_N = block(*shape)
    scales = scale_N if rounded else None
    found, error = swept(isa, (w_BN, u_BB, kept_BN, scales))
    expected = w_BN.double()
    expected_error = fix_rows(
        expected, u_BB.double(), kept_BN, scale_N.double() if rounded else None, LARGEST
    )
    assert not found[~kept_BN.numpy()].any()
    steps = scale_N.numpy()[None] if rounded else 1.0
    # A weight that lies between two whole numbers may go either way, and takes those behind it along.
    off = np.abs(found - expected.numpy()) > 1e-4 * steps
    assert off.any(axis=0).mean() <= (0.05 if rounded else 0)
    same = ~off.any(axis=0)
    np.testing.assert_allclose(error[:, same], expected_error.numpy()[:, same], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_levels_and_threads_give_the_same_bits(shape: tuple[int, int], rounded: bool) -> None:
    w_BN, u_BB, kept_BN, scale_N = block(*shape)
    given = (w_BN, u_BB, kept_BN, scale_N if rounded else None)
    runs = [swept(isa, given) for isa in ISAS] + [swept(ISAS[-1], given, threads) for threads in (2, 3)]
    for run in runs[1:]:
        for array, expected in zip(run, runs[0], strict=True):
            np.testing.assert_array_equal(array, expected)


def test_not_a_number_stays_one_and_touches_no_other_output() -> None:
    w_BN, u_BB, _, scale_N = block(8, 40)
    clean, _ = swept(ISAS[-1], (w_BN, u_BB, torch.ones(8, 40, dtype=torch.bool), scale_N))
    w_BN[3, 17] = torch.nan
    found, _ = swept(ISAS[-1], (w_BN, u_BB, torch.ones(8, 40, dtype=torch.bool), scale_N))
    assert np.isnan(found[3:, 17]).all()
    others = np.arange(40) != 17
    np.testing.assert_array_equal(found[:, others], clean[:, others])


def test_shapes_that_do_not_fit_are_errors() -> None:
    w, u, kept, scale = (tensor.contiguous().numpy() for tensor in block(4, 9))
    error = np.empty_like(w)
    for wrong in (
        (w, u[:3], kept, scale, error),
        (w, u, kept[:3], scale, error),
        (w, u, kept, scale[:8].copy(), error),
        (w, u, kept, scale, error[:3]),
        (w, u.T, kept, scale, error),
        (w[:0], u[:0, :0], kept[:0], scale, error[:0]),
    ):
        with pytest.raises(EngineError, match="must fit the weights"):
            _native.sweep(*wrong, largest=LARGEST, num_threads=1)
