"""How fast this machine reads memory: the yardstick of every speed claim.

The yardstick is the fastest of many readers: plain and prefetching, on one thread, two and all, of the memory
as it is given (a file mapping, for a model) and of a copy in 2 MB pages. What reads faster than all of them
shows that the yardstick is too short, so `impossible` says it.
"""

import mmap
from dataclasses import dataclass

import numpy as np

from gossamer import _native
from gossamer.errors import ConfigError

PREFETCH_BYTES = (0, 1024, 4096)
MAX_BYTES = 512 << 20
MIN_BYTES = 256 << 10  # the probe reads whole pieces of this size
HUGE_PAGE = 2 << 20


@dataclass(frozen=True)
class Reader:
    """One way to read, with pages "as given" or of "2 MB"; `prefetch_bytes` ahead in software (0: none)."""

    pages: str
    num_threads: int
    prefetch_bytes: int


@dataclass(frozen=True, eq=False)
class Readers:
    """What all readers read: at most 512 MB of a buffer, and its copy in 2 MB pages."""

    given: np.ndarray
    copy: np.ndarray
    num_threads: int

    @classmethod
    def of(cls, buffer: np.ndarray, num_threads: int) -> "Readers":
        if buffer.size < MIN_BYTES:
            raise ConfigError(f"found {buffer.size} bytes to read; expected at least {MIN_BYTES}")
        given = buffer[:MAX_BYTES]
        copy = huge_pages(given.size)
        copy[:] = given
        return cls(given, copy, num_threads)

    def rates(self) -> dict[Reader, float]:
        """Bytes/s of every reader, once, in turns."""
        found = {}
        for threads in sorted({1, 2, self.num_threads}):
            for ahead in PREFETCH_BYTES:
                for pages, memory in (("as given", self.given), ("2 MB", self.copy)):
                    [rate] = _native.read_bandwidth(threads, ahead, memory, 1)
                    found[Reader(pages, threads, ahead)] = rate
        return found

    def best(self, repeats: int = 1) -> float:
        """Bytes/s of the fastest reader in `repeats` rounds."""
        return max(max(self.rates().values()) for _ in range(repeats))


def huge_pages(num_bytes: int) -> np.ndarray:
    """Untouched private memory that begins at a 2 MB page; in such pages where the system grants them."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = np.frombuffer(memory, np.uint8)
    begin = -buffer.ctypes.data % HUGE_PAGE
    return buffer[begin : begin + num_bytes]


def impossible(shares: dict[str, float]) -> tuple[str, ...]:
    """A sentence for each share of a limit above 100%: then the limit was measured wrong."""
    return tuple(
        f"{what}: {share:.0%} of the limit measured in this run. More than 100% is a bug in the benchmark: "
        "do not quote this run."
        for what, share in shares.items()
        if share > 1
    )
