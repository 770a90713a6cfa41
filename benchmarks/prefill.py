"""Prompts through a stack of wide linears: TOPS beside the peak, sparse beside dense, in one run.

512 tokens are two passes of 256. Rows of docs/results/prefill.jsonl, one for each value type.
"""

import dataclasses

from results import write_row
from wide import num_weights, stack

from gossamer import _native
from gossamer.machine import default_threads
from gossamer.measure.readers import impossible
from gossamer.measure.report import TERA, Spread
from gossamer.packed.values import Values

TOKENS, PASS_TOKENS, REPEATS = 512, 256, 7
VALUES: tuple[Values, ...] = ("i8", "i4", "f32", "bf16")


def measure(values: Values, num_threads: int) -> None:
    """Dense and 70% in turns; a warm-up, then REPEATS rounds; two rows."""
    images = {sparsity: stack(values, sparsity) for sparsity in (0.0, 0.7)}
    models = {
        sparsity: _native.Model(image.buffer, image.tensors, image.config, num_threads)
        for sparsity, image in images.items()
    }
    tops: dict[float, list[float]] = {sparsity: [] for sparsity in images}
    peaks = []
    peak = _native.f32_peak if values in ("f32", "bf16") else _native.int8_peak
    for _ in range(REPEATS + 1):
        peaks.append(2 * peak(_native.isa(), num_threads, 3) / TERA)
        for sparsity, model in models.items():
            seconds = sum(model.time_linears(TOKENS // PASS_TOKENS, PASS_TOKENS))
            weights = num_weights(images[sparsity])
            tops[sparsity].append(2 * weights * TOKENS / seconds / TERA)
    spreads = {sparsity: Spread.of(found[1:]) for sparsity, found in tops.items()}
    for sparsity, spread in spreads.items():
        share = spread.median / max(peaks)
        row = {
            "values": values,
            "sparsity": sparsity,
            "tokens": TOKENS,
            "num_threads": num_threads,
            "num_weights": num_weights(images[sparsity]),
            "weight_bytes": images[sparsity].num_bytes,
            "tops": dataclasses.asdict(spread),
            f"{peak.__name__}_tops": max(peaks),
            "peak_share": share,
            "against_dense": spread.median / spreads[0.0].median,
            "impossible": impossible({f"{values}, {sparsity:.0%} zeros": share}),
        }
        write_row("prefill", row)


def main() -> None:
    for values in VALUES:
        measure(values, default_threads())


if __name__ == "__main__":
    main()
