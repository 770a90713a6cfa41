"""What `bench` found: figures of a run, as a table for people, as objects for programs, as curves to plot."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median, pstdev
from typing import Any, ClassVar

import numpy as np

from gossamer.job.report import Result, Table
from gossamer.plots import Curve

GIGA, TERA = 1e9, 1e12
CACHE_BYTES = 300e6  # of decoder linears; fewer may stay in a cache from step to step


@dataclass(frozen=True)
class Spread:
    """One quantity measured `count` times."""

    median: float
    mean: float
    deviation: float
    p99: float
    count: int

    @classmethod
    def of(cls, found: Sequence[float]) -> "Spread":
        return cls(median(found), mean(found), pstdev(found), float(np.quantile(found, 0.99)), len(found))

    @property
    def relative(self) -> str:
        """The deviation as a share of the mean."""
        return f"± {self.deviation / self.mean:.0%}"


@dataclass(frozen=True)
class Speeds(ABC):
    """One setting, as every device has it: the medians of a run, and for each measured quantity its spread.

    `read_gb_per_s` is the best of all readers in the run, to which shares refer. `step_bytes` counts what a
    decode step reads: weights, head and norms, and the cached keys and values (`kv_bytes`) at the mean
    context of the steps. `bound_tokens_per_s` is what the best reader could reach with these bytes,
    `linears_bound_tokens_per_s` the same of the decoder linears alone; `linears` times one token through
    them, and `baseline` the same in dense weights, float32 on a CPU and bfloat16 on a GPU (None without
    --baseline). TOPS are 2 x the multiply-adds of the decoder linears: `prompt_tops` over the whole prompt's
    time.
    """

    model: str
    values: str
    sparsity: float
    batch: int
    prompt: int
    new: int
    repeats: int
    decode_tokens_per_s: float
    step_p50_s: float
    step_p99_s: float
    prompt_tokens_per_s: float
    time_to_first_token_s: float
    kv_bytes: int
    step_bytes: int
    gb_per_s: float
    read_gb_per_s: float
    bandwidth_share: float
    bound_tokens_per_s: float
    linears_bytes: int
    linears_s: float
    linears_gb_per_s: float
    linears_bandwidth_share: float
    linears_bound_tokens_per_s: float
    kv_cache_dtype: str
    baseline_s: float | None
    linears_speedup: float | None
    prompt_tops: float
    steps: Spread
    prompts: Spread
    linears: Spread
    baseline: Spread | None
    impossible: tuple[str, ...]
    notes: tuple[str, ...]

    DENSE: ClassVar[str]  # of the baseline's linears

    @property
    @abstractmethod
    def where(self) -> str:
        """What it ran on, and by which instructions."""

    @classmethod
    def limits(cls, rows: Sequence[Any]) -> str:
        """What the device can do, by the best of all rows."""
        return f"reads {max(row.read_gb_per_s for row in rows):.1f} GB/s"

    def table(self) -> Table:
        """All figures of the row, one a line, with the deviation where a median is shown."""
        title = f"{self.model} on {self.where}, batch {self.batch}, prompt {self.prompt}, {self.new} new, "
        rows = [*self._speeds(), *self._shares()]
        if self.baseline is not None and self.baseline_s is not None:
            milliseconds = f"{1e3 * self.baseline_s:.2f} ms"
            rows.append((f"dense {self.DENSE} linears", milliseconds, self.baseline.relative))
            rows.append(("linears, speed", f"{self.linears_speedup:.1f}x", ""))
        return Table(f"{title}{self.repeats} rounds", ("", "median", "deviation"), rows, to_paste=True)

    def _speeds(self) -> list[tuple[str, str, str]]:
        steps, prompts, linears = self.steps.relative, self.prompts.relative, self.linears.relative
        bound = self.bound_tokens_per_s
        return [
            ("decode", f"{self.decode_tokens_per_s:.1f} tokens/s", steps),
            ("its bound by bytes", f"{bound:.1f} tokens/s", ""),
            ("a step, p50 / p99", f"{1e3 * self.step_p50_s:.2f} / {1e3 * self.step_p99_s:.2f} ms", steps),
            ("prompt", f"{self.prompt_tokens_per_s:.1f} tokens/s", prompts),
            ("time to first token", f"{1e3 * self.time_to_first_token_s:.1f} ms", prompts),
            ("decoder linears, 1 token", f"{1e3 * self.linears_s:.2f} ms", linears),
            ("their bound by bytes", f"{1e3 / self.linears_bound_tokens_per_s:.2f} ms", ""),
        ]

    def _shares(self) -> list[tuple[str, str, str]]:
        kv = f", {self.kv_bytes / 1e6:.1f} MB of them keys and values"
        share = f"{self.bandwidth_share:.0%} of {self.read_gb_per_s:.1f} GB/s"
        return [
            ("bytes a step", f"{self.step_bytes / 1e6:.1f} MB{kv}", ""),
            ("read while decoding", f"{self.gb_per_s:.1f} GB/s", self.steps.relative),
            ("of the best read bandwidth", share, ""),
            ("linears, of the bandwidth", f"{self.linears_bandwidth_share:.0%}", self.linears.relative),
        ]

    def cells(self) -> dict[str, str]:
        """The row in a table of several, by column."""
        found = {
            "weights": f"{self.values} {self.sparsity:.0%}",
            "batch": str(self.batch),
            "context": str(self.prompt),
            "decode tokens/s": f"{self.decode_tokens_per_s:.1f} {self.steps.relative}",
            "bound": f"{self.bound_tokens_per_s:.1f}",
            "step p50 / p99 ms": f"{1e3 * self.step_p50_s:.1f} / {1e3 * self.step_p99_s:.1f}",
            "GB/s": f"{self.gb_per_s:.1f}",
            "of bandwidth": f"{self.bandwidth_share:.0%}",
            "prompt tokens/s": f"{self.prompt_tokens_per_s:.0f} {self.prompts.relative}",
            "first token ms": f"{1e3 * self.time_to_first_token_s:.0f}",
        }
        if self.linears_speedup is not None:
            found[f"linears against dense {self.DENSE}"] = f"{self.linears_speedup:.1f}x"
        return found


@dataclass(frozen=True)
class BenchRow(Speeds):
    """One setting on a CPU.

    `int8_peak_tops` is the best product in registers. `round_share` is the median over the rounds of a
    round's bandwidth share: where neighbours make the memory's speed swing during the run, it compares what
    was measured side by side. `attention` has GB/s of cached keys and values, as many as no cache holds, at a
    context of `prompt`. `prompt_linears` times `prompt_linears_tokens` tokens through the decoder linears,
    and `prompt_linears_tops` is over that time.
    """

    file: str
    file_bytes: int
    cpu: str
    isa: str
    num_threads: int
    round_share: float
    attention_gb_per_s: float
    attention_bandwidth_share: float
    prompt_linears_tops: float
    prompt_linears_tokens: int
    int8_peak_tops: float
    prompt_peak_share: float
    prompt_linears_peak_share: float
    prompt_linears: Spread
    attention: Spread
    reads_gb_per_s: Spread

    DENSE = "float32"

    @property
    def where(self) -> str:
        return f"{self.cpu}: {self.num_threads} threads, {self.isa}"

    @classmethod
    def limits(cls, rows: Sequence[Any]) -> str:
        return f"{super().limits(rows)}, INT8 peak {max(row.int8_peak_tops for row in rows):.2f} TOPS"

    def _shares(self) -> list[tuple[str, str, str]]:
        tokens = self.prompt_linears_tokens
        linears = f"{self.prompt_linears_tops:.2f} TOPS, {self.prompt_linears_peak_share:.0%}"
        peak = f"{self.prompt_peak_share:.0%} of {self.int8_peak_tops:.2f} TOPS"
        return [
            *super()._shares(),
            ("of the best reader of its round", f"{self.round_share:.0%}", self.reads_gb_per_s.relative),
            (
                f"attention, {self.prompt} {self.kv_cache_dtype} positions",
                f"{self.attention_gb_per_s:.1f} GB/s, {self.attention_bandwidth_share:.0%}",
                self.attention.relative,
            ),
            ("whole prompt", f"{self.prompt_tops:.2f} TOPS, {peak}", ""),
            (f"linears, {tokens} tokens", f"{linears} of it", self.prompt_linears.relative),
        ]

    def cells(self) -> dict[str, str]:
        return super().cells() | {"linears of INT8 peak": f"{self.prompt_linears_peak_share:.0%}"}


@dataclass(frozen=True)
class GpuRow(Speeds):
    """One setting on a GPU: a decoder in CUDA graphs, as servers run it. Keys and values are bfloat16."""

    gpu: str
    layers: int

    DENSE = "bfloat16"

    @property
    def where(self) -> str:
        return self.gpu

    def _shares(self) -> list[tuple[str, str, str]]:
        return [*super()._shares(), ("whole prompt", f"{self.prompt_tops:.2f} TOPS", "")]


def speeds(
    *,
    batch: int,
    prompt: int,
    step_bytes: int,
    linears_bytes: int,
    num_weights: int,
    read: float,
    steps: Sequence[float],
    prompts: Sequence[float],
    linears: Sequence[float],
    baseline: Sequence[float],
) -> dict[str, Any]:
    """The fields of `Speeds` that follow from seconds, bytes, and what the best reader reads a second.

    `num_weights`: of the decoder linears, zeros included.
    """
    step_s, linears_s, prompt_s = map(median, (steps, linears, prompts))
    baseline_s = median(baseline) if baseline else None
    return {
        "batch": batch,
        "prompt": prompt,
        "decode_tokens_per_s": batch / step_s,
        "step_p50_s": step_s,
        "step_p99_s": Spread.of(steps).p99,
        "prompt_tokens_per_s": batch * prompt / prompt_s,
        "time_to_first_token_s": prompt_s,
        "step_bytes": step_bytes,
        "gb_per_s": step_bytes / step_s / GIGA,
        "read_gb_per_s": read / GIGA,
        "bandwidth_share": step_bytes / step_s / read,
        "bound_tokens_per_s": batch * read / step_bytes,
        "linears_bytes": linears_bytes,
        "linears_s": linears_s,
        "linears_gb_per_s": linears_bytes / linears_s / GIGA,
        "linears_bandwidth_share": linears_bytes / linears_s / read,
        "linears_bound_tokens_per_s": read / linears_bytes,
        "baseline_s": baseline_s,
        "linears_speedup": None if baseline_s is None else baseline_s / linears_s,
        "prompt_tops": 2 * num_weights * batch * prompt / prompt_s / TERA,
        "steps": Spread.of(steps),
        "prompts": Spread.of(prompts),
        "linears": Spread.of(linears),
        "baseline": Spread.of(baseline) if baseline else None,
    }


@dataclass(frozen=True)
class BenchResult(Result):
    """A row for every setting of the sweep, in the order measured."""

    rows: tuple[Speeds, ...]
    picture: str | None = None

    @property
    def row(self) -> Any:
        """The only row of a run that is no sweep."""
        [row] = self.rows
        return row

    def objects(self) -> tuple[Speeds, ...]:
        """What --json prints, one a line."""
        return self.rows

    def tables(self) -> list[Table]:
        if len(self.rows) == 1:
            return [self.row.table()]
        first, cells = self.rows[0], [row.cells() for row in self.rows]
        title = f"{first.where}, {first.repeats} rounds, {first.limits(self.rows)}"
        return [Table(title, tuple(cells[0]), [tuple(it.values()) for it in cells], to_paste=True)]

    @property
    def closing(self) -> tuple[str, ...]:
        """What is wrong with the run, what to know of it, and where its files are."""
        texts = [f"WRONG: {text}" for row in self.rows for text in row.impossible]
        if small := [row.linears_bytes for row in self.rows if row.linears_bytes < CACHE_BYTES]:
            texts.append(
                f"{len(small)} of {len(self.rows)} rows: decoder linears of {min(small) / 1e6:.0f} MB may "
                f"stay in a cache; {CACHE_BYTES / 1e6:.0f} MB or more tell the memory's speed."
            )
        texts += [note for row in self.rows for note in row.notes]
        texts += [f"Picture: {self.picture}"] if self.picture else []
        return tuple(dict.fromkeys(texts))

    def curves(self) -> list[Curve]:
        """Decode speed over sparsity for each value type, with the bound by the best reader of all rows."""
        read = GIGA * max(row.read_gb_per_s for row in self.rows)
        return [
            Curve(
                values,
                [row.sparsity for row in self.rows if row.values == values],
                [row.decode_tokens_per_s for row in self.rows if row.values == values],
                [read * row.batch / row.step_bytes for row in self.rows if row.values == values],
            )
            for values in dict.fromkeys(row.values for row in self.rows)
        ]
