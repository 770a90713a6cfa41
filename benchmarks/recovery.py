"""Draw what has come back after pruning, by tokens of training: `python benchmarks/recovery.py`.

Takes the rows of docs/results/recover_*.jsonl that say `sparsity`, `tokens` and `over_dense` (held-out
perplexity over that of the dense model) and writes docs/results/recovery.png.
"""

import json
from collections import defaultdict

from results import RESULTS

from gossamer import plots


def main() -> None:
    curves = defaultdict(list)
    for file in sorted(RESULTS.glob("recover_*.jsonl")):
        for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            if {"sparsity", "tokens", "over_dense"} <= set(row):
                label = f"{row['curve']}, {row['sparsity']:.0%} zeros"
                curves[label].append((row["tokens"] / 1e6, row["over_dense"]))
    curves = {label: points for label, points in curves.items() if len(points) > 1}
    plots.recovery(RESULTS / "recovery.png", curves, "Perplexity after one-shot pruning and after training")


if __name__ == "__main__":
    main()
