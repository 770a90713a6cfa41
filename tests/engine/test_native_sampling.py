"""The native choice must be the one that NumPy makes in float64, on every level."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine import filters
from gossamer import _native
from gossamer.engine.sampling import Sampler, SamplingParams, log_probabilities
from gossamer.errors import EngineError

LEVELS = tuple(_native.levels())
RUNNABLE = tuple(level for level, runs in _native.levels().items() if runs)
ISAS = [row["isa"] for row in _native.kernels() if row["family"] == "mass" and row["isa"] in RUNNABLE]
CLOSE = 1e-6  # nearer to a boundary than this, float32 may fall on its other side
LAST = float(np.nextafter(1.0, 0.0))
LOWEST = np.finfo(np.float32).min


def choose(isa: str, logits_V: np.ndarray, params: SamplingParams, uniform: float) -> int:
    options = params.temperature, params.top_k, params.top_p, params.min_p
    return _native.sample(isa, logits_V, *options, uniform)


def floats(*numbers: float) -> np.ndarray:
    return np.array(numbers, dtype=np.float32)


def assert_every_token_has_its_interval(logits_V: np.ndarray, params: SamplingParams) -> None:
    """Numbers just inside both ends of each token's interval must choose it: no other token is ever drawn."""
    probabilities_V = filters.distribution(logits_V, params)
    ends_V = np.cumsum(probabilities_V)
    for token in np.flatnonzero(probabilities_V > 4 * CLOSE):
        first, last = ends_V[token] - probabilities_V[token] + CLOSE, ends_V[token] - CLOSE
        for isa in ISAS:
            assert choose(isa, logits_V, params, first) == token
            assert choose(isa, logits_V, params, last) == token


@dataclass(frozen=True)
class Case:
    """Logits, filters and a number to draw with."""

    logits_V: np.ndarray
    params: SamplingParams
    uniform: float

    def is_close_call(self) -> bool:
        """Whether rounding may decide which tokens top-p or min-p keep."""
        params = self.params
        scores_V = filters.top_k(self.logits_V.astype(np.float64) / params.temperature, params.top_k)
        descending = np.sort(filters.softmax(scores_V))[::-1]
        at_p = params.top_p < 1 and np.abs(np.cumsum(descending) - params.top_p).min() < CLOSE
        relative = descending / descending[0]
        at_min_p = params.min_p > 0 and (np.abs(relative - params.min_p)[relative < 1] < CLOSE).any()
        return bool(at_p or at_min_p)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    numbers = st.floats(-60, 60, width=32) | st.sampled_from([-np.inf, 0.0, -0.0, 1.0, 1.0, 2.5])
    pool = draw(st.lists(numbers, min_size=1, max_size=12))
    size = draw(st.integers(1, 200))
    picks = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, len(pool), size)
    logits_V = np.array(pool, dtype=np.float32)[picks]
    if draw(st.booleans()):
        logits_V = logits_V + np.random.default_rng(size).normal(0, 3, size).astype(np.float32)
    params = SamplingParams(
        temperature=draw(st.floats(0.05, 20)),
        top_k=draw(st.just(0) | st.integers(1, size + 2)),
        top_p=draw(st.just(1.0) | st.floats(1e-9, 1)),
        min_p=draw(st.just(0.0) | st.floats(0, 1)),
    )
    uniform = draw(st.floats(0, LAST))
    assume(np.isfinite(logits_V.max()))
    return Case(logits_V, params, uniform)


