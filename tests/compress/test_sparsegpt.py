"""SparseGPT against brute-force optimal brain surgery and exact least squares on small matrices."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.compress.gptq import hessian, reconstruction_error
from gossamer.compress.hessian import inverse_factor
from gossamer.compress.magnitude import magnitude
from gossamer.compress.sparsegpt import smallest, sparsegpt, zeros_per_block
from gossamer.errors import CalibrationError

DAMPENING = 0.01


def problem(seed: int, rows: int, inputs: int, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """Weights [N, K] and the Hessian [K, K] of correlated inputs of very different size, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix_KK = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    size_K = torch.rand(inputs, generator=generator, dtype=torch.float64) * 3 + 0.1
    x_TK = (torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mix_KK) * size_K
    w_NK = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    return w_NK, 2 / tokens * x_TK.T @ x_TK


def dampened(H_KK: Tensor) -> np.ndarray:
    return H_KK.numpy() + DAMPENING * H_KK.diagonal().mean().item() * np.eye(len(H_KK))


def optimal_brain_surgeon(w_NK: np.ndarray, H_KK: np.ndarray, pruned_NK: np.ndarray) -> np.ndarray:
    """Zero the pruned weights of each row, left to right; what is left of H is inverted every time."""
    result = w_NK.copy()
    for row, pruned in zip(result, pruned_NK, strict=True):
        for j in np.flatnonzero(pruned):
            inverse = np.linalg.inv(H_KK[j:, j:])
            row[j:] -= row[j] / inverse[0, 0] * inverse[:, 0]
            row[j] = 0
    return result


def least_squares(w_NK: np.ndarray, H_KK: np.ndarray, pruned_NK: np.ndarray) -> np.ndarray:
    """The best weights with these zeros, row by row: no solver that keeps the mask can do better."""
    result = np.zeros_like(w_NK)
    for row, kept, best in zip(w_NK, ~pruned_NK, result, strict=True):
        best[kept] = np.linalg.solve(H_KK[np.ix_(kept, kept)], H_KK[kept] @ row)
    return result


def cost(w_NK: np.ndarray, changed_NK: np.ndarray, H_KK: np.ndarray) -> float:
    delta = changed_NK - w_NK
    return float(np.einsum("nk,kj,nj->", delta, H_KK, delta))


@pytest.mark.parametrize("block_size", [1, 5, 128])
@pytest.mark.parametrize("seed", range(4))
def test_equals_brute_force_optimal_brain_surgery_for_its_mask(seed: int, block_size: int) -> None:
    w_NK, H_KK = problem(seed, 7, 24)
    pruned = sparsegpt(w_NK, inverse_factor(H_KK, DAMPENING), 0.5, block_size=block_size).numpy()
    expected = optimal_brain_surgeon(w_NK.numpy(), dampened(H_KK), pruned == 0)
    np.testing.assert_allclose(pruned, expected, rtol=0, atol=1e-9)


def test_first_block_prunes_the_weights_of_least_saliency() -> None:
    w_NK, H_KK = problem(3, 6, 16)
    pruned = sparsegpt(w_NK, inverse_factor(H_KK, DAMPENING), 0.25, block_size=16) == 0
    saliency_NK = np.empty((6, 16))
    for j in range(16):
        saliency_NK[:, j] = w_NK.numpy()[:, j] ** 2 / np.linalg.inv(dampened(H_KK)[j:, j:])[0, 0]
    chosen = np.zeros(96, dtype=bool)
    chosen[np.argsort(saliency_NK, axis=None)[:24]] = True
    np.testing.assert_array_equal(pruned.numpy(), chosen.reshape(6, 16))


@pytest.mark.parametrize(("sparsity", "bound"), [(0.25, 2.25), (0.5, 1.75), (0.7, 1.4)])
@pytest.mark.parametrize("seed", range(5))
def test_between_the_optimum_and_magnitude_pruning(seed: int, sparsity: float, bound: float) -> None:
    """At most `bound` times the error of exact least squares on the same mask; 0.6 of magnitude pruning's."""
    w_NK, H_KK = problem(seed, 16, 48)
    w, H = w_NK.numpy(), dampened(H_KK)
    pruned = sparsegpt(w_NK, inverse_factor(H_KK, DAMPENING), sparsity, block_size=16).numpy()
    found = cost(w, pruned, H)
    assert found <= bound * cost(w, least_squares(w, H, pruned == 0), H)
    assert found < 0.6 * cost(w, magnitude(w_NK, sparsity).numpy(), H)


def test_near_the_best_of_all_masks() -> None:
    """One row of 8 inputs, half pruned, against the best of all 70 masks with exact least squares."""
    ours, magnitudes = [], []
    for seed in range(20):
        w_NK, H_KK = problem(seed, 1, 8)
        w, H = w_NK.numpy(), dampened(H_KK)
        masks = (np.isin(np.arange(8), chosen)[None] for chosen in itertools.combinations(range(8), 4))
        best = min(cost(w, least_squares(w, H, mask), H) for mask in masks)
        ours.append(cost(w, sparsegpt(w_NK, inverse_factor(H_KK, DAMPENING), 0.5).numpy(), H) / best)
        magnitudes.append(cost(w, magnitude(w_NK, 0.5).numpy(), H) / best)
    assert min(ours) >= 1 - 1e-9 and max(ours) <= 7
    assert np.median(ours) <= 2 and np.median(magnitudes) >= 2 * np.median(ours)


