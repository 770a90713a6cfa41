"""Budgets against the conditions of an optimum, brute force, and OWL's paper in a few lines of NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.compress.budget import Curve, exactly, least_error, outlier_ratio, owl, shares_to_measure


def exponential(size: int, level: float, growth: float, zeros: int = 0) -> Curve:
    """A matrix whose error is level * exp(growth * share)."""
    shares = shares_to_measure(zeros / size, 0.7)
    return Curve(size, zeros, shares, [level * float(np.exp(growth * share)) for share in shares])


def total_error(curves: dict[str, Curve], shares: dict[str, float]) -> float:
    return sum(float(curve.at(np.array([shares[name]]))[0]) for name, curve in curves.items())


def test_slopes_are_the_same_where_the_error_is_least() -> None:
    """e_i'(s) / n_i = level_i growth_i exp(growth_i s_i) / n_i, for all that are not at an end."""
    curves = {
        "a": exponential(4000, 1e-3, 6.0),
        "b": exponential(1000, 2e-3, 5.0),
        "c": exponential(9000, 4e-3, 4.0),
    }
    shares = least_error(curves, 0.7)
    slopes = [
        level * growth * np.exp(growth * shares[name]) / curves[name].size
        for name, level, growth in (("a", 1e-3, 6.0), ("b", 2e-3, 5.0), ("c", 4e-3, 4.0))
    ]
    assert min(slopes) == pytest.approx(max(slopes), rel=0.03)
    assert sum(share * curves[name].size for name, share in shares.items()) == pytest.approx(9800, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_shares_of_a_fine_grid_are_better(seed: int) -> None:
    generator = np.random.default_rng(seed)
    curves = {
        name: exponential(
            int(generator.integers(500, 5000)), generator.uniform(0.01, 1), generator.uniform(2, 8)
        )
        for name in "abc"
    }
    shares = least_error(curves, 0.6)
    found, goal = total_error(curves, shares), 0.6 * sum(curve.size for curve in curves.values())
    for a in np.linspace(0, 0.98, 99):
        for b in np.linspace(0, 0.98, 99):
            c = (goal - a * curves["a"].size - b * curves["b"].size) / curves["c"].size
            if 0 <= c <= 0.98:
                assert found <= 1.001 * total_error(curves, {"a": a, "b": b, "c": c})
    uniform = total_error(curves, dict.fromkeys("abc", 0.6))
    assert found <= uniform


def test_a_matrix_that_is_all_zero_stays_so_and_the_others_share_the_rest() -> None:
    curves = {
        "zero": Curve(1000, 1000, shares_to_measure(1.0, 0.7), [0.0] * 5),
        "half": exponential(1000, 1e-3, 6.0, zeros=900),
        "none": exponential(1000, 1e-3, 6.0),
    }
    shares = least_error(curves, 0.7)
    assert shares["zero"] == 1.0 and shares["half"] >= 0.9
    assert round(sum(shares.values()) * 1000) == 2100


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    matrices=st.lists(
        st.tuples(st.integers(1, 500), st.floats(0, 1), st.floats(-0.2, 1.2)), min_size=1, max_size=8
    ),
    total=st.floats(0, 0.99),
)
def test_the_total_is_exact_and_no_matrix_gets_less_than_it_has(
    matrices: list[tuple[int, float, float]], total: float
) -> None:
    names = [f"m{index}" for index in range(len(matrices))]
    sizes = {name: size for name, (size, _, _) in zip(names, matrices, strict=True)}
    zeros = {name: int(size * before) for name, (size, before, _) in zip(names, matrices, strict=True)}
    wanted = {name: share for name, (_, _, share) in zip(names, matrices, strict=True)}
    shares = exactly(wanted, sizes, zeros, total)
    counts = {name: round(share * sizes[name]) for name, share in shares.items()}
    assert sum(counts.values()) == max(round(total * sum(sizes.values())), sum(zeros.values()))
    assert all(zeros[name] <= counts[name] <= sizes[name] for name in names)


def test_shares_that_have_the_total_are_left_alone() -> None:
    wanted, sizes = {"a": 0.6, "b": 0.8}, {"a": 1000, "b": 1000}
    assert exactly(wanted, sizes, {"a": 0, "b": 0}, 0.7) == pytest.approx(wanted, abs=1.1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_owl_is_the_papers(seed: int) -> None:
    """Outlier distributions of four layers of two matrices each, and the layers' sparsities from them."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        [(torch.randn(8, 40, generator=generator) ** (2 * layer + 1), torch.rand(40, generator=generator))]
        * 2
        for layer in range(4)
    ]
    ratios = []
    for layer in layers:
        scores = np.concatenate([np.abs(w.numpy() * norm.numpy()).ravel() for w, norm in layer])
        ratios.append(100 * np.mean(scores > 5 * scores.mean()))
    assert [100 * outlier_ratio(layer, 5.0) for layer in layers] == pytest.approx(ratios, abs=0.2)
    kept = (np.array(ratios) - min(ratios)) / (max(ratios) - min(ratios)) * 0.08 * 2
    kept = kept - kept.mean() + (1 - 0.7)
    found = owl({f"{index}": ratio for index, ratio in enumerate(ratios)}, 0.7, 0.08)
    assert list(found.values()) == pytest.approx(1 - kept)
    assert max(found.values()) - min(found.values()) == pytest.approx(0.16)


def test_owl_with_equal_layers_is_uniform() -> None:
    assert owl({"a": 0.1, "b": 0.1}, 0.7, 0.08) == {"a": 0.7, "b": 0.7}


@pytest.mark.parametrize("existing", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("total", [0.3, 0.5, 0.7, 0.95])
def test_errors_are_measured_above_existing_zeros_and_around_the_total(existing: float, total: float) -> None:
    shares = shares_to_measure(existing, total)
    assert shares == sorted(shares) and len(set(shares)) == 5
    assert existing < shares[0] and shares[-1] < 1
    if existing < total:
        assert shares[1] < total < shares[3]
