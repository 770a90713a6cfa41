"""What this machine is, as far as speed goes, from Linux's own files; elsewhere less is known."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path

from gossamer.errors import ConfigError

CPUS = Path("/sys/devices/system/cpu")
CPUINFO = Path("/proc/cpuinfo")
QUOTA = Path("/sys/fs/cgroup/cpu.max")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# A control group's limit of memory and its use, in files of version 2 and of version 1.
MEMORY_LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def cache_directory() -> Path:
    """Where this program keeps what it can make again: GOSSAMER_CACHE, or ~/.cache/gossamer."""
    return Path(os.environ.get("GOSSAMER_CACHE") or Path.home() / ".cache" / "gossamer")


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


def memory_bytes() -> int | None:
    """Memory in the machine; None where the system does not say."""
    return _kibibytes(Path("/"), "MemTotal")


def available_memory_bytes(root: Path = Path("/")) -> int | None:
    """Memory that this process can still take; None where the system does not say.

    The least of what the machine has available, what each of the process's control groups (a container's
    limits) leaves, and what `ulimit -v` leaves. `root`: where the system's files lie, for tests.
    """
    found = [_kibibytes(root, "MemAvailable"), _left_of_address_space(), *_left_of_control_groups(root)]
    return min((left for left in found if left is not None), default=None)


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says by it that there was no memory, of the machine or of a GPU."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


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


def _kibibytes(root: Path, name: str) -> int | None:
    """A line of /proc/meminfo such as `MemTotal: 16384 kB`, in bytes."""
    value = _field(root / "proc/meminfo", name)
    return None if value is None else 1024 * int(value.split()[0])


def _left_of_address_space() -> int | None:
    """What `ulimit -v` allows this process beyond what it has mapped already; None without a limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _text(Path("/proc/self/statm")).split()
    if limit == resource.RLIM_INFINITY or not pages:
        return None
    return limit - int(pages[0]) * os.sysconf("SC_PAGE_SIZE")


def _left_of_control_groups(root: Path) -> list[int]:
    """What is left of each limit on the way from our control group up to the topmost one."""
    left = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        group = top / path.lstrip("/")
        for directory in (group, *group.parents):
            left += _left_of_control_group(directory)
            if directory == top:
                break
    return left


def _left_of_control_group(directory: Path) -> list[int]:
    """Its limit less its use, of which file caches do not count; empty where it has no limit."""
    found = []
    for limit_name, use_name in MEMORY_LIMITS:
        limit, use = _text(directory / limit_name), _text(directory / use_name)
        if limit.isdecimal() and use.isdecimal():
            statistics = dict(line.split() for line in _text(directory / "memory.stat").splitlines())
            cache = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
            found.append(int(limit) - int(use) + cache)
    return found


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
    except OSError:
        return ""
