"""A stack of a 7B model's widest linears, up (11008 x 4096) and down (4096 x 11008), and how it is timed.

Pairs of them follow one another, more than any cache holds. Needs the standard library and NumPy only: it is
imported in the peers' environments as well.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from statistics import median, pstdev
from typing import Any

import numpy as np

HIDDEN, INNER = 4096, 11008
SHAPES = {"up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
PAIR_WEIGHTS = 2 * INNER * HIDDEN
STACK_BYTES = 300e6
NAME = "stack of 4096 x 11008 linears"

Row = dict[str, Any]


def num_pairs(bits_per_weight: float) -> int:
    """As many pairs as take more than 300 MB."""
    return int(STACK_BYTES // (PAIR_WEIGHTS * bits_per_weight / 8)) + 1


def random_codes(rows: int, columns: int, bits: int = 8) -> np.ndarray:
    """int8 [rows, columns] of `bits` bits: 64 random rows, repeated."""
    low, high = -(1 << (bits - 1)) + 1, 1 << (bits - 1)
    return np.resize(np.random.default_rng(0).integers(low, high, (64, columns), np.int8), (rows, columns))


def plausible_scale(columns: int) -> float:
    """The scale of int8 weights that keeps outputs about as large as inputs."""
    return 1 / (74 * columns**0.5)


def random_inputs(tokens: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((tokens, HIDDEN)).astype(np.float32)


def timed(step: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of `repeats` calls, after two to warm up."""
    seconds = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return seconds[2:]


def stack_row(who: Row, tokens: int, pairs: int, weight_bytes: int, seconds: list[float]) -> Row:
    """A measured stack: `who` says peer, version, what, threads; TOPS count multiplications and additions."""
    middle = median(seconds)
    return who | {
        "shape": NAME,
        "tokens": tokens,
        "num_weights": pairs * PAIR_WEIGHTS,
        "repeats": len(seconds),
        "seconds": middle,
        "deviation_s": pstdev(seconds),
        "tops": 2 * tokens * pairs * PAIR_WEIGHTS / middle / 1e12,
        "weight_bytes": weight_bytes,
        "gb_per_s": weight_bytes / middle / 1e9 if tokens == 1 else None,
    }


def options(description: str | None) -> argparse.ArgumentParser:
    """What every peer's own process understands."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512], help="rows of the stack's input")
    return parser


def print_rows(rows: Iterator[Row]) -> None:
    """One JSON object a line, as soon as it is measured."""
    for row in rows:
        print(json.dumps(row), flush=True)