@settings(max_examples=500, deadline=None)
@given(cases())
def test_choice_is_that_of_numpy(case: Case) -> None:
    assume(not case.is_close_call())
    ends_V = np.cumsum(filters.distribution(case.logits_V, case.params))
    boundaries = ends_V[(ends_V > 0) & (ends_V < ends_V[-1])]
    assume(np.abs(boundaries - case.uniform).min(initial=1) > CLOSE)
    expected = int(np.searchsorted(ends_V, case.uniform * ends_V[-1], side="right"))
    for isa in ISAS:
        assert choose(isa, case.logits_V, case.params, case.uniform) == expected


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 60, "top_p": 0.8, "min_p": 0.1}],
    ids=str,
)
def test_every_kept_token_has_its_interval(scale: float, options: dict) -> None:
    logits_V = np.random.default_rng(1).normal(0, scale, 701).astype(np.float32)
    assert_every_token_has_its_interval(logits_V, SamplingParams(temperature=0.8, **options))


@pytest.mark.parametrize("top_k", [0, 1, 50, 20_000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.999])
@pytest.mark.parametrize("min_p", [0.0, 0.05])
def test_a_whole_vocabulary(top_k: int, top_p: float, min_p: float) -> None:
    rng = np.random.default_rng(2)
    logits_V = rng.normal(0, 3, 128_256).astype(np.float32)
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    ends_V = np.cumsum(filters.distribution(logits_V, params))
    for uniform in (0.0, *rng.random(20), LAST):
        choices = {choose(isa, logits_V, params, uniform) for isa in ISAS}
        (chosen,) = choices
        assert ends_V[chosen - 1] * (chosen > 0) - CLOSE <= uniform <= ends_V[chosen] + CLOSE
        assert ends_V[chosen] > ends_V[chosen - 1] or chosen == 0


@pytest.mark.parametrize(
    ("logits", "options", "kept"),
    [
        ([1, 3, 2, 3], {"top_p": 1e-30}, [3]),
        ([1, 3, 2], {"top_p": 1e-300}, [1]),
        ([0, 0, 0, 0], {"top_p": 0.5}, [2, 3]),
        ([0, 0, 0, 0], {"top_p": 0.51}, [1, 2, 3]),
        ([0, 0, 0, 0], {"top_k": 1, "top_p": 0.5, "min_p": 1.0}, [2, 3]),
        ([1, 2, 2, 0], {"top_k": 1}, [1, 2]),
        ([1, 2, 2, 0], {"top_k": 3}, [0, 1, 2]),
        ([1, 2, 2, 0], {"top_k": 4}, [0, 1, 2, 3]),
        ([1, 2, 2, 0], {"top_k": 10**30}, [0, 1, 2, 3]),
        ([1, 2, 2, 0], {"min_p": 1.0}, [1, 2]),
        ([1, 2, 2, 0], {"top_k": 3, "top_p": 0.8, "min_p": 0.9}, [1, 2]),
        ([-np.inf, 4, -np.inf], {}, [1]),
        ([-np.inf, 4, -np.inf], {"top_k": 2, "top_p": 0.9, "min_p": 0.1}, [1]),
        ([-np.inf, LOWEST, -np.inf], {"min_p": 0.5}, [1]),
        ([LOWEST, 0, -LOWEST], {}, [2]),
        ([7], {"top_k": 5, "top_p": 0.1, "min_p": 0.1}, [0]),
        ([-1, 1, 0], {"temperature": 5e-324}, [1]),
        ([-1, -np.inf, 1, 0], {"temperature": 1e308}, [0, 2, 3]),
        ([-1, -np.inf, 1, 0], {"temperature": 1e308, "top_k": 2, "min_p": 0.5}, [2, 3]),
    ],
)
@pytest.mark.parametrize("isa", ISAS)
def test_edges(isa: str, logits: Sequence[float], options: dict, kept: list[int]) -> None:
    """Every kept token, and no other, is drawn by some number; the last by the last number below 1."""
    params = SamplingParams(**{"temperature": 1.0} | options)
    logits_V = floats(*logits)
    limited = (params.temperature, min(params.top_k, len(logits)), params.top_p, params.min_p)
    drawn = [_native.sample(isa, logits_V, *limited, uniform) for uniform in np.arange(0, 1, 1 / 256)]
    assert sorted(set(drawn)) == kept
    assert _native.sample(isa, logits_V, *limited, LAST) == kept[-1]
    assert Sampler(params, []).choose(logits_V) in kept


