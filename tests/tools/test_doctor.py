"""`doctor` must say what the operating system and NumPy say, and advise only what is true."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gossamer import _native, machine
from gossamer.errors import ConfigError
from gossamer.tools.doctor import Doctor, doctor


def test_the_facts_are_those_of_the_system() -> None:
    result = doctor(Doctor(megabytes=64))
    assert result.cores.logical == len(os.sched_getaffinity(0))
    assert result.isa == _native.isa()
    assert result.packages["numpy"] == np.__version__
    assert result.memory_available_bytes < result.memory_bytes
    shown = {row[0]: row[1] for row in result.tables()[0].rows}
    assert shown["kernels"].startswith(result.isa)
    assert shown["threads used"] == str(result.num_threads)
    if not Path("/proc/driver/nvidia").exists():
        assert shown["GPU"] == "none: CUDA's driver (libcuda.so.1) was not found"


def test_the_read_rate_is_of_the_order_of_a_plain_sum() -> None:
    """NumPy's sum of 64-bit words reads at no more than memory speed, and not a small part of it."""
    words = np.ones(64 << 17, np.uint64)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        words.sum()
        seconds.append(time.perf_counter() - start)
    rate = words.nbytes / min(seconds) / 1e9
    found = max(doctor(Doctor(megabytes=64)).read_1_thread_gb_per_s for _ in range(3))
    assert 0.05 * rate < found < 20 * rate  # wide, for machines that are busy with other things


def test_every_level_is_there_or_lacks_what_linux_does_not_list() -> None:
    levels = {level.isa: level for level in doctor(Doctor(megabytes=1)).levels}
    assert list(levels) == ["scalar", "avx2", "avx512", "avx512-bf16", "amx"]
    flags = machine.CPUINFO.read_text().split()
    for level in levels.values():
        assert not set(level.lacks) & set(flags)
        if level.lacks:
            assert level.int8_tops is None and level.lacks[0] in level.text and "lacks" in level.text
        elif level.int8_tops is not None:
            assert level.int8_tops > 0
    runs = [level.int8_tops for level in levels.values() if level.int8_tops is not None]
    assert (
        runs == sorted(runs) or os.getloadavg()[0] > 1
    )  # each faster than the one below, on a quiet machine


@pytest.mark.skipif(_native.isa() == "scalar", reason="needs a CPU that the cap can lower")
def test_a_cap_on_the_kernels_is_named() -> None:
    code = (
        "from gossamer.tools.doctor import *; r = doctor(Doctor(1)); print(r.isa, r.isa_reason, *r.closing)"
    )
    environment = os.environ | {"GOSSAMER_ISA": "scalar", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.startswith("scalar capped by GOSSAMER_ISA=scalar")
    assert "could run avx" in done.stdout or "could run amx" in done.stdout
    assert "Unset GOSSAMER_ISA" in done.stdout


def test_the_engine_and_the_server_run_without_torch() -> None:
    code = (
        "import sys\nfrom gossamer.server import serve\nfrom gossamer.engine import LLM\n"
        "from gossamer.tools.doctor import Doctor, doctor\ndoctor(Doctor(1))\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"


def test_too_little_memory_to_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="megabytes is 0"):
        doctor(Doctor(megabytes=0))
