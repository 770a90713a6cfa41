"""`doctor`: what this machine is, what the engine makes of it, and what would make it faster."""

import os
from dataclasses import dataclass
from importlib import metadata

import numpy as np

from gossamer import _native, machine
from gossamer.errors import ConfigError
from gossamer.gpu.found import found_gpus
from gossamer.job.options import option
from gossamer.job.report import Event, Progress, Result, Table, quiet
from gossamer.measure.readers import Readers

# What native/base/processor_x86.cpp asks CPUID for on each level, under Linux's names; a level needs those
# of the level that it builds on as well.
LEVEL_FLAGS = {
    "avx2": ("fma", "popcnt", "avx", "bmi1", "avx2", "bmi2"),
    "avx512": (
        *("avx512f", "avx512dq", "avx512bw", "avx512vl"),
        *("avx512vbmi", "avx512_vbmi2", "avx512_vnni"),
    ),
    "avx512-bf16": ("avx512_bf16",),
    "amx": ("amx_bf16", "amx_tile", "amx_int8"),
}
COSTS = {
    "avx2": "the plain loops of `scalar` run, many times slower at everything",
    "avx512": "zeros are expanded by table look-ups and INT8 is multiplied as 16-bit words: decoding is "
    "bound by instructions instead of memory, and prompts take several times as long",
    "avx512-bf16": "GOSSAMER_ISA cannot ask for rounded inputs of bfloat16 weights",
    "amx": "prompts and large batches go through vector instructions, an eighth of the multiplications a "
    "cycle; decoding one sequence loses nothing",
}
NAMED = {  # levels that are chosen only where GOSSAMER_ISA names them
    "avx512-bf16": "only if GOSSAMER_ISA names it: prompts round the inputs of bfloat16 weights, for half "
    "the instructions (on AMD; slower on Intel)",
}
PROMPTS = {  # what zeros gain there, by level
    "scalar": "gain nothing from zeros",
    "avx2": "gain nothing from zeros: they are expanded first",
    "avx512": "of INT8 skip zeros that come in blocks of 4, or are many (pack --for prompts)",
    "avx512-bf16": "of INT8 skip zeros that come in blocks of 4, or are many (pack --for prompts); "
    "those of bfloat16 weights round inputs to bfloat16, and multiply two at a time",
    "amx": "run on dense tiles, which outrun what zeros would save: those save bytes, and time in decoding",
}
PACKAGES = (
    *("gossamer", "numpy", "tokenizers", "jinja2", "msgspec", "starlette", "uvicorn"),
    *("torch", "transformers", "trl", "compressed-tensors"),
)
BITS_PER_WEIGHT = 3.4  # INT8 at 70% zeros
REPEATS = 3


@dataclass(frozen=True)
class Doctor:
    """Find out why this machine is fast or slow."""

    megabytes: int = option(512, help="memory to read in the measurement; more than the caches hold")


@dataclass(frozen=True)
class Level:
    """A level of instructions: what this CPU lacks for it, or the INT8 peak of all threads where it runs."""

    isa: str
    lacks: tuple[str, ...]
    capped: bool
    int8_tops: float | None

    @property
    def is_here(self) -> bool:
        """Whether this machine could run it, but for a cap."""
        return self.int8_tops is not None or (self.capped and not self.lacks)

    @property
    def text(self) -> str:
        if self.isa in NAMED and self.is_here:
            return NAMED[self.isa]
        if self.int8_tops is not None:
            return f"yes; INT8 in registers {self.int8_tops:.3g} TOPS"
        if self.lacks:
            return f"lacks {', '.join(self.lacks)}: {COSTS[self.isa]}"
        if self.capped:
            return "yes, but GOSSAMER_ISA caps it"
        return "this CPU has it, but the system does not grant it (an old kernel, or a sandbox)"


