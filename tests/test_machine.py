"""What we say about the machine must be what the operating system says."""

import os
import subprocess
import sys
from pathlib import Path

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
    total, available = machine.memory_bytes(), machine.available_memory_bytes()
    assert total is not None and available is not None
    assert total == pytest.approx(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), rel=0.01)
    assert 10**6 < available < total


@pytest.mark.parametrize(("value", "expected"), [("3", 3), ("", machine.default_threads())])
def test_the_environment_sets_the_threads(monkeypatch: pytest.MonkeyPatch, value: str, expected: int) -> None:
    monkeypatch.setenv("GOSSAMER_THREADS", value)
    assert machine.default_threads() == expected


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_a_number_of_threads_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("GOSSAMER_THREADS", value)
    with pytest.raises(ConfigError, match="GOSSAMER_THREADS"):
        machine.default_threads()


def files_of_a_system(root: Path, files: dict[str, str]) -> Path:
    for name, content in {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   8000000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


V2 = {
    "proc/self/cgroup": "0::/a/b\n",
    "sys/fs/cgroup/a/b/memory.max": "max\n",
    "sys/fs/cgroup/a/b/memory.current": "1000\n",
    "sys/fs/cgroup/a/memory.max": "4000000\n",
    "sys/fs/cgroup/a/memory.current": "3000000\n",
    "sys/fs/cgroup/a/memory.stat": "anon 7\ninactive_file 500000\n",
}
V1 = {
    "proc/self/cgroup": "4:memory:/outside\n3:cpuset:/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "6000000\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000000\n",
    "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 2\n",
}
UNLIMITED = {**V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [({}, 8_192_000_000), (V2, 1_500_000), (V1, 5_000_002), (UNLIMITED, 8_192_000_000)],
    ids=["machine", "cgroup-2", "cgroup-1", "unlimited"],
)
def test_available_is_the_least_of_machine_and_control_groups(
    files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    assert machine.available_memory_bytes(files_of_a_system(tmp_path, files)) == expected


def test_a_system_that_says_nothing_is_unknown(tmp_path: Path) -> None:
    assert machine.available_memory_bytes(tmp_path) is None


def test_the_limit_of_the_address_space_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ulimit -v`: what the process has mapped already is not available."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + 50_000_000
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (limit, limit))
    found = machine.available_memory_bytes()
    assert found is not None
    assert 0 < found <= 60_000_000
