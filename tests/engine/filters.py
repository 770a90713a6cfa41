"""Sampling in NumPy and float64: what the native choice is held against."""

import numpy as np
from numpy.typing import NDArray

from gossamer.engine.sampling import SamplingParams


def softmax(scores_V: NDArray) -> NDArray:
    """Probabilities of scores; -inf becomes 0."""
    exponentials_V = np.exp(scores_V - scores_V.max())
    return exponentials_V / exponentials_V.sum()


def top_k(scores_V: NDArray, k: int) -> NDArray:
    """Keep the k highest scores, and those equal to the k-th; 0 keeps all."""
    if k == 0 or k >= scores_V.size:
        return scores_V
    threshold = np.partition(scores_V, -k)[-k]
    return np.where(scores_V < threshold, -np.inf, scores_V)


def top_p(scores_V: NDArray, p: float) -> NDArray:
    """Keep the fewest highest scores whose probabilities reach p, at least one; the later of equal ones."""
    if p >= 1.0:
        return scores_V
    ascending = np.argsort(scores_V, kind="stable")
    below = np.cumsum(softmax(scores_V)[ascending])
    scores_V = scores_V.copy()
    scores_V[ascending[:-1][below[:-1] <= 1.0 - p]] = -np.inf
    return scores_V


def min_p(scores_V: NDArray, p: float) -> NDArray:
    """Keep the scores whose probability is at least p times the highest one's."""
    if p == 0.0:
        return scores_V
    probabilities_V = softmax(scores_V)
    return np.where(probabilities_V < p * probabilities_V.max(), -np.inf, scores_V)


def distribution(logits_V: NDArray, params: SamplingParams) -> NDArray:
    """float64 probabilities that the next token is drawn from."""
    scores_V = logits_V.astype(np.float64) / params.temperature
    scores_V = top_k(scores_V, params.top_k)
    scores_V = top_p(scores_V, params.top_p)
    return softmax(min_p(scores_V, params.min_p))
