"""What this machine is, as far as speed goes, from Linux's own files; elsewhere less is known."""

import os
from dataclasses import dataclass
from pathlib import Path

from gossamer.errors import ConfigError

CPUS = Path("/sys/devices/system/cpu")
CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")
QUOTA = Path("/sys/fs/cgroup/cpu.max")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True)
class Cores:
    """Processors this process may use: `logical` ones, `physical` cores, a container's `quota` of CPUs."""

    logical: int
    physical: int
    quota: float | None


def cores() -> Cores:
    """The processors that this process may run on."""
    everyone = set(range(os.cpu_count() or 1))
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else everyone
    siblings = {_text(CPUS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}
    return Cores(len(allowed), len(siblings), _quota())


def default_threads() -> int:
    """GOSSAMER_THREADS, else the physical cores within the quota: more threads do not read memory faster."""
    if wanted := os.environ.get("GOSSAMER_THREADS"):
        if not wanted.isdecimal() or int(wanted) == 0:
            raise ConfigError(f"GOSSAMER_THREADS is {wanted!r}; expected a number of threads, at least 1.")
        return int(wanted)
    found = cores()
    return max(1, min(found.physical, int(found.quota or found.physical)))


def cpu_model() -> str:
    """The processor's name, or "unknown"."""
    return _field(CPUINFO, "model name") or "unknown"


def cpu_flags() -> frozenset[str]:
    """The instruction sets that the system reports."""
    return frozenset((_field(CPUINFO, "flags") or "").split())


def memory_bytes() -> tuple[int, int]:
    """Memory in the machine and memory available now, in bytes; 0 where unknown."""
    return _kibibytes("MemTotal"), _kibibytes("MemAvailable")


def huge_pages() -> str:
    """How the kernel gives out transparent huge pages: "always", "madvise", "never" or "unknown"."""
    text = _text(HUGE_PAGES)
    return text[text.index("[") + 1 : text.index("]")] if "[" in text and "]" in text else "unknown"


def _quota() -> float | None:
    """CPUs that the container may use (cgroup v2), or None without a limit."""
    words = _text(QUOTA).split()
    if len(words) != 2 or words[0] == "max":
        return None
    return int(words[0]) / int(words[1])


def _kibibytes(name: str) -> int:
    """A line of /proc/meminfo such as `MemTotal: 16384 kB`, in bytes."""
    words = (_field(MEMINFO, name) or "0").split()
    return 1024 * int(words[0])


def _field(file: Path, name: str) -> str | None:
    """The value of the first `name : value` line."""
    for line in _text(file).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _text(file: Path) -> str:
    """A system file's text; "" where this system does not have it."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return ""
