"""Sampling must filter as transformers' logits processors do, and draw from what is left."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine import filters
from gossamer.engine import sampling
from gossamer.engine.sampling import Sampler, SamplingParams, model_defaults
from gossamer.errors import ConfigError

V = 500


def random_logits(seed: int, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, V).astype(np.float32)


def theirs(processor: Any, logits_V: np.ndarray, ids: list[int] | None = None) -> np.ndarray:
    return processor(torch.tensor([ids or [0]]), torch.from_numpy(logits_V.copy())[None])[0].numpy()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_filters_keep_what_transformers_keeps(seed: int, scale: float) -> None:
    logits_V = random_logits(seed, scale)
    for k in (1, 5, 499, 500, 1000):
        np.testing.assert_array_equal(filters.top_k(logits_V, k), theirs(TopKLogitsWarper(k), logits_V))
    for p in (0.01, 0.3, 0.9, 0.999):
        np.testing.assert_array_equal(filters.top_p(logits_V, p), theirs(TopPLogitsWarper(p), logits_V))
        np.testing.assert_array_equal(filters.min_p(logits_V, p), theirs(MinPLogitsWarper(p), logits_V))


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits_V, ids = random_logits(1), [3, 3, 10, 499]
    expected_V = theirs(RepetitionPenaltyLogitsProcessor(penalty), logits_V, ids)
    np.testing.assert_allclose(
        sampling.repetition_penalty(logits_V, set(ids), penalty), expected_V, rtol=1e-6
    )


def test_ties_at_the_kth_score_are_all_kept() -> None:
    kept_V = filters.top_k(np.array([1.0, 2.0, 2.0, 0.0]), 1)
    assert list(np.isfinite(kept_V)) == [False, True, True, False]


def test_draws_follow_the_distribution_that_transformers_would_draw_from() -> None:
    logits_V = random_logits(2)
    params = SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.2)
    prompt = [int(np.argmax(logits_V))]
    scores_V = theirs(RepetitionPenaltyLogitsProcessor(1.2), logits_V, prompt)
    warpers = (
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(40),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.02),
    )
    for warper in warpers:
        scores_V = theirs(warper, scores_V)
    expected_V = torch.softmax(torch.from_numpy(scores_V), -1).double().numpy()
    draws = 4_000
    counts_V = np.zeros(V)
    for seed in range(draws):
        counts_V[Sampler(replace(params, seed=seed), prompt).choose(logits_V)] += 1
    assert not counts_V[expected_V == 0].any()
    spread_V = 5 * np.sqrt(draws * expected_V * (1 - expected_V)) + 1
    assert (np.abs(counts_V - draws * expected_V) <= spread_V).all()


def test_temperature_zero_is_the_highest_logit() -> None:
    logits_V = random_logits(3)
    assert Sampler(SamplingParams(), []).choose(logits_V) == int(np.argmax(logits_V))


def test_a_seed_repeats_its_draws_and_none_does_not() -> None:
    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [])
        return [sampler.choose(random_logits(4, 1.0)) for _ in range(30)]

    assert draws(7) == draws(7)
    assert draws(-7) == draws(-7) != draws(7)
    assert draws(None) != draws(None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", None),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -1),
        ("repetition_penalty", 0),
        ("seed", "x"),
        ("stop", [""]),
        ("stop", [3]),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {}),
        ({"eos_token_id": 2, "max_new_tokens": 5, "temperature": None}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": True}, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": True, "top_k": 20}, {"temperature": 1.0, "top_k": 20}),
        ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"repetition_penalty": 1.05, "min_p": 0.1}, {"repetition_penalty": 1.05, "min_p": 0.1}),
    ],
)
def test_a_models_own_options(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert model_defaults(config) == expected


@pytest.mark.parametrize("config", [{"temperature": "hot"}, {"top_p": 3}, {"top_k": 2.5}, {"min_p": [0.1]}])
def test_own_options_that_cannot_be_are_named(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"generation_config.json: {next(iter(config))} is .*none"):
        model_defaults(config)
