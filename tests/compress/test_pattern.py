"""N:M patterns and blocks in SparseGPT, ADMM and magnitude pruning; `test_wanda.py` has Wanda's."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.compress.admm import admm
from gossamer.compress.hessian import dampened, inverse_factor
from gossamer.compress.magnitude import magnitude
from gossamer.compress.pattern import Blocks, Groups, parse_pattern
from gossamer.compress.sparsegpt import sparsegpt
from gossamer.errors import ConfigError

Method = Callable[[Tensor, Tensor, Groups], Tensor]
DAMPENING = 0.01


def problem(seed: int, num_outputs: int, num_inputs: int) -> tuple[Tensor, Tensor]:
    """Weights [N, K] and a Hessian of correlated inputs of very different size, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix_KK = torch.randn(num_inputs, num_inputs, generator=generator, dtype=torch.float64)
    size_K = torch.rand(num_inputs, generator=generator, dtype=torch.float64) * 3 + 0.1
    x_TK = (torch.randn(400, num_inputs, generator=generator, dtype=torch.float64) @ mix_KK) * size_K
    w_NK = torch.randn(num_outputs, num_inputs, generator=generator, dtype=torch.float64)
    return w_NK, 2 / 400 * x_TK.T @ x_TK


def by_sparsegpt(w_NK: Tensor, H_KK: Tensor, pattern: Groups) -> Tensor:
    return sparsegpt(w_NK, inverse_factor(H_KK, DAMPENING), pattern.sparsity, block_size=16, pattern=pattern)


def by_admm(w_NK: Tensor, H_KK: Tensor, pattern: Groups) -> Tensor:
    return admm(w_NK, dampened(H_KK, DAMPENING), pattern.sparsity, target_NK=w_NK, pattern=pattern)


def by_magnitude(w_NK: Tensor, H_KK: Tensor, pattern: Groups) -> Tensor:
    return magnitude(w_NK, pattern.sparsity, pattern=pattern)


def papers_sparsegpt(w_NK: Tensor, H_KK: Tensor, pattern: Groups) -> Tensor:
    """Column by column over the whole matrix: at a group's first column its zeros are chosen."""
    w, u = w_NK.numpy().copy(), np.linalg.cholesky(np.linalg.inv(dampened(H_KK, DAMPENING).numpy())).T
    pruned = np.zeros(w.shape, dtype=bool)
    for i in range(w.shape[1]):
        if i % pattern.size == 0:
            group = slice(i, i + pattern.size)
            saliency = w[:, group] ** 2 / np.diag(u)[group] ** 2
            smallest = np.argsort(saliency, axis=1)[:, : pattern.size - pattern.kept]
            np.put_along_axis(pruned[:, group], smallest, True, axis=1)
        fixed = np.where(pruned[:, i], 0, w[:, i])
        w[:, i:] -= np.outer((w[:, i] - fixed) / u[i, i], u[i, i:])
        w[:, i] = fixed
    return torch.from_numpy(w)


def cost(delta_NK: Tensor, H_KK: Tensor) -> float:
    return ((delta_NK @ H_KK) * delta_NK).sum().item()


@pytest.mark.parametrize("pattern", [Groups(2, 4), Groups(4, 8), Groups(3, 4), Groups(12, 48)])
@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_is_the_papers(seed: int, pattern: Groups) -> None:
    w_NK, H_KK = problem(seed, 16, 48)
    found, expected = by_sparsegpt(w_NK, H_KK, pattern), papers_sparsegpt(w_NK, H_KK, pattern)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pattern", [Groups(2, 4), Groups(4, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_admm_is_better_than_sparsegpt_and_that_than_magnitude(seed: int, pattern: Groups) -> None:
    w_NK, H_KK = problem(seed, 32, 48)
    dampened_KK = dampened(H_KK, DAMPENING)
    errors = [
        cost(method(w_NK, H_KK, pattern) - w_NK, dampened_KK)
        for method in (by_admm, by_sparsegpt, by_magnitude)
    ]
    assert errors[0] < 0.95 * errors[1] and errors[1] < 0.6 * errors[2]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    num_outputs=st.integers(1, 9),
    num_groups=st.integers(1, 12),
    pattern=st.sampled_from([Groups(2, 4), Groups(4, 8), Groups(1, 4), Groups(1, 2)]),
    before=st.floats(0, 0.7),
    method=st.sampled_from([by_sparsegpt, by_admm, by_magnitude]),
)
def test_zeros_stay_and_groups_have_exactly_theirs(
    seed: int, num_outputs: int, num_groups: int, pattern: Groups, before: float, method: Method
) -> None:
    w_NK, H_KK = problem(seed, num_outputs, num_groups * pattern.size)
    w_NK = magnitude(w_NK, before)
    w_NK[w_NK == 0] = -0.0
    pruned_NK = method(w_NK, H_KK, pattern)
    assert (pruned_NK[w_NK == 0] == 0).all()
    came_in, found = ((w == 0).reshape(-1, pattern.size).sum(1) for w in (w_NK, pruned_NK))
    assert torch.equal(found, came_in.clamp_min(pattern.size - pattern.kept))


