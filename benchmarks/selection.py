"""SparseGPT's selection and update of a matrix from a finished Hessian: ours against plain torch, in turns.

    python benchmarks/selection.py [--rows 4096] [--columns 11008] [--sparsity 0.5] [--repeats 3]

The factor U is made up (upper triangular, near the identity), so that no Hessian of that size has to be
factored: neither way looks at more of it. Prints medians, their ratio, and how many zeros differ.
"""

import argparse
import statistics
import time

import torch
from results import write_row
from torch import Tensor

from gossamer.compress import sparsegpt as module
from gossamer.compress.hessian import InverseFactor
from gossamer.compress.plain_sweep import plain_sweep


def plain_smallest(saliency: Tensor, count: int) -> Tensor:
    """The smallest by torch's own selection."""
    chosen = torch.zeros_like(saliency, dtype=torch.bool)
    chosen.view(-1)[saliency.flatten().topk(count, largest=False, sorted=False).indices] = True
    return chosen


def plain_fix_rows(w_BN: Tensor, u_BB: Tensor, kept_BN: Tensor) -> Tensor:
    """The sweep as a loop of torch's operators."""
    return plain_sweep(w_BN, u_BB, kept_BN, None)


WAYS = {"plain": (plain_fix_rows, plain_smallest), "native": (module.fix_rows, module.smallest)}


def timed(way: str, w_NK: Tensor, factor: InverseFactor, sparsity: float) -> tuple[float, Tensor]:
    """Seconds and zeros of `sparsegpt` that way."""
    module.fix_rows, module.smallest = WAYS[way]  # type: ignore[assignment]
    start = time.monotonic()
    zeros_NK = module.sparsegpt(w_NK, factor, sparsity) == 0
    return time.monotonic() - start, zeros_NK


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=3)
    job = parser.parse_args()
    torch.manual_seed(0)
    w_NK = torch.randn(job.rows, job.columns)
    u_KK = torch.randn(job.columns, job.columns).mul_(0.5 / job.columns**0.5).triu_(1)
    u_KK.diagonal().uniform_(0.5, 1.5)
    factor = InverseFactor(u_KK, torch.zeros(job.columns, dtype=torch.bool), 0.01)
    seconds: dict[str, list[float]] = {"plain": [], "native": []}
    differ = 0
    for _ in range(job.repeats):
        plain, zeros_NK = timed("plain", w_NK, factor, job.sparsity)
        native, ours_NK = timed("native", w_NK, factor, job.sparsity)
        seconds["plain"].append(plain)
        seconds["native"].append(native)
        differ = int((zeros_NK != ours_NK).sum())
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    ratio = medians["plain"] / medians["native"]
    shape = {"rows": job.rows, "columns": job.columns, "sparsity": job.sparsity}
    what = {
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "ratio": ratio,
        "zeros_that_differ": differ,
    }
    write_row("selection", shape | what)


if __name__ == "__main__":
    main()
