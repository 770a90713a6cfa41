"""Memory that a process frees and takes again, with and without the allocator's setting."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from gossamer.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(4096 * 25_000)
    block[::4096] = bytes(25_000)
    del block
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


def faults(setting: str) -> int:
    """Page faults of taking 100 MB for the third time: 25,000 where each page is new."""
    command = [sys.executable, "-c", FAULTS, setting]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is of Linux's C library")
def test_a_block_that_was_freed_is_taken_again_without_faults() -> None:
    assert faults("default") > 10_000
    assert faults("keep") < 20


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is of Linux's C library")
def test_a_limit_on_addresses_is_kept_to() -> None:
    """Where the heap cannot be as large as memory, arrays are still had."""
    command = ["bash", "-c", 'ulimit -v 4000000; exec "$0" "$@"', sys.executable, "-c", FAULTS, "keep"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().isdigit()
