"""N:M patterns in SparseGPT, ADMM and magnitude pruning; `test_wanda.py` has Wanda's."""

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
from gossamer.compress.pattern import Pattern, parse_pattern
from gossamer.compress.sparsegpt import sparsegpt
from gossamer.errors import ConfigError

Method = Callable[[Tensor, Tensor, Pattern], Tensor]
DAMPENING = 0.01


def problem(seed: int, num_outputs: int, num_inputs: int) -> tuple[Tensor, Tensor]:
    """Weights [N, K] and a Hessian of correlated inputs of very different size, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix_KK = torch.randn(num_inputs, num_inputs, generator=generator, dtype=torch.float64)
    size_K = torch.rand(num_inputs, generator=generator, dtype=torch.float64) * 3 + 0.1
    x_TK = (torch.randn(400, num_inputs, generator=generator, dtype=torch.float64) @ mix_KK) * size_K
    w_NK = torch.randn(num_outputs, num_inputs, generator=generator, dtype=torch.float64)
    return w_NK, 2 / 400 * x_TK.T @ x_TK


def by_sparsegpt(w_NK: Tensor, H_KK: Tensor, pattern: Pattern) -> Tensor:
    return sparsegpt(w_NK, inverse_factor(H_KK, DAMPENING), pattern.sparsity, block_size=16, pattern=pattern)


def by_admm(w_NK: Tensor, H_KK: Tensor, pattern: Pattern) -> Tensor:
    return admm(w_NK, dampened(H_KK, DAMPENING), pattern.sparsity, target_NK=w_NK, pattern=pattern)


def by_magnitude(w_NK: Tensor, H_KK: Tensor, pattern: Pattern) -> Tensor:
    return magnitude(w_NK, pattern.sparsity, pattern=pattern)


def papers_sparsegpt(w_NK: Tensor, H_KK: Tensor, pattern: Pattern) -> Tensor:
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


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8), Pattern(3, 4), Pattern(12, 48)])
@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_is_the_papers(seed: int, pattern: Pattern) -> None:
    w_NK, H_KK = problem(seed, 16, 48)
    found, expected = by_sparsegpt(w_NK, H_KK, pattern), papers_sparsegpt(w_NK, H_KK, pattern)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_admm_is_better_than_sparsegpt_and_that_than_magnitude(seed: int, pattern: Pattern) -> None:
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
    pattern=st.sampled_from([Pattern(2, 4), Pattern(4, 8), Pattern(1, 4), Pattern(1, 2)]),
    before=st.floats(0, 0.7),
    method=st.sampled_from([by_sparsegpt, by_admm, by_magnitude]),
)
def test_zeros_stay_and_groups_have_exactly_theirs(
    seed: int, num_outputs: int, num_groups: int, pattern: Pattern, before: float, method: Method
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
    pruned_NK = by_sparsegpt(w_NK, H_KK, Pattern(2, 4))
    assert (pruned_NK[:, 3] == 0).all() and int((pruned_NK == 0).sum()) == 60


def test_float32_takes_the_native_sweep_and_comes_to_the_same() -> None:
    w_NK, H_KK = problem(1, 40, 64)
    found = by_sparsegpt(w_NK.float(), H_KK.float(), Pattern(2, 4))
    assert int((found == 0).sum()) == 40 * 32
    expected = by_sparsegpt(w_NK, H_KK, Pattern(2, 4))
    errors = [cost(w.double() - w_NK, dampened(H_KK, DAMPENING)) for w in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("text", ["2", "2:", "4:4", "0:4", "5:4", "-2:4", "2:4:8", "two:four", "", "2.0:4"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--pattern.*N:M"):
        parse_pattern(text)


def test_the_first_number_is_what_stays() -> None:
    assert parse_pattern("16:64") == Pattern(16, 64) and Pattern(16, 64).sparsity == 0.75
    assert parse_pattern("unstructured") is None
