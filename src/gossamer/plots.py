"""The pictures: drawn from a report's figures, one function a picture."""

from collections.abc import Sequence
from pathlib import Path

INK, ACCENT, PALE = "#22313f", "#1f7a8c", "#b8c4cc"


def demo(
    path: Path, speeds: Sequence[tuple[str, float, float]], accuracies: Sequence[tuple[str, float]], cpu: str
) -> None:
    """Two panels: (layer format, tokens/s, share of the read bandwidth) and (model, accuracy in percent)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    fastest = max(rate for _, rate, _ in speeds)
    base = speeds[0][1]
    for row, (_, rate, share) in enumerate(speeds):
        left.barh(row, rate, color=ACCENT if rate == fastest else PALE)
        left.text(
            rate, row, f" {rate:,.0f}/s  {rate / base:.1f}x, {share:.0%} of bandwidth", va="center", color=INK
        )
    _finish(
        left,
        [label for label, _, _ in speeds],
        f"Tokens per second through 16 wide layers, {cpu}",
        fastest * 2.1,
    )
    for row, (_, accuracy) in enumerate(accuracies):
        right.barh(row, accuracy, color=ACCENT if row == len(accuracies) - 1 else PALE)
        right.text(accuracy, row, f" {accuracy:.1f}%", va="center", color=INK)
    _finish(right, [label for label, _ in accuracies], "Doctests answered right (unseen instances)", 115)
    figure.savefig(path, dpi=130)


def _finish(axes, labels: Sequence[str], title: str, limit: float) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, limit)
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
