"""How fast this machine reads memory: the yardstick of every speed claim."""

import numpy as np

from gossamer import _native

PREFETCH_BYTES = (0, 1024, 4096)
MAX_BYTES = 512 << 20


def best_bandwidth(buffer: np.ndarray, num_threads: int, repeats: int = 1) -> float:
    """Bytes/s of the fastest reader: plain and prefetching, on one thread, two, and all."""
    part = buffer[:MAX_BYTES]
    rates = [
        rate
        for threads in sorted({1, 2, num_threads})
        for ahead in PREFETCH_BYTES
        for rate in _native.read_bandwidth(threads, ahead, part, repeats)
    ]
    return max(rates)
