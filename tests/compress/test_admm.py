"""ADMM's masks and refits against exact least squares, and against SparseGPT."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.compress.admm import admm, refit
from gossamer.compress.hessian import dampened, inverse_factor
from gossamer.compress.magnitude import magnitude
from gossamer.compress.sparsegpt import sparsegpt

DAMPENING = 0.01


def problem(seed: int, num_outputs: int, num_inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [N, K], a Hessian of correlated inputs of very different size, and it dampened; float64."""
    generator = torch.Generator().manual_seed(seed)
    mix_KK = torch.randn(num_inputs, num_inputs, generator=generator, dtype=torch.float64)
    size_K = torch.rand(num_inputs, generator=generator, dtype=torch.float64) * 3 + 0.1
    x_TK = (torch.randn(400, num_inputs, generator=generator, dtype=torch.float64) @ mix_KK) * size_K
    w_NK = torch.randn(num_outputs, num_inputs, generator=generator, dtype=torch.float64)
    H_KK = 2 / 400 * x_TK.T @ x_TK
    return w_NK, H_KK, H_KK + DAMPENING * H_KK.diagonal().mean() * torch.eye(num_inputs)


def best_for_mask(target_NK: Tensor, H_KK: Tensor, kept_NK: Tensor) -> Tensor:
    """Exact least squares, row by row."""
    best_NK, h, goal = np.zeros(target_NK.shape), H_KK.numpy(), target_NK.numpy()
    for row, kept, best in zip(goal, kept_NK.numpy(), best_NK, strict=True):
        best[kept] = np.linalg.solve(h[np.ix_(kept, kept)], h[kept] @ row)
    return torch.from_numpy(best_NK)


def cost(delta_NK: Tensor, H_KK: Tensor) -> float:
    return ((delta_NK @ H_KK) * delta_NK).sum().item()


@pytest.mark.parametrize("seed", range(3))
def test_refit_comes_to_the_least_squares_solution_for_the_mask(seed: int) -> None:
    w_NK, _, H_KK = problem(seed, 6, 24)
    kept_NK = torch.rand(6, 24, generator=torch.Generator().manual_seed(seed)) < 0.5
    kept_NK[0] = False
    found = refit(w_NK, kept_NK, H_KK, w_NK, steps=200)
    torch.testing.assert_close(found, best_for_mask(w_NK, H_KK, kept_NK), rtol=0, atol=1e-8)
    assert (found[~kept_NK] == 0).all()


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
@pytest.mark.parametrize("seed", range(5))
def test_better_than_sparsegpt_and_near_the_best_for_its_mask(seed: int, sparsity: float) -> None:
    w_NK, H_KK, dampened_KK = problem(seed, 32, 48)
    pruned_NK = admm(w_NK, dampened_KK, sparsity, target_NK=w_NK)
    found = cost(pruned_NK - w_NK, dampened_KK)
    best_NK = best_for_mask(w_NK, dampened_KK, pruned_NK != 0)
    assert found <= 1.1 * cost(best_NK - w_NK, dampened_KK)
    other_NK = sparsegpt(w_NK, inverse_factor(H_KK, DAMPENING), sparsity)
    assert found < 0.8 * cost(other_NK - w_NK, dampened_KK)


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
    w_NK, _, H_KK = problem(seed, num_outputs, num_inputs)
    w_NK = magnitude(w_NK, before)
    w_NK[w_NK == 0] = -0.0
    target_NK = w_NK + torch.randn(w_NK.shape, generator=torch.Generator().manual_seed(seed))
    pruned_NK = admm(w_NK, H_KK, before + extra, target_NK=target_NK)
    assert (pruned_NK[w_NK == 0] == 0).all()
    zeros = max(round((before + extra) * w_NK.numel()), int((w_NK == 0).sum()))
    assert int((pruned_NK == 0).sum()) == zeros


def test_inputs_that_are_always_zero_are_no_obstacle() -> None:
    """As `prune` does it: what reads them is zero when it comes in."""
    w_NK, H_KK, _ = problem(0, 6, 20)
    H_KK[3], H_KK[:, 3] = 0, 0
    w_NK[:, 3] = 0
    pruned_NK = admm(w_NK, dampened(H_KK, 0.0), 0.5, target_NK=w_NK)
    assert (pruned_NK[:, 3] == 0).all() and int((pruned_NK == 0).sum()) == 60
