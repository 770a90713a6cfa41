"""Memory that is freed stays with the process, in huge pages: the next array of that size finds it there.

By default the C library gives a large block back to the system as soon as it is freed. The next one is new to
the process, and the system zeroes it 4 KiB at a time, each after a fault: in training on a CPU, where every
operation allocates its result, that took 40% of the time.
"""

import ctypes
import mmap

from gossamer.machine import available_memory_bytes

# Of glibc's malloc.h, and of Linux's mman.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
MADV_HUGEPAGE = 14


def keep_freed_memory() -> None:
    """Let this process keep what it frees, from now on and until it ends; does nothing without glibc.

    Blocks then come from the heap, whose addresses for as much memory as is available are taken at once and
    marked for huge pages; memory itself is taken when it is written to, as ever.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    num_bytes = available_memory_bytes() or 0
    if begin := libc.malloc(num_bytes):
        first_page = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        libc.madvise(first_page, num_bytes - mmap.PAGESIZE, MADV_HUGEPAGE)
        libc.free(begin)
