"""Scores of a model, their standard errors, and how much of a baseline's they are.

Examples (documents, rows of a text) are taken as drawn one by one. The error of a mean is s / sqrt(n). A
perplexity is exp of the ratio of two sums over examples, -log p and tokens (words, bytes), and a recovery is
a ratio of two scores of the same examples: their errors are the delta method's, by what is left of each
example when the ratio is taken off, so that a recovery's is paired. Of one example there is none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

PRIMARY = (
    "acc_norm",
    "acc",
    "exact_match",
    "pass@1",
    "rougeL",
    "f1",
    "prompt_level_strict_acc",
    "win_rate",
    "word_perplexity",
)
NO_SHARES = ("perplexity", "bits_per_byte", "bleu", "chrf", "ter")
LOG_LIKELIHOODS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Scores:
    """Of one task: value and standard error of each metric, and the primary one of each example.

    Where a task finds answers by several filters, a metric is named `metric,filter`, as the harness does.
    If the primary metric is one of LOG_LIKELIHOODS, `samples` are log p of examples and `weights` their
    lengths, in tokens, words or bytes. `num_cut` texts were longer than the model's limit.
    """

    metrics: dict[str, float]
    standard_errors: dict[str, float]
    samples: tuple[float, ...]
    num_examples: int
    weights: tuple[float, ...] = ()
    num_cut: int = 0

    @property
    def value(self) -> float:
        """The primary metric."""
        return self.metrics[primary(self.metrics)]

    @property
    def lower_is_better(self) -> bool:
        """Whether it is a perplexity, or its logarithm."""
        return primary(self.metrics).partition(",")[0] in LOG_LIKELIHOODS


def primary(metrics: Mapping[str, float]) -> str:
    """The metric by which a task is known: the first of PRIMARY, by its first filter."""
    names = {name.partition(",")[0]: name for name in reversed([*metrics])}
    return next((names[name] for name in PRIMARY if name in names), next(iter(metrics)))


def is_share(metric: str) -> bool:
    """Whether a metric lies between 0 and 1, and is shown as a percentage."""
    return not metric.partition(",")[0].endswith(NO_SHARES)


def accuracy(passed: Sequence[bool]) -> Scores:
    """The share of examples that are right."""
    return mean("acc", passed)


def mean(metric: str, found: Sequence[float]) -> Scores:
    """The mean of what was found of each example."""
    samples = np.array(found, dtype=float)
    error = _error(samples)
    errors = {} if error is None else {metric: error}
    return Scores({metric: float(samples.mean())}, errors, tuple(samples.tolist()), len(samples))


def f1(right: Sequence[float], found: Sequence[float], wanted: Sequence[float]) -> Scores:
    """Of what is found in examples: precision, the share that is right of all found, recall, of all wanted.

    `f1` is twice the right ones over those found and those wanted, counted together; a share of nothing is 0.
    A sample is f1 and what the example adds to it in first order.
    """
    r, n, m = (np.array(it, dtype=float) for it in (right, found, wanted))
    shares = {"f1": (2 * r, n + m), "precision": (r, n), "recall": (r, m)}
    shares = {name: (x, y if y.sum() else np.ones_like(y)) for name, (x, y) in shares.items()}
    metrics = {name: float(x.sum() / y.sum()) for name, (x, y) in shares.items()}
    errors = {name: error for name, it in shares.items() if (error := share_error(*it)) is not None}
    return Scores(metrics, errors, tuple((metrics["f1"] + _rest(*shares["f1"])).tolist()), len(r))


def perplexity(log_probs: Sequence[float], lengths: Sequence[float]) -> Scores:
    """Of a text, by the log p and the tokens of each of its rows."""
    value = float(np.exp(-np.sum(log_probs) / np.sum(lengths)))
    error = log_likelihood_error("perplexity", value, log_probs, lengths)
    errors = {} if error is None else {"perplexity": error}
    return Scores({"perplexity": value}, errors, tuple(log_probs), len(log_probs), tuple(lengths))


def log_likelihood_error(
    metric: str, value: float, log_probs: Sequence[float], lengths: Sequence[float]
) -> float | None:
    """The standard error of one of LOG_LIKELIHOODS."""
    error = _error(_rest(-np.array(log_probs), np.array(lengths)))
    if error is None:
        return None
    return error / np.log(2) if metric == "bits_per_byte" else error * value


def share_error(right: ArrayLike, number: ArrayLike) -> float | None:
    """The standard error of a share of all that examples have several of, such as instructions."""
    return _error(_rest(np.array(right), np.array(number)))


def recovery(ours: Scores, base: Scores) -> float | None:
    """Share of the baseline's score, 1 for all of it; what the baseline fails wholly has none."""
    if base.lower_is_better:
        return base.value / ours.value
    return ours.value / base.value if base.value > 0 else None


def recovery_error(ours: Scores, base: Scores) -> float | None:
    """The standard error of the recovery, paired by example; None where these are not numbers."""
    share, (x, y) = recovery(ours, base), (np.array(ours.samples), np.array(base.samples))
    if share is None or len(x) != len(y):
        return None
    if not base.lower_is_better:
        return _error((x - share * y) / base.value)
    left = _rest(-x, np.array(ours.weights)), _rest(-y, np.array(base.weights))
    if primary(base.metrics).partition(",")[0] == "bits_per_byte":  # else already relative: a logarithm's
        left = [part / (scores.value * np.log(2)) for part, scores in zip(left, (ours, base), strict=True)]
    error = _error(left[0] - left[1])
    return None if error is None else error * share


def _rest(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """What each example adds to sum(x) / sum(y) beyond its share; its mean is 0."""
    return (x - x.sum() / y.sum() * y) / y.mean() if len(x) else x


def _error(samples: NDArray[np.float64]) -> float | None:
    """Of their mean; None of fewer than two, or where one is no finite number."""
    if len(samples) < 2 or not np.isfinite(samples).all():
        return None
    return float(samples.std(ddof=1) / np.sqrt(len(samples)))