def test_dead_inputs_count_among_the_zeros_of_their_group() -> None:
    w_NK, H_KK = problem(0, 6, 20)
    H_KK[3], H_KK[:, 3] = 0, 0
    pruned_NK = by_sparsegpt(w_NK, H_KK, Groups(2, 4))
    assert (pruned_NK[:, 3] == 0).all() and int((pruned_NK == 0).sum()) == 60


def test_float32_takes_the_native_sweep_and_comes_to_the_same() -> None:
    w_NK, H_KK = problem(1, 40, 64)
    found = by_sparsegpt(w_NK.float(), H_KK.float(), Groups(2, 4))
    assert int((found == 0).sum()) == 40 * 32
    expected = by_sparsegpt(w_NK, H_KK, Groups(2, 4))
    errors = [cost(w.double() - w_NK, dampened(H_KK, DAMPENING)) for w in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize(
    "text", ["2", "2:", "4:4", "0:4", "5:4", "-2:4", "2:4:8", "two:four", "", "2.0:4", "1x1", "1x", "2x4"]
)
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--pattern.*N:M"):
        parse_pattern(text)


def test_the_first_number_is_what_stays() -> None:
    assert parse_pattern("16:64") == Groups(16, 64) and Groups(16, 64).sparsity == 0.75
    assert parse_pattern("unstructured") is None


def exact_blocks(w_NK: Tensor, H_KK: Tensor, pruned_NK: Tensor) -> Tensor:
    """The best weights with these zeros, row by row: H restricted to what is kept, solved."""
    found_NK = torch.zeros_like(w_NK)
    for row, (w_K, zeros_K) in enumerate(zip(w_NK, pruned_NK, strict=True)):
        kept = (~zeros_K).nonzero().squeeze(1)
        found_NK[row, kept] = torch.linalg.solve(H_KK[kept][:, kept], (H_KK @ w_K)[kept])
    return found_NK


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("method", ["sparsegpt", "admm", "magnitude"])
def test_blocks_go_as_one_and_as_many_as_asked_for(method: str, size: int) -> None:
    w_NK, H_KK = problem(3, 24, 48)
    w_NK[2, : 2 * size] = 0  # two whole blocks
    w_NK[5, ::size] = 0  # and blocks with a zero in them
    pattern, sparsity = Blocks(size), 0.7
    if method == "sparsegpt":
        factor = inverse_factor(H_KK, DAMPENING)
        pruned_NK = sparsegpt(w_NK, factor, sparsity, block_size=16, pattern=pattern)
    elif method == "admm":
        pruned_NK = admm(w_NK, dampened(H_KK, DAMPENING), sparsity, target_NK=w_NK, pattern=pattern)
    else:
        pruned_NK = magnitude(w_NK, sparsity, pattern=pattern)
    assert (pruned_NK[w_NK == 0] == 0).all()
    empty = (pruned_NK == 0).reshape(24, -1, size).all(2)
    assert abs(int(empty.sum()) - sparsity * empty.numel()) <= 3  # a half in each of SparseGPT's three
    partly = (pruned_NK == 0).reshape(24, -1, size).any(2) & ~empty
    assert not (partly & (w_NK != 0).reshape(24, -1, size).all(2)).any()


def test_admm_of_blocks_is_near_the_best_weights_for_its_mask_and_better_than_the_others() -> None:
    w_NK, H_KK = problem(4, 32, 48)
    h_KK, pattern = dampened(H_KK, DAMPENING), Blocks(4)
    by_admm_NK = admm(w_NK, h_KK, 0.7, target_NK=w_NK, pattern=pattern)
    best = cost(exact_blocks(w_NK, h_KK, by_admm_NK == 0) - w_NK, h_KK)
    factor = inverse_factor(H_KK, DAMPENING)
    others = (
        sparsegpt(w_NK, factor, 0.7, block_size=16, pattern=pattern),
        magnitude(w_NK, 0.7, pattern=pattern),
    )
    errors = [cost(found - w_NK, h_KK) for found in (by_admm_NK, *others)]
    assert best <= errors[0] < 1.05 * best
    assert errors[0] < 0.95 * errors[1] and errors[1] < errors[2]


def test_blocks_are_parsed_and_leave_the_sparsity_open() -> None:
    assert parse_pattern("1x4") == Blocks(4) and Blocks(4).sparsity is None
