"""Products that skip: INT8 of blocks beside dense and sparse INT8, in one run, weights beyond the cache.

A stack of linears as wide as llama-2-7b's, prompts of 512 tokens (two passes of 256), 16 tokens (sequences
that decode together) and one, in turns. Where there is a matrix unit it has no rival at prompts:
`GOSSAMER_ISA=avx512` shows what a machine without one gains. Rows of docs/results/skipping.jsonl.

    python benchmarks/skipping.py
"""

import dataclasses
from math import ceil

from results import write_row
from wide import StackRecipe, num_weights

from gossamer import _native
from gossamer.machine import default_threads
from gossamer.measure.report import TERA, Spread
from gossamer.measure.synthetic import Image, synthetic_image
from gossamer.packed.writer import Storage

REPEATS, BYTES, LAYER_WEIGHTS = 5, 280e6, 139e6
PASSES = {512: (2, 256), 16: (1, 16), 1: (4, 1)}  # tokens -> passes, tokens of each
CASES: list[tuple[Storage, int, float]] = [  # storage, weights that are zero together, zeros
    ("dense", 1, 0.0),
    ("sparse", 1, 0.7),
    ("sparse", 1, 0.8),
    *(("blocks", 1, zeros) for zeros in (0.7, 0.8, 0.9)),
    *(("blocks", 4, zeros) for zeros in (0.5, 0.7, 0.8, 0.9)),
]


def stack(storage: Storage, together: int, zeros: float) -> Image:
    """As many layers as take BYTES."""
    live = 1 - zeros ** (4 / together)
    bits = {"dense": 8, "sparse": 1 + 8 * (1 - zeros), "blocks": 0.25 + 8 * live}[storage]
    layers = ceil(BYTES / (LAYER_WEIGHTS * bits / 8))
    recipe = StackRecipe("llama-2-7b", "i8", zeros, layers, 256, together=together, storage=storage)
    return synthetic_image(recipe)


def main() -> None:
    """A warm-up, then REPEATS rounds through all cases: two models at a time, the dense one and another."""
    threads = default_threads()
    dense = stack(*CASES[0])
    for case in CASES[1:]:
        images = {CASES[0]: dense, case: stack(*case)}
        models = {
            key: _native.Model(image.buffer, image.tensors, image.config, threads)
            for key, image in images.items()
        }
        for tokens, (passes, each) in PASSES.items():
            seconds: dict[tuple, list[float]] = {key: [] for key in images}
            peaks = []
            for _ in range(REPEATS + 1):
                peaks.append(2 * _native.int8_peak(_native.isa(), threads, 3) / TERA)
                for key, model in models.items():
                    weight = sum(model.time_linears(passes, each)) / num_weights(images[key])
                    seconds[key].append(weight * 1e12 / tokens * (tokens / (passes * each)))
            ratios = [a / b for a, b in zip(seconds[CASES[0]][1:], seconds[case][1:], strict=True)]
            storage, together, zeros = case
            write_row(
                "skipping",
                {
                    "storage": storage,
                    "pattern": "1x4" if together == 4 else "unstructured",
                    "sparsity": zeros,
                    "tokens": tokens,
                    "num_threads": threads,
                    "weight_bytes": images[case].num_bytes,
                    "num_weights": num_weights(images[case]),
                    "ps_a_weight_and_token": dataclasses.asdict(Spread.of(seconds[case][1:])),
                    "ps_dense": dataclasses.asdict(Spread.of(seconds[CASES[0]][1:])),
                    "against_dense": Spread.of(ratios).median,
                    "int8_peak_tops": max(peaks),
                },
            )


if __name__ == "__main__":
    main()
