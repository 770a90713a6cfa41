"""How the zeros of a model are shared out among its matrices, in place of the same share for all.

Let e_i(s) be the error that a share s of zeros in matrix i leaves, and n_i its weights. Those shares are best
for which sum e_i(s_i) is least at a given total: where all have the same slope,

    e_i'(s_i) / n_i = slope        sum s_i n_i = total sum n_i

The error is measured at a few shares of zeros; between and beyond them its logarithm is linear.

OWL (Yin et al., arXiv 2310.05175) shares out among layers instead. With A = |w_nk| |x_k| of all weights of a
layer (see `wanda.py`), its outlier ratio D is the share of them above M times their mean. Of its weights a
share of (1 - sparsity) + 2 lambda (D - mean D) stays, with D brought to 0..1 over the layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

POWERS = (0.5, 0.75, 1.0, 4 / 3, 2.0)  # of the share of weights that stays: where errors are measured
MIDDLE = 2  # the one that is measured at about the total
MOST = 0.98  # of a matrix may become zero, unless more is asked of all, or was zero before


@dataclass(frozen=True)
class Curve:
    """A matrix of `size` weights, of which `zeros` are zero already: its errors at rising shares of zeros."""

    size: int
    zeros: int
    shares: Sequence[float]
    errors: Sequence[float]

    def at(self, share: np.ndarray) -> np.ndarray:
        """The error at any share of zeros."""
        x, y = np.array(self.shares), np.log(np.maximum(self.errors, 1e-12))
        slopes = np.diff(y) / np.maximum(np.diff(x), 1e-12)
        below, above = y[0] + slopes[0] * (share - x[0]), y[-1] + slopes[-1] * (share - x[-1])
        return np.exp(np.where(share < x[0], below, np.where(share > x[-1], above, np.interp(share, x, y))))

    def scaled_to(self, error: float, at: int) -> "Curve":
        """The same, with this error at one of the shares."""
        factor = error / max(self.errors[at], 1e-30)
        return replace(self, errors=[found * factor for found in self.errors])


def shares_to_measure(existing: float, total: float) -> list[float]:
    """Where errors tell most for a given total: shares above the `existing` one, around the total."""
    kept = min(0.95, (1 - total) / max(1 - existing, 1e-12))
    return [1 - (1 - existing) * kept**power for power in POWERS]


def least_error(curves: Mapping[str, Curve], total: float) -> dict[str, float]:
    """The shares of zeros of all matrices for which the sum of errors is least."""
    points = {
        name: np.linspace(curve.zeros / curve.size, _most(curve.zeros, curve.size, total), 512)
        for name, curve in curves.items()
    }
    errors = {name: curve.at(points[name]) for name, curve in curves.items()}

    def at_slope(slope: float) -> dict[str, float]:
        return {
            name: float(points[name][np.argmin(errors[name] - slope * curve.size * points[name])])
            for name, curve in curves.items()
        }

    goal = total * sum(curve.size for curve in curves.values())
    low, high = 1e-30, 1e30
    for _ in range(100):
        middle = (low * high) ** 0.5
        reached = sum(share * curves[name].size for name, share in at_slope(middle).items())
        low, high = (middle, high) if reached < goal else (low, middle)
    sizes, zeros = ({name: getattr(c, field) for name, c in curves.items()} for field in ("size", "zeros"))
    return exactly(at_slope(high), sizes, zeros, total)


def exactly(
    shares: Mapping[str, float], sizes: Mapping[str, int], zeros: Mapping[str, int], total: float
) -> dict[str, float]:
    """All shares moved by the same amount, such that round(total) weights are zero; never below `zeros`."""
    size = np.array([sizes[name] for name in shares])
    least = np.array([zeros[name] for name in shares])
    most = np.array([_most(zeros[name], sizes[name], total) for name in shares]) * size
    goal = max(round(total * int(size.sum())), int(least.sum()))
    reach = 1.0 + max(abs(share) for share in shares.values())
    low, high, counts = -reach, reach, least
    for _ in range(60):
        middle = (low + high) / 2
        counts = np.clip((np.array(list(shares.values())) + middle) * size, least, most)
        low, high = (middle, high) if counts.sum() < goal else (low, middle)
    whole = np.maximum(np.floor(counts), least).astype(np.int64)
    left = goal - int(whole.sum())
    for index in np.argsort(whole - counts)[:left]:
        whole[index] += 1
    return {name: int(count) / sizes[name] for name, count in zip(shares, whole, strict=True)}


def _most(zeros: int, size: int, total: float) -> float:
    return max(MOST, (1 + total) / 2, zeros / size)


def outlier_ratio(weights: Sequence[tuple[Tensor, Tensor]], threshold: float) -> float:
    """OWL's D of one layer, from each matrix W [N, K] and the norms [K] of its inputs; M is the threshold."""
    scores = torch.cat([(w_NK.abs() * norm_K).flatten() for w_NK, norm_K in weights])
    return (scores > threshold * scores.mean()).double().mean().item()


def owl(ratios: Mapping[str, float], total: float, strength: float) -> dict[str, float]:
    """The share of zeros of each matrix, from the outlier ratio of its layer; lambda is the strength."""
    kept = np.array(list(ratios.values())) - min(ratios.values())
    kept *= 2 * strength / (kept.max() or 1.0)
    return dict(zip(ratios, (total - (kept - kept.mean())).tolist(), strict=True))
