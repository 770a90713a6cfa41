"""The read bandwidth is the best of every reader, of the given memory and of its copy in 2 MB pages."""

import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from gossamer import machine
from gossamer.errors import ConfigError
from gossamer.measure.readers import HUGE_PAGE, Readers, huge_pages, impossible


def test_every_reader_reads() -> None:
    readers = Readers.of(np.ones(4 << 20, np.uint8), 3)
    rates = readers.rates()
    found = {(reader.pages, reader.num_threads, reader.prefetch_bytes) for reader in rates}
    assert found == {(p, t, a) for p in ("as given", "2 MB") for t in (1, 2, 3) for a in (0, 1024, 4096)}
    assert min(rates.values()) > 0
    np.testing.assert_array_equal(readers.copy, readers.given)


def test_the_best_is_the_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    made = iter(range(1, 1000))
    monkeypatch.setattr("gossamer._native.read_bandwidth", lambda *_: [float(next(made))])
    assert Readers.of(np.ones(1 << 20, np.uint8), 2).best(repeats=5) == 5 * 12  # 2 x 3 x 2 readers, 5 rounds


def test_at_most_512_mb_are_read_and_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.measure.readers.MAX_BYTES", 1 << 20)
    assert Readers.of(np.ones(3 << 20, np.uint8), 1).copy.size == 1 << 20


def test_too_little_to_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="found 1000 bytes"):
        Readers.of(np.ones(1000, np.uint8), 1)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs Linux")
def test_the_copy_asks_for_2_mb_pages() -> None:
    buffer = huge_pages(8 << 20)
    assert buffer.size == 8 << 20 and buffer.ctypes.data % HUGE_PAGE == 0
    buffer[:] = 1
    maps = Path("/proc/self/smaps").read_text()
    for start, end, flags in re.findall(
        r"^(\w+)-(\w+) .*?^VmFlags: ([^\n]*)", maps, re.MULTILINE | re.DOTALL
    ):
        if int(start, 16) <= buffer.ctypes.data < int(end, 16):
            assert "hg" in flags.split() or machine.huge_pages() == "never"  # madvise(MADV_HUGEPAGE)
            return
    pytest.fail("the buffer is in no mapping")


def test_only_what_is_above_the_limit_is_impossible() -> None:
    assert impossible({"a": 0.99, "b": 1.0}) == ()
    [text] = impossible({"a": 0.5, "b": 1.04})
    assert text.startswith("b: 104%") and "bug" in text
