"""`doctor`: what this machine is, what the engine makes of it, and what would make it faster."""

import mmap
import os
from dataclasses import dataclass
from importlib import metadata

import numpy as np

from gossamer import _native
from gossamer.engine import machine
from gossamer.errors import ConfigError
from gossamer.job import option
from gossamer.report import Event, Progress, Table, quiet
from gossamer.tools.readers import PREFETCH_BYTES

# What native/isa.cpp asks CPUID for, under Linux's names.
AVX512_FLAGS = (
    *("fma", "popcnt", "avx512f", "avx512dq", "avx512bw", "avx512vl"),
    *("avx512vbmi", "avx512_vbmi2", "avx512_vnni"),
)
PACKAGES = (
    *("gossamer", "numpy", "tokenizers", "jinja2", "msgspec", "starlette", "uvicorn"),
    *("torch", "transformers", "trl", "compressed-tensors"),
)
BITS_PER_WEIGHT = 3.4  # INT8 at 70% zeros


@dataclass(frozen=True)
class Doctor:
    """Find out why this machine is fast or slow."""

    megabytes: int = option(512, help="memory to read in the measurement; more than the caches hold")


@dataclass(frozen=True)
class DoctorResult:
    """What was found; rates in 10^9 bytes a second, the best of several readers."""

    cpu: str
    isa: str
    isa_reason: str
    cores: machine.Cores
    num_threads: int
    memory_bytes: int
    memory_available_bytes: int
    huge_pages: str
    read_1_thread_gb_per_s: float
    read_all_threads_gb_per_s: float
    packages: dict[str, str]
    closing: tuple[str, ...]

    def tables(self) -> list[Table]:
        """One table of facts."""
        quota = "" if self.cores.quota is None else f", quota {self.cores.quota:g}"
        bound = 8e9 * max(self.read_1_thread_gb_per_s, self.read_all_threads_gb_per_s) / BITS_PER_WEIGHT / 1e9
        rows = [
            ("CPU", self.cpu),
            ("kernels", f"{self.isa}: {self.isa_reason}"),
            ("cores", f"{self.cores.physical} ({self.cores.logical} logical{quota})"),
            ("threads used", str(self.num_threads)),
            (
                "memory",
                f"{self.memory_bytes / 1e9:.1f} GB, {self.memory_available_bytes / 1e9:.1f} GB available",
            ),
            ("transparent huge pages", self.huge_pages),
            ("reads, 1 thread", f"{self.read_1_thread_gb_per_s:.1f} GB/s"),
            (f"reads, {self.num_threads} threads", f"{self.read_all_threads_gb_per_s:.1f} GB/s"),
            ("at most, 10^9 weights INT8, 70% zeros", f"{bound:.0f} tokens/s"),
            *((name, version) for name, version in self.packages.items()),
        ]
        return [Table("", ("", ""), rows)]


def doctor(job: Doctor, progress: Progress = quiet) -> DoctorResult:
    """Look and measure; takes about a second."""
    if job.megabytes < 1:
        raise ConfigError(f"megabytes is {job.megabytes}; expected at least 1.")
    num_threads = machine.default_threads()
    progress(Event("doctor", f"reading {job.megabytes} MB of memory", 0, 1))
    buffer = _touched(job.megabytes << 20)
    one, all_threads = (_best_rate(buffer, threads) for threads in (1, num_threads))
    progress(Event("doctor", "done", 1, 1))
    memory_bytes, available_bytes = machine.memory_bytes()
    packages = {name: _version(name) for name in PACKAGES}
    return DoctorResult(
        cpu=machine.cpu_model(),
        isa=_native.isa(),
        isa_reason=_isa_reason(),
        cores=machine.cores(),
        num_threads=num_threads,
        memory_bytes=memory_bytes,
        memory_available_bytes=available_bytes,
        huge_pages=machine.huge_pages(),
        read_1_thread_gb_per_s=one / 1e9,
        read_all_threads_gb_per_s=all_threads / 1e9,
        packages=packages,
        closing=tuple(_advice(num_threads, one, all_threads, packages)),
    )


def _isa_reason() -> str:
    """Why the engine uses the kernels that it uses."""
    missing = [flag for flag in AVX512_FLAGS if flag not in machine.cpu_flags()]
    if missing:
        return f"this CPU lacks {', '.join(missing)}"
    if _native.isa() == "avx512":
        return "this CPU has AVX-512 with VNNI and VBMI2"
    return f"capped by GOSSAMER_ISA={os.environ.get('GOSSAMER_ISA')}; this CPU could run avx512"


def _advice(num_threads: int, one: float, all_threads: float, packages: dict[str, str]) -> list[str]:
    """What would make this machine faster, each thing only where it is true."""
    found, advice = machine.cores(), []
    if _native.isa() == "scalar":
        advice.append(
            "Unset GOSSAMER_ISA to use this CPU's AVX-512."
            if set(AVX512_FLAGS) <= machine.cpu_flags()
            else "The scalar kernels are many times slower than a CPU with AVX-512 VNNI and VBMI2 "
            "(Intel since Ice Lake, AMD since Zen 4)."
        )
    if found.quota is not None and found.quota < found.physical:
        advice.append(f"The container gets {found.quota:g} of {found.physical} cores: raise its CPU quota.")
    if num_threads < min(found.physical, found.quota or found.physical) and all_threads > 1.1 * one:
        advice.append(f"GOSSAMER_THREADS={num_threads} leaves cores of {found.physical} unused: unset it.")
    if num_threads > found.logical:
        advice.append(f"{num_threads} threads share {found.logical} processors: lower GOSSAMER_THREADS.")
    if (load := os.getloadavg()[0]) > 0.5 * found.logical:
        advice.append(
            f"Other programs are busy (load {load:.1f} on {found.logical} processors): they slow the engine, "
            "and the rates above."
        )
    if num_threads > 1 and all_threads < 1.2 * one:
        advice.append("Memory is the limit, not cores: one thread reads nearly as fast as all of them.")
    if packages["torch"] == "not installed":
        advice.append("To prune, train and quantize here: pip install 'gossamer[compress]'.")
    return advice


def _touched(num_bytes: int) -> np.ndarray:
    """Page-aligned memory that is really there: pages never written would all be the one page of zeros."""
    buffer = np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
    buffer[:] = 1
    return buffer


def _best_rate(buffer: np.ndarray, num_threads: int) -> float:
    """Bytes/s of the fastest of the plain and the prefetching readers."""
    return max(
        rate for ahead in PREFETCH_BYTES for rate in _native.read_bandwidth(num_threads, ahead, buffer, 3)
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
