"""The pictures: drawn from a report's figures, one function a picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

INK, ACCENT, PALE = "#22313f", "#1f7a8c", "#b8c4cc"
COLORS = (ACCENT, "#c8553d", "#6a4c93", "#8a9a5b", "#d4a017", "#4f7cac", "#7d5a50")


def demo(
    path: Path,
    choices: Sequence[tuple[str, float]],
    speeds: Sequence[tuple[str, float, float]],
    doctests: Sequence[tuple[str, float]],
    cpu: str,
) -> None:
    """Panels: a chat model's choices; (layer format, tokens/s, share of the read bandwidth); doctests.

    `choices` and `doctests` are of models and percent right; without choices, their panel is left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16.5 if choices else 11, 3.8), layout="constrained")
    *first, middle, right = figure.subplots(1, 3 if choices else 2)
    for axes in first:
        _accuracies(axes, choices, "SmolLM2-135M-Instruct, pruned: choices made right")
    fastest = max(rate for _, rate, _ in speeds)
    base = speeds[0][1]
    for row, (_, rate, share) in enumerate(speeds):
        middle.barh(row, rate, color=ACCENT if rate == fastest else PALE)
        middle.text(
            rate, row, f" {rate:,.0f}/s  {rate / base:.1f}x, {share:.0%} of bandwidth", va="center", color=INK
        )
    _finish(
        middle,
        [label for label, _, _ in speeds],
        f"Tokens per second through 16 wide layers, {cpu}",
        fastest * 2.5,
    )
    _accuracies(right, doctests, "Small Python Llama: unseen doctests right")
    figure.savefig(path, dpi=130)


def _accuracies(axes, accuracies: Sequence[tuple[str, float]], title: str) -> None:
    """Bars of (model, percent), the last one marked."""
    for row, (_, accuracy) in enumerate(accuracies):
        axes.barh(row, accuracy, color=ACCENT if row == len(accuracies) - 1 else PALE)
        axes.text(accuracy, row, f" {accuracy:.1f}%", va="center", color=INK)
    _finish(axes, [label for label, _ in accuracies], title, 115)


def _finish(axes, labels: Sequence[str], title: str, limit: float) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, limit)
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def loss_curve(path: Path, losses: Sequence[float], title: str) -> None:
    """The loss of every step, pale, and its running mean over a twentieth of the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    steps, width = np.arange(1, len(losses) + 1), max(1, len(losses) // 20)
    sums = np.cumsum(losses)
    means = (sums - np.concatenate([np.zeros(width), sums[:-width]])) / np.minimum(steps, width)
    if width > 1:
        axes.plot(steps, losses, color=PALE, linewidth=1, label="each step")
    axes.plot(steps, means, color=ACCENT, label=f"mean of {width} steps" if width > 1 else "each step")
    axes.set_xlabel("optimizer step", color=INK)
    axes.set_ylabel("loss", color=INK)
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.legend(frameon=False, labelcolor=INK)
    _bare(axes)
    figure.savefig(path, dpi=130)


def _bare(axes) -> None:
    axes.grid(color=PALE, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


@dataclass(frozen=True)
class Curve:
    """Speeds in tokens/s of one value type at several sparsities, and what its bytes allow at each."""

    label: str
    sparsities: Sequence[float]
    speeds: Sequence[float]
    bounds: Sequence[float]


def speed_by_sparsity(path: Path, curves: Sequence[Curve], title: str) -> None:
    """A solid line a value type: tokens/s over the percentage of zeros; dashed, its bound by bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for curve, color in zip(curves, COLORS, strict=False):
        percent = [100 * sparsity for sparsity in curve.sparsities]
        axes.plot(percent, curve.speeds, color=color, marker="o", label=curve.label)
        axes.plot(percent, curve.bounds, color=color, linestyle="--", linewidth=1.2)
    axes.plot([], [], color=INK, linestyle="--", linewidth=1.2, label="bound: bytes at read bandwidth")
    axes.set_xlabel("zeros in the decoder linears, %", color=INK)
    axes.set_ylabel("decode, tokens/s", color=INK)
    _open(axes, title)
    figure.savefig(path, dpi=130)


