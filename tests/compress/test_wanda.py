"""Wanda's masks against the paper's formula, written out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.compress.magnitude import magnitude
from gossamer.compress.pattern import Groups
from gossamer.compress.wanda import wanda
from gossamer.errors import CalibrationError


def problem(seed: int, num_outputs: int, num_inputs: int) -> tuple[Tensor, Tensor]:
    """Weights [N, K] and inputs [T, K] of very different size."""
    generator = torch.Generator().manual_seed(seed)
    size_K = torch.rand(num_inputs, generator=generator) * 3 + 0.1
    x_TK = torch.randn(50, num_inputs, generator=generator) * size_K
    return torch.randn(num_outputs, num_inputs, generator=generator), x_TK


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("seed", range(5))
def test_masks_are_those_of_the_paper(seed: int, sparsity: float) -> None:
    w_NK, x_TK = problem(seed, 12, 40)
    expected = w_NK.numpy().copy()
    metric = np.abs(expected) * np.sqrt((x_TK.numpy().astype(np.float64) ** 2).sum(0))
    smallest = np.argsort(metric, axis=1)[:, : int(40 * sparsity)]
    np.put_along_axis(expected, smallest, 0.0, axis=1)
    np.testing.assert_array_equal(wanda(w_NK, x_TK.norm(dim=0), sparsity).numpy(), expected)


@pytest.mark.parametrize(("kept", "size"), [(2, 4), (4, 8), (1, 4), (5, 20)])
def test_patterns_are_those_of_the_paper(kept: int, size: int) -> None:
    """In each group of M along the input, the M - N smallest go."""
    w_NK, x_TK = problem(kept, 12, 40)
    expected, norm_K = w_NK.numpy().copy(), x_TK.norm(dim=0)
    metric = np.abs(expected) * norm_K.numpy()
    for start in range(0, 40, size):
        smallest = np.argsort(metric[:, start : start + size], axis=1)[:, : size - kept]
        np.put_along_axis(expected[:, start : start + size], smallest, 0.0, axis=1)
    pattern = Groups(kept, size)
    np.testing.assert_array_equal(wanda(w_NK, norm_K, pattern.sparsity, pattern=pattern).numpy(), expected)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    num_outputs=st.integers(1, 9),
    num_inputs=st.integers(1, 40),
    before=st.floats(0, 0.6),
    extra=st.floats(0, 0.35),
)
def test_keeps_zeros_and_counts_exactly(
    seed: int, num_outputs: int, num_inputs: int, before: float, extra: float
) -> None:
    w_NK, x_TK = problem(seed, num_outputs, num_inputs)
    w_NK = magnitude(w_NK, before)
    w_NK[w_NK == 0] = -0.0
    pruned_NK = wanda(w_NK, x_TK.norm(dim=0), before + extra)
    assert (pruned_NK[w_NK == 0] == 0).all()
    kept_NK = pruned_NK != 0
    assert torch.equal(pruned_NK[kept_NK], w_NK[kept_NK])
    zeros = max(round((before + extra) * w_NK.numel()), int((w_NK == 0).sum()))
    assert int((pruned_NK == 0).sum()) == zeros


def test_inputs_that_are_always_zero_go_first() -> None:
    w_NK, x_TK = problem(0, 6, 20)
    x_TK[:, 3] = 0
    pruned_NK = wanda(w_NK, x_TK.norm(dim=0), 0.5)
    assert (pruned_NK[:, 3] == 0).all() and int((pruned_NK == 0).sum()) == 60


def test_infinite_activations_are_an_error_that_names_the_layer() -> None:
    w_NK, x_TK = problem(0, 6, 20)
    x_TK[3, 3] = torch.inf
    with pytest.raises(CalibrationError, match=r"layers\.7\.mlp\.down_proj.*infinite"):
        wanda(w_NK, x_TK.norm(dim=0), 0.5, name="layers.7.mlp.down_proj")
