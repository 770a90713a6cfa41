"""Whole models at real shapes: value types beside read bandwidth, INT8 peak and dense float32.

    python benchmarks/decode.py            every job, some minutes and 5 GB of disk at a time
    python benchmarks/decode.py 7b         those with the word in their name

Rows of docs/results/decode.jsonl, each as soon as it is measured.
"""

import dataclasses
import sys

from results import write_row

from gossamer.tools.bench import Bench, measured

JOBS = {
    "step-1b": Bench(shape="llama-3.2-1b", values=("i8", "i4", "bf16", "f32")),
    "sparsity-1b": Bench(shape="llama-3.2-1b", values=("i8", "i4"), sparsity=(0.0, 0.5)),
    "linears-7b": Bench(shape="llama-2-7b", layers=8, values=("i8", "i4", "f32"), baseline=True),
    "batch-1b": Bench(shape="llama-3.2-1b", values=("i8",), batch=(1, 4, 16)),
    "context-1b": Bench(shape="llama-3.2-1b", values=("i8",), prompt=(64, 512, 4096), repeats=3),
    "tinyllama": Bench(shape="tinyllama-1.1b", values=("i8", "i4"), prompt=(512,)),
}


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    for name, job in JOBS.items():
        if wanted in name:
            for row in measured(job):
                what = {"job": name, "shape": job.shape, "layers": job.layers}
                write_row("decode", what | dataclasses.asdict(row))


if __name__ == "__main__":
    main()
