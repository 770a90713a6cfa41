"""Every row of the kernel table on one thread, beside what the thread can read and multiply at best.

Dense rows have no zeros, sparse ones 70%. The matrix, [N, 4096], takes 300 MB where a pass through it lasts
at most SECONDS, else (many tokens, scalar loops: bound by instructions) it is smaller. Rows of
docs/results/kernels.jsonl.

    python benchmarks/kernels.py [ISA]     some minutes; only the rows of ISA
"""

import dataclasses
import sys
from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import Any, get_args

import numpy as np
from results import write_row

from gossamer import _native
from gossamer.measure.readers import Readers, impossible
from gossamer.measure.report import GIGA, Spread
from gossamer.measure.synthetic import BLOCK_ROWS, Image, Recipe, synthetic_image
from gossamer.packed.values import Values

TOKENS = (1, 4, 16, 256)
SPARSITY = {"dense": 0.0, "sparse": 0.7}
COLUMNS, NAME = 4096, "model.layers.0.mlp.gate_proj"
BITS = {  # a weight
    "dense": {"f32": 32, "bf16": 16, "i8": 8, "i4": 4},
    "sparse": {"f32": 10.6, "bf16": 5.8, "i8": 3.4, "i4": 2.33},
}
BIG_BYTES = 300e6
SMALL_ROWS = (1_024, 11_008)
REPEATS, SECONDS = 5, 0.6


@dataclass(frozen=True)
class MatrixRecipe(Recipe):
    """One layer of width 4096 with `rows` rows in gate and up, and one small head."""

    rows: int

    @property
    def config(self) -> dict[str, Any]:
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 256}
        return super().config | heads | {"intermediate_size": self.rows}


class Bed:
    """Matrices of one value type and storage in three sizes, small first."""

    def __init__(self, values: Values, storage: str) -> None:
        self.storage = storage
        sizes = (*SMALL_ROWS, BLOCK_ROWS * ceil(8 * BIG_BYTES / BITS[storage][values] / COLUMNS / BLOCK_ROWS))
        made = [MatrixRecipe("llama-2-7b", values, SPARSITY[storage], 1, 256, rows) for rows in sizes]
        self.images = dict(zip(sizes, map(synthetic_image, made), strict=True))
        self.readers = Readers.of(self.images[sizes[-1]].buffer, 1)
        self.inputs = np.random.default_rng(0).standard_normal((max(TOKENS), COLUMNS)).astype(np.float32)

    def time(self, isa: str, rows: int, tokens: int, repeats: int) -> list[float]:
        image, matrices = self.images[rows], {NAME: self.images[rows].config["linears"][NAME]}
        x_TK = self.inputs[:tokens]
        return _native.time_matmul(isa, image.buffer, image.tensors, matrices, NAME, x_TK, repeats)

    def rows(self, isa: str, tokens: int) -> int:
        """The largest matrix that a pass gets through in SECONDS."""
        smallest = min(self.images)
        per_row = min(self.time(isa, smallest, tokens, 2)) / smallest
        return max(rows for rows in self.images if rows == smallest or rows * per_row <= SECONDS)

    def read(self) -> float:
        """Bytes/s of the best reader on one thread."""
        return max(rate for reader, rate in self.readers.rates().items() if reader.num_threads == 1)


def matrix_bytes(image: Image) -> int:
    return sum(entry[3] for name, entry in image.tensors.items() if name.startswith(f"{NAME}."))


def measure(bed: Bed, values: str, isa: str, tokens: int) -> dict[str, Any]:
    """One kernel at one number of tokens, with what is possible measured before and after.

    `products_per_64_weights` is that time as 512-bit INT8 products at the level's peak: cycles, where one
    issues a cycle (VNNI on Zen 4).
    """
    reads, rows = [bed.read()], bed.rows(isa, tokens)
    seconds = Spread.of(bed.time(isa, rows, tokens, REPEATS + 1)[1:])
    reads.append(bed.read())
    peak = _native.int8_peak(isa, 1, REPEATS)
    rate, weight_bytes = rows * COLUMNS * tokens / seconds.median, matrix_bytes(bed.images[rows])
    shares = {"peak_share": rate / peak, "bandwidth_share": weight_bytes / seconds.median / max(reads)}
    small = rows != max(bed.images)
    return {
        "values": values,
        "storage": bed.storage,
        "sparsity": SPARSITY[bed.storage],
        "kernel_isa": isa,
        "tokens": tokens,
        "rows": rows,
        "weight_bytes": weight_bytes,
        "seconds": dataclasses.asdict(seconds),
        "giga_multiply_adds_per_s": rate / GIGA,
        "ns_per_64_weights": 64e9 * seconds.median / (rows * COLUMNS),
        "products_per_64_weights": peak * seconds.median / (rows * COLUMNS),
        "gb_per_s": weight_bytes / seconds.median / GIGA,
        "read_gb_per_s": max(reads) / GIGA,
        "bandwidth_share": None if small else shares["bandwidth_share"],
        "int8_peak_giga_per_s": peak / GIGA,
        "peak_share": shares["peak_share"],
        "impossible": impossible({k: v for k, v in shares.items() if not (small and k == "bandwidth_share")}),
    }


def main() -> None:
    wanted = sys.argv[1:] or [level for level, runs in _native.levels().items() if runs]
    table = [row for row in _native.kernels() if row["family"] == "matmul" and row["isa"] in wanted]
    for values, storage in product(get_args(Values), SPARSITY):
        bed = Bed(values, storage)
        for row in table:
            if (row["values"], row["storage"]) == (values, storage):
                for tokens in TOKENS:
                    write_row("kernels", measure(bed, values, row["isa"], tokens))


if __name__ == "__main__":
    main()