def test_reconstruction_error_is_the_share_of_the_outputs_that_is_lost() -> None:
    w_NK, changed_NK = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    x_TK = torch.randn(300, 12, dtype=torch.float64)
    expected = ((x_TK @ (changed_NK - w_NK).T) ** 2).sum() / ((x_TK @ w_NK.T) ** 2).sum()
    found = reconstruction_error(w_NK, changed_NK, 2 / 300 * x_TK.T @ x_TK)
    assert found == pytest.approx(expected.item(), rel=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 9),
    inputs=st.integers(1, 40),
    before=st.floats(0, 0.6),
    extra=st.floats(0, 0.35),
    block_size=st.sampled_from([1, 7, 16, 128]),
)
def test_keeps_zeros_and_counts_exactly(
    seed: int, rows: int, inputs: int, before: float, extra: float, block_size: int
) -> None:
    w_NK, H_KK = problem(seed, rows, inputs)
    w_NK[:, : inputs // 2] = magnitude(w_NK[:, : inputs // 2], before)  # unevenly spread over the blocks
    w_NK[w_NK == 0] = -0.0
    zeros = w_NK == 0
    sparsity = before + extra
    pruned = sparsegpt(w_NK, inverse_factor(H_KK, DAMPENING), sparsity, block_size=block_size)
    assert (pruned[zeros] == 0).all()
    assert int((pruned == 0).sum()) == max(round(sparsity * w_NK.numel()), int(zeros.sum()))


def test_quotas_are_even_except_where_zeros_are_already() -> None:
    zeros_KN = torch.zeros(12, 10, dtype=torch.bool)
    zeros_KN[4:8] = True
    assert zeros_per_block(zeros_KN, 0.5, 4) == [10, 40, 10]
    assert zeros_per_block(zeros_KN, 0.2, 4) == [0, 40, 0]


def test_dead_inputs_are_zeroed_and_need_no_dampening() -> None:
    w_NK, H_KK = problem(0, 6, 20)
    H_KK[3], H_KK[:, 3] = 0, 0
    factor = inverse_factor(H_KK, 0.0)
    pruned = sparsegpt(w_NK, factor, 0.5)
    assert (pruned[:, 3] == 0).all() and int((pruned == 0).sum()) == 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_hessian_takes_the_least_dampening_that_helps(dtype: torch.dtype) -> None:
    x_TK = torch.randn(10, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    H_KK = x_TK.T @ x_TK
    factor, expected = inverse_factor(H_KK, 0.0), inverse_factor(H_KK, 0.01)
    assert factor.dampening_frac == expected.dampening_frac == 0.01
    assert torch.equal(factor.u_KK, expected.u_KK)
    below = H_KK - 0.05 * H_KK.diagonal().mean() * torch.eye(32, dtype=dtype)
    assert inverse_factor(below, 0.01).dampening_frac == 0.1


def test_a_hessian_that_no_dampening_helps_is_an_error_that_names_the_layer() -> None:
    with pytest.raises(
        CalibrationError, match=r"layers\.7\.mlp\.down_proj.* of 0\.02, 0\.2, 2, 20:.*samples"
    ):
        inverse_factor(-torch.eye(8), 0.02, name="model.layers.7.mlp.down_proj")


def test_infinite_activations_are_an_error() -> None:
    with pytest.raises(CalibrationError, match="infinite"):
        inverse_factor(hessian([torch.full((4, 3), 1e30)]), name="q_proj")


def test_factor_is_the_upper_cholesky_factor_of_the_inverse() -> None:
    _, H_KK = problem(1, 1, 30)
    expected = torch.linalg.cholesky(torch.linalg.inv(torch.from_numpy(dampened(H_KK))), upper=True)
    torch.testing.assert_close(inverse_factor(H_KK, DAMPENING).u_KK, expected, rtol=1e-9, atol=1e-9)


def test_hessian_of_batches_is_that_of_all_tokens() -> None:
    x_TK = torch.randn(60, 9)
    expected = 2 / 60 * x_TK.double().T @ x_TK.double()
    found = hessian([x_TK[:10].view(2, 5, 9), x_TK[10:]])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_target_does_not_bring_zeros_back() -> None:
    w_NK, H_KK = problem(2, 8, 30)
    w_NK = magnitude(w_NK, 0.4)
    target_NK = w_NK + torch.randn(8, 30, dtype=torch.float64)
    pruned = sparsegpt(w_NK, inverse_factor(H_KK), 0.6, block_size=8, target_NK=target_NK)
    assert (pruned[w_NK == 0] == 0).all() and int((pruned == 0).sum()) == 144


def test_smallest_breaks_ties_to_an_exact_count() -> None:
    assert int(smallest(torch.zeros(4, 5), 7).sum()) == 7