@dataclass(frozen=True)
class DoctorResult(Result):
    """What was found; rates in 10^9 bytes a second, the best of several readers; memory 0 where unknown."""

    cpu: str
    isa: str
    isa_reason: str
    levels: tuple[Level, ...]
    cores: machine.Cores
    num_threads: int
    memory_bytes: int
    memory_available_bytes: int
    huge_pages: str
    read_1_thread_gb_per_s: float
    read_all_threads_gb_per_s: float
    gpus: tuple[str, ...]
    packages: dict[str, str]
    closing: tuple[str, ...]

    def tables(self) -> list[Table]:
        """One table of facts."""
        quota = "" if self.cores.quota is None else f", quota {self.cores.quota:g}"
        bound = 8e9 * max(self.read_1_thread_gb_per_s, self.read_all_threads_gb_per_s) / BITS_PER_WEIGHT / 1e9
        rows = [
            ("CPU", self.cpu),
            ("kernels", f"{self.isa}: {self.isa_reason}"),
            *((f"has {level.isa}", level.text) for level in self.levels),
            ("prompts here", PROMPTS[self.isa]),
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
            *(("GPU", it) for it in self.gpus),
            *((name, version) for name, version in self.packages.items()),
        ]
        return [Table("", ("", ""), rows)]


def doctor(job: Doctor, progress: Progress = quiet) -> DoctorResult:
    """Look and measure; takes about a second."""
    if job.megabytes < 1:
        raise ConfigError(f"megabytes is {job.megabytes}; expected at least 1.")
    num_threads = machine.default_threads()
    progress(Event("doctor", f"reading {job.megabytes} MB of memory", 0, 1))
    one, all_threads = _read_rates(job.megabytes << 20, num_threads)
    levels = _levels(num_threads)
    usable = {*COSTS, "scalar"} - {*NAMED} | {_native.isa()}
    best = [level.isa for level in levels if level.is_here and level.isa in usable][-1]
    progress(Event("doctor", "done", 1, 1))
    packages = {name: _version(name) for name in PACKAGES}
    return DoctorResult(
        cpu=machine.cpu_model(),
        isa=_native.isa(),
        isa_reason=_isa_reason(best),
        levels=levels,
        cores=machine.cores(),
        num_threads=num_threads,
        memory_bytes=machine.memory_bytes() or 0,
        memory_available_bytes=machine.available_memory_bytes() or 0,
        huge_pages=machine.huge_pages(),
        read_1_thread_gb_per_s=one / 1e9,
        read_all_threads_gb_per_s=all_threads / 1e9,
        gpus=tuple(found_gpus()),
        packages=packages,
        closing=tuple(_advice(best, num_threads, one, all_threads, packages)),
    )


def _levels(num_threads: int) -> tuple[Level, ...]:
    """Every level, the lowest first; what a level lacks, those above lack as well.

    One without INT8 kernels of its own runs those of the level below.
    """
    found, lacks, flags, peak = [], (), machine.cpu_flags(), None
    own = {row["isa"] for row in _native.kernels() if row["family"] == "multiply_int8"}
    names = ("scalar", *LEVEL_FLAGS)
    for isa in names:
        lacks += tuple(flag for flag in LEVEL_FLAGS.get(isa, ()) if flag not in flags)
        capped = names.index(isa) > names.index(os.environ.get("GOSSAMER_ISA") or names[-1])
        if not _native.levels()[isa]:
            peak = None
        elif isa in own:
            peak = 2 * _native.int8_peak(isa, num_threads, 5) / 1e12
        found.append(Level(isa, lacks, capped, peak))
    return tuple(found)


def _isa_reason(best: str) -> str:
    """Why the engine uses the native kernels of the level that it uses."""
    if _native.isa() == best:
        return "the best that this machine has"
    return f"capped by GOSSAMER_ISA={os.environ.get('GOSSAMER_ISA')}; this machine could run {best}"


def _advice(
    best: str, num_threads: int, one: float, all_threads: float, packages: dict[str, str]
) -> list[str]:
    """What would make this machine faster, each thing only where it is true."""
    found, advice = machine.cores(), []
    if _native.isa() != best:
        advice.append(f"Unset GOSSAMER_ISA to use this machine's {best}.")
    if best in ("scalar", "avx2"):
        advice.append(
            "A CPU with AVX-512 VNNI and VBMI2 (Intel since Ice Lake, AMD since Zen 4) would be several "
            "times faster."
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


def _read_rates(num_bytes: int, num_threads: int) -> tuple[float, float]:
    """Bytes/s of the fastest reader on one thread, and on all."""
    buffer = np.ones(num_bytes, np.uint8)  # pages never written would all be the one page of zeros
    readers, best = Readers.of(buffer, num_threads), {1: 0.0, num_threads: 0.0}
    for _ in range(REPEATS):
        for reader, rate in readers.rates().items():
            best[reader.num_threads] = max(rate, best.get(reader.num_threads, 0.0))
    return best[1], best[num_threads]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
