"""Decoded weights, a few rows at a time: rounded to a type, looked at, and handed on in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from gossamer.checkpoint.weights import is_finite
from gossamer.errors import CheckpointError

PIECE_WEIGHTS = 1 << 18  # decoded at a time, so that intermediate arrays stay in a core's cache


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor in storage form; their zeros as bits (as `hash_mask` packs them) and counted."""

    name: str
    values: np.ndarray
    zeros: bytes
    num_zeros: int


def decoded(tasks: Iterable[Callable[[], Piece]]) -> Iterator[Piece]:
    """What the tasks return, in their order, while the next ones run on all cores."""
    num_threads = os.cpu_count() or 1
    with ThreadPoolExecutor(num_threads) as pool:
        pending: deque[Future[Piece]] = deque()
        for task in tasks:
            pending.append(pool.submit(task))
            if len(pending) > 2 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def make_piece(name: str, values: np.ndarray, dtype: str, origin: str) -> Piece:
    """float32 values as a piece of `dtype` (F32, F16 or BF16), rounded to nearest, ties to even.

    CheckpointError where one is not a finite number of that type; `origin` is the file and its tensor's name.
    """
    stored = _stored(values, dtype)
    if not is_finite(stored, dtype):
        if np.isfinite(values).all():
            largest = np.abs(values).max()
            raise CheckpointError(
                f"{origin} has values beyond {dtype}, such as {largest:g}; take --dtype f32"
            )
        raise CheckpointError(f"{origin} holds NaN or infinite values; the weights are damaged")
    zeros = (stored & 0x7FFF) == 0 if dtype == "BF16" else stored == 0
    return Piece(name, stored, np.packbits(zeros).tobytes(), int(np.count_nonzero(zeros)))


def _stored(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