def training_speed(
    path: Path, sparsities: Sequence[float], speedups: Mapping[str, Sequence[float]], title: str
) -> None:
    """A line for each way that is compared with, over the percentage of zeros, and 1 / (1 - s)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    percent = [100 * sparsity for sparsity in sparsities]
    for (label, speedup), color in zip(speedups.items(), COLORS, strict=False):
        axes.plot(percent, speedup, color=color, marker="o", label=label)
    bound = [1 / (1 - sparsity) for sparsity in sparsities]
    axes.plot(percent, bound, color=INK, linestyle="--", linewidth=1.2, label="1 / (1 - s)")
    axes.axhline(1, color=PALE, linewidth=1.2)
    axes.set_xlabel("zeros, %", color=INK)
    axes.set_ylabel("times as fast", color=INK)
    _open(axes, title)
    figure.savefig(path, dpi=130)


def recovery(path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], title: str) -> None:
    """A line a curve: perplexity over the dense model's, by millions of tokens of training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for number, ((label, points), color) in enumerate(zip(curves.items(), COLORS, strict=False)):
        axes.plot(*zip(*sorted(points), strict=True), color=color, marker="o", label=label)
        offset = (4, -12 if number % 2 else 5)  # curves meet: every second one has its figures below
        text: dict[str, Any] = {"textcoords": "offset points", "color": color, "fontsize": 8}
        for tokens, ratio in points:
            axes.annotate(f"{ratio:.2f}", (tokens, ratio), offset, **text)
    axes.axhline(1, color=INK, linestyle="--", linewidth=1.2, label="dense")
    _open(axes, title, legend="upper right")
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_yscale("log")
    axes.set_yticks([1, 1.5, 2, 3, 4], ["1x", "1.5x", "2x", "3x", "4x"], minor=False)
    axes.set_yticks([], minor=True)
    axes.set_xticks([0, 0.1, 1, 10], ["one shot", "0.1 M", "1 M", "10 M"])
    axes.set_xlabel("tokens of training", color=INK)
    axes.set_ylabel("held-out perplexity over the dense model's", color=INK)
    axes.set_xlim(-0.02, 1.6 * max(tokens for points in curves.values() for tokens, _ in points))
    axes.set_ylim(0.9, 1.15 * max(ratio for points in curves.values() for _, ratio in points))
    figure.savefig(path, dpi=130)


@dataclass(frozen=True)
class Score:
    """A figure with its standard error, what the baseline reaches, and a note on the two."""

    label: str
    value: float
    error: float | None = None
    baseline: float | None = None
    note: str = ""


def scores(path: Path, panels: Sequence[tuple[str, Sequence[Score]]], title: str) -> None:
    """A panel for each unit: a bar a score, with one and two standard errors, over the baseline's.

    What is no finite number has no bar; its text says what it is.
    """
    from matplotlib.figure import Figure

    heights = [len(shown) for _, shown in panels]
    figure = Figure(figsize=(9, 1.6 + 0.55 * sum(heights) + 0.5 * len(panels)), layout="constrained")
    axes_of = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[n + 1 for n in heights])[:, 0]
    for axes, (unit, shown) in zip(axes_of, panels, strict=True):
        for row, score in enumerate(shown):
            value, error, baseline = map(_finite, (score.value, score.error, score.baseline))
            if score.baseline is not None:
                axes.barh(row, baseline, height=0.8, color=PALE, label="" if row else "baseline")
            axes.barh(row, value, height=0.5, color=ACCENT, label="" if row else "model")
            if score.error is not None:
                axes.errorbar(value, row, xerr=2 * error, color=INK, linewidth=1)
                axes.errorbar(value, row, xerr=error, color=INK, linewidth=3)
            axes.text(_end(score), row, f"  {score.value:.4g}  {score.note}", va="center", color=INK)
        _finish(axes, [score.label for score in shown], unit, 1.7 * max(map(_end, shown)) or 1)
        if any(score.baseline is not None for score in shown):
            axes.legend(frameon=False, labelcolor=INK, loc="lower right")
    figure.suptitle(title, color=INK, fontsize=12, x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def _end(score: Score) -> float:
    """How far the bars of a score reach, with two standard errors."""
    return max(_finite(score.value) + 2 * _finite(score.error), _finite(score.baseline))


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _open(axes, title: str, legend: str = "upper left") -> None:
    """A plot of curves from 0 up, without a box around it."""
    axes.set_ylim(bottom=0)
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.legend(frameon=False, labelcolor=INK, loc=legend)
    _bare(axes)


def layer_curves(path: Path, panels: Sequence[tuple[str, Mapping[str, Sequence[float]]]], title: str) -> None:
    """A panel for each (what it shows, its curves) over the layers; logarithmic if values are far apart."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(1 + 6.5 * len(panels), 4.2), layout="constrained")
    for axes, (shown, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        values = np.array(list(curves.values()), dtype=float)
        for (label, curve), color in zip(curves.items(), COLORS, strict=False):
            axes.plot(range(len(curve)), curve, color=color, marker="o", markersize=3.5, label=label)
        found = values[np.isfinite(values) & (values > 0)]
        if found.size and found.max() > 30 * found.min():
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.12 * found.max() if found.size else 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer", color=INK)
        axes.set_title(shown, loc="left", color=INK, fontsize=11)
        axes.legend(frameon=False, labelcolor=INK, ncols=1 if len(curves) < 4 else 4)
        _bare(axes)
    figure.suptitle(title, color=INK, fontsize=12, x=0.01, ha="left")
    figure.savefig(path, dpi=130)
