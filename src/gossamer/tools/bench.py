"""`bench`: tokens per second beside gigabytes per second and the share of what memory can give."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np

from gossamer import _native
from gossamer.engine import native_model
from gossamer.engine.machine import cpu_model, default_threads
from gossamer.errors import ConfigError, UnsupportedError
from gossamer.job import option
from gossamer.packed import Packed
from gossamer.packing import cached_pack
from gossamer.report import Event, Progress, Table, quiet
from gossamer.tools.readers import best_bandwidth
from gossamer.tools.synthetic import CONFIGS, Recipe, synthetic_file
from gossamer.tools.tour import CpuTour, LayerSpeed, cpu_tour

__all__ = ["Bench", "BenchResult", "CpuTour", "LayerSpeed", "bench", "cpu_tour"]

BASELINE_BYTES = 600e6  # dense float32 layers measured beside: enough to defeat every cache


@dataclass(frozen=True)
class Bench:
    """Measure MODEL, or a synthetic model of a real shape: decoding, prompts, and memory, in turns."""

    model: str | None = option(None, help="a .goss file or a checkpoint directory", positional=True)
    shape: Literal["llama-2-7b", "llama-3.2-1b", "tinyllama-1.1b"] | None = option(
        None, help="a synthetic model of this shape instead (kept in the cache)"
    )
    layers: int | None = option(None, help="decoder layers of the synthetic model (default: all)")
    sparsity: float = option(0.7, help="fraction of zeros in its decoder linears (int8; others are dense)")
    values: Literal["f32", "bf16", "i8", "i4"] = option(
        "i8", help="its value type; i8 also stores the head in int8"
    )
    prompt: int = option(64, help="tokens in the prompt", short="-p")
    new: int = option(32, help="tokens to decode", short="-n")
    batch: int = option(1, help="sequences at once", short="-b")
    threads: int | None = option(None, help="threads (default: physical cores)", short="-t")
    kv_cache_dtype: Literal["auto", "f32", "bf16", "i8"] = option(
        "auto", help="type of cached keys and values (auto: f32 for float32 models, else bf16)"
    )
    repeats: int = option(5, help="rounds; medians are reported", short="-r")
    baseline: bool = option(False, help="also time dense float32 decoder linears of the same shape")


@dataclass(frozen=True)
class BenchResult:
    """Medians of a run; `read_gb_per_s` is the best of all readers in it, `bandwidth_share` refers to that.

    `round_share` is the median over the rounds of the same ratio within a round: where neighbours make the
    memory's speed swing during the run, it compares what was measured side by side.

    `gb_per_s` counts the file bytes that a decode step touches. `linears_s` is one token through all decoder
    linears, `baseline_s` the same in dense float32 (None without --baseline).
    """

    model: str
    cpu: str
    isa: str
    num_threads: int
    batch: int
    decode_tokens_per_s: float
    step_p50_s: float
    step_p99_s: float
    prompt_tokens_per_s: float
    time_to_first_token_s: float
    step_bytes: int
    gb_per_s: float
    read_gb_per_s: float
    bandwidth_share: float
    round_share: float
    linears_s: float
    baseline_s: float | None
    linears_speedup: float | None

    def tables(self) -> list[Table]:
        title = f"{self.model} on {self.cpu}: {self.num_threads} threads, {self.isa}, batch {self.batch}"
        rows = [
            ("decode", f"{self.decode_tokens_per_s:.1f} tokens/s"),
            ("a step, p50 / p99", f"{1e3 * self.step_p50_s:.2f} / {1e3 * self.step_p99_s:.2f} ms"),
            ("prompt", f"{self.prompt_tokens_per_s:.1f} tokens/s"),
            ("time to first token", f"{1e3 * self.time_to_first_token_s:.1f} ms"),
            ("bytes a step", f"{self.step_bytes / 1e6:.1f} MB"),
            ("read while decoding", f"{self.gb_per_s:.1f} GB/s"),
            ("of the best read bandwidth", f"{self.bandwidth_share:.0%} of {self.read_gb_per_s:.1f} GB/s"),
            ("of the best reader of its round", f"{self.round_share:.0%}"),
            ("decoder linears", f"{1e3 * self.linears_s:.2f} ms"),
        ]
        if self.baseline_s is not None:
            rows.append(("dense float32 linears", f"{1e3 * self.baseline_s:.2f} ms"))
            rows.append(("linears, speed", f"{self.linears_speedup:.1f}x"))
        return [Table(title, ("", "median"), rows)]


@dataclass
class Samples:
    """Seconds and bytes/s of every round."""

    steps: list[float] = field(default_factory=list)
    prompts: list[float] = field(default_factory=list)
    linears: list[float] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)


def bench(job: Bench, progress: Progress = quiet) -> BenchResult:
    """Measure in rounds: readers, prompt, decode steps, linears (and the baseline's) take turns."""
    check(job)
    threads = default_threads() if job.threads is None else job.threads
    packed = Packed.open(model_file(job, progress))
    model = native_model(packed, threads, job.kv_cache_dtype)
    dense, scale = baseline(job, packed, threads, progress)
    ids = prompts(job, packed.architecture.vocab_size)
    sequences = [model.new_sequence(job.prompt + job.new) for _ in ids]
    samples = Samples()
    for round in range(job.repeats + 1):
        progress(Event("bench", "warming up" if round == 0 else "measuring", round, job.repeats))
        found = Samples() if round == 0 else samples
        found.read.append(best_bandwidth(packed.buffer, threads))
        generate(model, sequences, ids, job.new, found)
        found.linears += model.time_linears(2)
        found.baseline += [scale * seconds for seconds in dense.time_linears(2)] if dense else []
    return summary(job, packed, model, samples)


def check(job: Bench) -> None:
    """ConfigError unless exactly one of a model and a shape is given, with sensible numbers."""
    if (job.model is None) == (job.shape is None):
        raise ConfigError(f"give either MODEL or --shape ({', '.join(CONFIGS)}), not both and not neither")
    for name in ("prompt", "new", "batch", "repeats", "layers", "threads"):
        if (number := getattr(job, name)) is not None and number < 1:
            raise ConfigError(f"--{name} is {number}; expected at least 1")
    if not 0 <= job.sparsity < 1:
        raise ConfigError(f"--sparsity is {job.sparsity}; expected at least 0 and below 1")


def model_file(job: Bench, progress: Progress) -> Path:
    """The packed file to measure; a directory is packed, a shape written, into the cache."""
    if job.shape is not None:
        if job.values == "i4":
            raise UnsupportedError("int4 weights are not supported yet; use --values i8, bf16 or f32")
        sparsity = job.sparsity if job.values == "i8" else 0.0
        return synthetic_file(Recipe.of(job.shape, job.values, sparsity, job.layers), progress)
    assert job.model is not None
    path = Path(job.model)
    return cached_pack(path, progress) if path.is_dir() else path


def baseline(
    job: Bench, packed: Packed, threads: int, progress: Progress
) -> tuple[_native.Model | None, float]:
    """Dense float32 layers of the same shape, as many as no cache holds, and the factor to all layers."""
    if not job.baseline:
        return None, 1.0
    if job.shape is None:
        raise ConfigError("--baseline needs --shape: it compares with dense float32 layers of that shape")
    num_layers = packed.architecture.num_layers
    layer_bytes = 4 * sum(rows * columns for rows, columns in packed.architecture.linear_shapes(0).values())
    measured = min(num_layers, int(-(-BASELINE_BYTES // layer_bytes)))
    path = synthetic_file(Recipe.of(job.shape, "f32", 0.0, measured, vocabulary=256), progress)
    return native_model(Packed.open(path), threads), num_layers / measured


def prompts(job: Bench, vocabulary: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocabulary, job.prompt).astype(np.int32) for _ in range(job.batch)]


def generate(
    model: _native.Model, sequences: list[_native.Sequence], ids: list[np.ndarray], new: int, samples: Samples
) -> None:
    """One prompt, then `new` greedy steps, each timed on its own with the choice of its token."""
    for sequence in sequences:
        sequence.truncate(0)
    begin = time.perf_counter()
    chosen = model.forward(sequences, ids).argmax(axis=1).astype(np.int32)
    samples.prompts.append(time.perf_counter() - begin)
    for _ in range(new):
        begin = time.perf_counter()
        rows = [chosen[index : index + 1] for index in range(len(sequences))]
        chosen = model.forward(sequences, rows).argmax(axis=1).astype(np.int32)
        samples.steps.append(time.perf_counter() - begin)


def summary(job: Bench, packed: Packed, model: _native.Model, samples: Samples) -> BenchResult:
    step, best = median(samples.steps), max(samples.read)
    rate, first = model.bytes_per_step / step, median(samples.prompts)
    linears = median(samples.linears)
    dense = median(samples.baseline) if samples.baseline else None
    rounds = np.array_split(samples.steps, len(samples.read))
    shares = [
        model.bytes_per_step / median(steps) / read for steps, read in zip(rounds, samples.read, strict=True)
    ]
    return BenchResult(
        model=packed.path.name,
        cpu=cpu_model(),
        isa=_native.isa(),
        num_threads=model.num_threads,
        batch=job.batch,
        decode_tokens_per_s=job.batch / step,
        step_p50_s=step,
        step_p99_s=float(np.quantile(samples.steps, 0.99)),
        prompt_tokens_per_s=job.batch * job.prompt / first,
        time_to_first_token_s=first,
        step_bytes=model.bytes_per_step,
        gb_per_s=rate / 1e9,
        read_gb_per_s=best / 1e9,
        bandwidth_share=rate / best,
        round_share=float(median(shares)),
        linears_s=linears,
        baseline_s=dense,
        linears_speedup=None if dense is None else dense / linears,
    )