@pytest.mark.parametrize("isa", ISAS)
def test_equal_logits_share_evenly_and_top_p_leaves_out_the_first(isa: str) -> None:
    logits_V = np.full(5_000, 2.0, dtype=np.float32)
    params = SamplingParams(temperature=0.5, top_p=0.75)
    assert choose(isa, logits_V, params, 0.0) == 1_250
    assert choose(isa, logits_V, params, 0.5 + 1e-9) == 1_250 + 1_875
    assert choose(isa, logits_V, params, LAST) == 4_999


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [0, 1, 7, 8, 16, 41])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_distribution_are_errors(isa: str, size: int, bad: float) -> None:
    for at in range(size) if np.isnan(bad) else [slice(None)]:
        logits_V = np.zeros(size, dtype=np.float32)
        logits_V[at] = bad
        with pytest.raises(EngineError, match="logits"):
            choose(isa, logits_V, SamplingParams(temperature=1.0), 0.5)
        with pytest.raises(EngineError, match="logits"):
            _native.log_probabilities(isa, logits_V, 0, 3)


def test_an_extreme_repetition_penalty_still_chooses() -> None:
    logits_V = floats(3.0, -2.0, -np.inf, 60.0)
    assert Sampler(SamplingParams(temperature=1.0, repetition_penalty=1e-300), [0]).choose(logits_V) == 0
    assert Sampler(SamplingParams(temperature=1.0, repetition_penalty=1e300), [0, 1, 2]).choose(logits_V) == 3


@pytest.mark.parametrize("size", [1, 15, 16, 17, 4_999])
@pytest.mark.parametrize("low", [-np.inf, 0.5, 100.0])
def test_masses_are_those_of_numpy_and_the_same_on_every_level(size: int, low: float) -> None:
    x = np.random.default_rng(size).normal(0, 5, size).astype(np.float32)
    expected = np.exp((x[x >= low].astype(np.float64) - 20) * 0.75).sum() * 2.0**40
    masses = {_native.mass(isa, x, 20.0, 0.75, low) for isa in ISAS}
    assert len(masses) == 1
    assert masses.pop() == pytest.approx(expected, rel=2e-6, abs=size)  # exponents to -28 in float32


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_log_probabilities_are_those_of_torch(scale: float) -> None:
    logits_V = np.random.default_rng(3).normal(0, scale, 20_003).astype(np.float32)
    expected_V = torch.log_softmax(torch.from_numpy(logits_V).double(), -1).numpy()
    for token in (0, 17, int(logits_V.argmin()), int(logits_V.argmax())):
        logprob, likeliest = log_probabilities(logits_V, token, 0)
        assert logprob == pytest.approx(expected_V[token], abs=3e-7) and likeliest == []
    assert len({_native.log_probabilities(isa, logits_V, 17)[0] for isa in ISAS}) == 1
    with pytest.raises(EngineError, match="20002"):
        log_probabilities(logits_V, 20_003, 1)
    with pytest.raises(EngineError, match="found -1 likeliest tokens"):
        log_probabilities(logits_V, 0, -1)


@pytest.mark.parametrize("size", [1, 5, 20, 3_001])
@pytest.mark.parametrize("number", [1, 5, 20])
def test_the_likeliest_are_those_of_a_stable_sort(size: int, number: int) -> None:
    """With ties, some of them across the last place; as many as there are where more are asked for."""
    chance = np.random.default_rng(size * number)
    for spread in (3, 1_000):
        logits_V = chance.integers(0, spread, size).astype(np.float32)
        _, found = log_probabilities(logits_V, 0, number)
        expected = np.argsort(-logits_V, kind="stable")[:number]
        assert [token for token, _ in found] == expected.tolist()
        assert [logprob for _, logprob in found] == [
            log_probabilities(logits_V, int(t), 0)[0] for t in expected
        ]
