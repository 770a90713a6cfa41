"""What we say about the machine must be what the operating system says."""

import os
import subprocess
import sys

import pytest

from gossamer import machine
from gossamer.errors import ConfigError


def test_cores_follow_the_affinity_of_the_process() -> None:
    one = min(os.sched_getaffinity(0))
    code = "from gossamer.machine import cores; print(cores().logical, cores().physical)"
    command = f"import os; os.sched_setaffinity(0, {{{one}}}); {code}"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]
    assert 1 <= machine.cores().physical <= machine.cores().logical == len(os.sched_getaffinity(0))


def test_memory_is_what_the_system_says() -> None:
    total, available = machine.memory_bytes()
    assert total == pytest.approx(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), rel=0.01)
    assert 0 < available < total


@pytest.mark.parametrize(("value", "expected"), [("3", 3), ("", machine.default_threads())])
def test_the_environment_sets_the_threads(monkeypatch: pytest.MonkeyPatch, value: str, expected: int) -> None:
    monkeypatch.setenv("GOSSAMER_THREADS", value)
    assert machine.default_threads() == expected


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_a_number_of_threads_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("GOSSAMER_THREADS", value)
    with pytest.raises(ConfigError, match="GOSSAMER_THREADS"):
        machine.default_threads()
