"""Training on the values alone against dense training, in one run: speed beside 1 / (1 - s), and memory.

    python benchmarks/training.py linears   forward and backward of a block's linears: width 2048, FFN 5632
    python benchmarks/training.py step      whole steps of the Trainer: 12 layers x 768, vocabulary 8192

Rows of docs/results/training.jsonl; `linears` draws docs/results/training.png. Dense is torch, in float32
and in bfloat16 (on the matrix unit where there is one); both and the sparse products take turns.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from results import RESULTS, write_row
from torch import Tensor, nn

from gossamer import _native, plots
from gossamer.tools.bench_report import GIGA, Spread
from gossamer.tools.readers import impossible
from gossamer.training.sparse_linear import SparseLinear

WIDTH, FFN, TOKENS = 2048, 5632, 2048
SHAPES = [(WIDTH, WIDTH)] * 4 + [(FFN, WIDTH)] * 2 + [(WIDTH, FFN)]  # q k v o, gate up, down
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
REPEATS = 7


def masked_linear(rows: int, columns: int, sparsity: float) -> nn.Linear:
    dense = nn.Linear(columns, rows, bias=False)
    with torch.no_grad():
        dense.weight.mul_(torch.rand(rows, columns) >= sparsity)
    return dense


def pass_seconds(linear: nn.Module, x_TK: Tensor, dy_TN: Tensor, precision: str) -> float:
    """One forward and backward, gradients of weights and inputs both."""
    linear.zero_grad(set_to_none=True)
    x_TK.grad = None
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        y_TN = linear(x_TK)
    y_TN.backward(dy_TN.to(y_TN.dtype))
    return time.perf_counter() - start


def linears_row(sparsity: float) -> dict[str, Any]:
    """All linears of a block: seconds of each way, summed over the shapes within each round."""
    contenders: dict[str, Callable[[nn.Linear], tuple[nn.Module, str]]] = {
        "dense_f32": lambda dense: (dense, "f32"),
        "dense_bf16": lambda dense: (dense, "bf16"),
        "sparse_f32": lambda dense: (SparseLinear(dense), "f32"),
    }
    rounds: dict[str, list[float]] = {name: [0.0] * (REPEATS + 1) for name in contenders}
    peaks = []
    for rows, columns in dict.fromkeys(SHAPES):
        dense = masked_linear(rows, columns, sparsity)
        modules = {name: make(dense) for name, make in contenders.items()}
        x_TK = torch.randn(TOKENS, columns, requires_grad=True)
        dy_TN = torch.randn(TOKENS, rows)
        for turn in range(REPEATS + 1):
            peaks.append(2 * _native.f32_peak(_native.isa(), torch.get_num_threads(), 1))
            for name, (module, precision) in modules.items():
                seconds = pass_seconds(module, x_TK, dy_TN, precision)
                rounds[name][turn] += seconds * SHAPES.count((rows, columns))
    spreads = {name: Spread.of(found[1:]) for name, found in rounds.items()}
    work = 6 * TOKENS * sum(rows * columns for rows, columns in SHAPES)
    shares = {
        "dense_f32": work / spreads["dense_f32"].median / max(peaks),
        "sparse_f32": work * (1 - sparsity) / spreads["sparse_f32"].median / max(peaks),
    }
    return {
        "job": "linears",
        "sparsity": sparsity,
        "width": WIDTH,
        "ffn": FFN,
        "tokens": TOKENS,
        "num_threads": torch.get_num_threads(),
        "seconds": {name: dataclasses.asdict(spread) for name, spread in spreads.items()},
        "against_dense_f32": spreads["dense_f32"].median / spreads["sparse_f32"].median,
        "against_dense_bf16": spreads["dense_bf16"].median / spreads["sparse_f32"].median,
        "bound": 1 / (1 - sparsity),
        "f32_peak_gflops": max(peaks) / GIGA,
        "peak_share": shares,
        "impossible": impossible(shares),
    }


def linears() -> None:
    rows = [linears_row(sparsity) for sparsity in SPARSITIES]
    for row in rows:
        write_row("training", row)
    plots.training_speed(
        RESULTS / "training.png",
        SPARSITIES,
        {
            "against dense float32": [row["against_dense_f32"] for row in rows],
            "against dense bfloat16": [row["against_dense_bf16"] for row in rows],
        },
        f"Forward and backward of a block's linears, width {WIDTH}, {TOKENS} tokens",
    )


JOBS = {"linears": linears}


def main() -> None:
    for job in sys.argv[1:] or JOBS:
        JOBS[job]()


if __name__ == "__main__":
    main()
