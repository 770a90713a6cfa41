"""Decoding at real shapes, as rows of docs/results: zeros and value types, beside the read bandwidth."""

import dataclasses

from results import write_row

from gossamer.tools.bench import Bench, bench

JOBS = (
    Bench(shape="llama-3.2-1b", sparsity=0.7, baseline=True),
    Bench(shape="llama-3.2-1b", sparsity=0.5),
    Bench(shape="llama-3.2-1b", sparsity=0.0),
    Bench(shape="llama-3.2-1b", values="bf16"),
    Bench(shape="llama-2-7b", layers=8, sparsity=0.7, baseline=True),
)


def main() -> None:
    for job in JOBS:
        options = {key: value for key, value in dataclasses.asdict(job).items() if value is not None}
        write_row("decode", {"job": options} | dataclasses.asdict(bench(job)))


if __name__ == "__main__":
    main()
