"""How `bench` measures: in rounds, so that everything sees the same machine.

A round is a prompt, all readers of memory, the decode steps, the decoder linears and attention alone,
int8 in registers.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal

import numpy as np

from gossamer import _native
from gossamer.architecture.anatomy import Anatomy
from gossamer.job.report import Event, Progress
from gossamer.machine import cpu_model
from gossamer.measure.readers import Readers, impossible
from gossamer.measure.report import GIGA, TERA, BenchRow, Spread, speeds
from gossamer.packed.reader import Packed

Kv = Literal["f32", "bf16", "i8"]

MIN_READS = 5  # rounds of all readers, whatever --repeats says
MAX_TOKENS = 256  # that the engine passes through a layer at once
WARM_TOKENS = 64


@dataclass(frozen=True)
class Setting:
    """`batch` sequences of `prompt` tokens each, then `new` decode steps; `repeats` times."""

    batch: int
    prompt: int
    new: int
    repeats: int

    @property
    def linears_tokens(self) -> int:
        return min(self.batch * self.prompt, MAX_TOKENS)

    @property
    def mean_context(self) -> float:
        """Positions that a decode step attends to, its own token included."""
        return self.prompt + (self.new + 1) / 2


@dataclass(frozen=True, eq=False)
class Subject:
    """An open model, and what it is measured against."""

    packed: Packed
    values: str
    sparsity: float
    kv: Kv
    model: _native.Model
    readers: Readers
    baseline: "Baseline | None"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Baseline:
    """Dense float32 layers of a shape; all of its layers take `scale` times as long."""

    model: _native.Model
    scale: float


@dataclass
class Samples:
    """Of every round: seconds, bytes/s of the best reader and of attention, and multiply-adds/s."""

    steps: list[float] = field(default_factory=list)
    prompts: list[float] = field(default_factory=list)
    linears: list[float] = field(default_factory=list)
    prompt_linears: list[float] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    products: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)

    def round_share(self, step_bytes: float) -> float:
        """The median over the rounds of a round's bytes/s as a share of its best reader's."""
        rounds = np.array_split(self.steps, len(self.reads))
        rates = [step_bytes / median(steps) for steps in rounds]
        return float(median(rate / read for rate, read in zip(rates, self.reads, strict=True)))


def measure(subject: Subject, setting: Setting, progress: Progress) -> BenchRow:
    """Measure one setting, after a short round to warm up."""
    what = f"{subject.values} {subject.sparsity:.0%}, batch {setting.batch}, prompt {setting.prompt}"
    progress(Event("bench", f"{what}: warming up", 0, setting.repeats))
    _round(subject, replace(setting, prompt=min(setting.prompt, WARM_TOKENS), new=2), Samples())
    samples = Samples()
    for round in range(setting.repeats):
        progress(Event("bench", what, round, setting.repeats))
        _round(subject, setting, samples)
    progress(Event("bench", what, setting.repeats, setting.repeats))
    return summary(subject, setting, samples)


def _round(subject: Subject, setting: Setting, samples: Samples) -> None:
    """Everything once; in turns, with the readers between prompt and decoding."""
    model, rng = subject.model, np.random.default_rng(0)
    vocabulary = subject.packed.architecture.vocab_size
    ids = [rng.integers(0, vocabulary, setting.prompt).astype(np.int32) for _ in range(setting.batch)]
    sequences = [model.new_sequence(setting.prompt + setting.new) for _ in ids]
    seconds, chosen = step(model, sequences, ids)
    samples.prompts.append(seconds)
    samples.reads.append(subject.readers.best(-(-MIN_READS // setting.repeats)))
    for _ in range(setting.new):
        seconds, chosen = step(model, sequences, np.split(chosen, setting.batch))
        samples.steps.append(seconds)
    samples.linears += model.time_linears(2)
    if subject.baseline is not None:
        samples.baseline += [subject.baseline.scale * s for s in subject.baseline.model.time_linears(2)]
    samples.prompt_linears += model.time_linears(1, setting.linears_tokens)
    num_bytes, seconds = model.time_attention(setting.prompt, 3)
    samples.attention += [num_bytes / s for s in seconds[1:]]
    samples.products.append(_native.int8_peak(_native.isa(), model.num_threads, 3))


def step(
    model: _native.Model, sequences: list[_native.Sequence], ids: Sequence[np.ndarray]
) -> tuple[float, np.ndarray]:
    """Seconds of a step, the greedy choice of every sequence's next token included, and these tokens."""
    begin = time.perf_counter()
    chosen = model.forward(sequences, ids).argmax(axis=1).astype(np.int32)
    return time.perf_counter() - begin, chosen


def kv_bytes(anatomy: Anatomy, context: float, dtype: Kv) -> int:
    """Bytes of keys and values that one new token of a sequence of `context` tokens reads, in all layers.

    i8 has a float32 scale for each position and key/value head. A layer reads its window and no more.
    """
    heads, windows = anatomy.attention, [block.attention.window for block in anatomy.blocks]
    positions = sum(context if window is None else min(context, window) for window in windows)
    head_bytes = {"f32": 4, "bf16": 2, "i8": 1}[dtype] * heads.head_dim + (4 if dtype == "i8" else 0)
    return round(2 * heads.num_kv_heads * head_bytes * positions)


def summary(subject: Subject, setting: Setting, samples: Samples) -> BenchRow:
    """All figures of a setting from its samples."""
    packed, best, peak = subject.packed, max(samples.reads), 2 * max(samples.products)
    kv = setting.batch * kv_bytes(packed.architecture, setting.mean_context, subject.kv)
    num_weights = sum(packed.matrices[name].num_weights for name in packed.decoder)
    found = speeds(
        batch=setting.batch,
        prompt=setting.prompt,
        step_bytes=subject.model.bytes_per_step + kv,
        linears_bytes=sum(map(packed.matrix_bytes, packed.decoder)),
        num_weights=num_weights,
        read=best,
        steps=samples.steps,
        prompts=samples.prompts,
        linears=samples.linears,
        baseline=samples.baseline,
    )
    linears_rate = 2 * num_weights * setting.linears_tokens / median(samples.prompt_linears)
    shares = {
        "read while decoding": found["bandwidth_share"],
        "read by the linears": found["linears_bandwidth_share"],
        "read by attention": median(samples.attention) / best,
        "whole prompt": TERA * found["prompt_tops"] / peak,
        "linears of a prompt": linears_rate / peak,
    }
    return BenchRow(
        **found,
        model=packed.path.name,
        file=str(packed.path),
        file_bytes=packed.file_bytes,
        values=subject.values,
        sparsity=subject.sparsity,
        cpu=cpu_model(),
        isa=_native.isa(),
        num_threads=subject.model.num_threads,
        new=setting.new,
        repeats=setting.repeats,
        kv_bytes=kv,
        round_share=samples.round_share(found["step_bytes"]),
        kv_cache_dtype=subject.kv,
        attention_gb_per_s=median(samples.attention) / GIGA,
        attention_bandwidth_share=shares["read by attention"],
        prompt_linears_tops=linears_rate / TERA,
        prompt_linears_tokens=setting.linears_tokens,
        int8_peak_tops=peak / TERA,
        prompt_peak_share=shares["whole prompt"],
        prompt_linears_peak_share=shares["linears of a prompt"],
        prompt_linears=Spread.of(samples.prompt_linears),
        attention=Spread.of([rate / GIGA for rate in samples.attention]),
        reads_gb_per_s=Spread.of([read / GIGA for read in samples.reads]),
        impossible=impossible(shares),
        notes=subject.notes,
    )
