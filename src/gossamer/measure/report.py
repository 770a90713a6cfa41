"""What `bench` found: figures of a run, as a table for people, as objects for programs, as curves to plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median, pstdev

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
class BenchRow:
    """One setting: the medians of a run, and for each measured quantity its spread.

    `read_gb_per_s` is the best of all readers in the run, `int8_peak_tops` the best product in registers:
    shares refer to these two. `round_share` is the median over the rounds of a round's bandwidth share: where
    neighbours make the memory's speed swing during the run, it compares what was measured side by side.

    `step_bytes` counts what a decode step reads: weights, head and norms of the file, and the cached keys and
    values (`kv_bytes`) at the mean context of the steps. `bound_tokens_per_s` is what the best reader could
    reach with these bytes, `linears_bound_tokens_per_s` the same of the decoder linears alone; `linears`
    times one token through them, and `baseline` the same in dense float32 (None without --baseline).
    `attention` has GB/s of cached keys and values, as many as no cache holds, at a context of `prompt`.
    `prompt_linears` times `prompt_linears_tokens` tokens through them. TOPS are 2 x the multiply-adds of the
    decoder linears: `prompt_tops` over the whole prompt's time, `prompt_linears_tops` over the linears' own.
    """

    model: str
    file: str
    file_bytes: int
    values: str
    sparsity: float
    cpu: str
    isa: str
    num_threads: int
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
    round_share: float
    bound_tokens_per_s: float
    linears_bytes: int
    linears_s: float
    linears_gb_per_s: float
    linears_bandwidth_share: float
    linears_bound_tokens_per_s: float
    kv_cache_dtype: str
    attention_gb_per_s: float
    attention_bandwidth_share: float
    baseline_s: float | None
    linears_speedup: float | None
    prompt_tops: float
    prompt_linears_tops: float
    prompt_linears_tokens: int
    int8_peak_tops: float
    prompt_peak_share: float
    prompt_linears_peak_share: float
    steps: Spread
    prompts: Spread
    linears: Spread
    prompt_linears: Spread
    attention: Spread
    baseline: Spread | None
    reads_gb_per_s: Spread
    impossible: tuple[str, ...]
    notes: tuple[str, ...]

    def table(self) -> Table:
        """All figures of the row, one a line, with the deviation where a median is shown."""
        title = f"{self.model} on {self.cpu}: {self.num_threads} threads, {self.isa}, batch {self.batch}, "
        title += f"prompt {self.prompt}, {self.new} new, {self.repeats} rounds"
        rows = [*self._speeds(), *self._shares()]
        if self.baseline is not None and self.baseline_s is not None:
            rows.append(("dense float32 linears", f"{1e3 * self.baseline_s:.2f} ms", self.baseline.relative))
            rows.append(("linears, speed", f"{self.linears_speedup:.1f}x", ""))
        return Table(title, ("", "median", "deviation"), rows, to_paste=True)

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
        read, peak = f"{self.read_gb_per_s:.1f} GB/s", f"{self.int8_peak_tops:.2f} TOPS"
        tokens = self.prompt_linears_tokens
        linears = f"{self.prompt_linears_tops:.2f} TOPS, {self.prompt_linears_peak_share:.0%}"
        kv = f", {self.kv_bytes / 1e6:.1f} MB of them keys and values"
        return [
            ("bytes a step", f"{self.step_bytes / 1e6:.1f} MB{kv}", ""),
            ("read while decoding", f"{self.gb_per_s:.1f} GB/s", self.steps.relative),
            ("of the best read bandwidth", f"{self.bandwidth_share:.0%} of {read}", ""),
            ("of the best reader of its round", f"{self.round_share:.0%}", self.reads_gb_per_s.relative),
            ("linears, of the bandwidth", f"{self.linears_bandwidth_share:.0%}", self.linears.relative),
            (
                f"attention, {self.prompt} {self.kv_cache_dtype} positions",
                f"{self.attention_gb_per_s:.1f} GB/s, {self.attention_bandwidth_share:.0%}",
                self.attention.relative,
            ),
            ("whole prompt", f"{self.prompt_tops:.2f} TOPS, {self.prompt_peak_share:.0%} of {peak}", ""),
            (f"linears, {tokens} tokens", f"{linears} of it", self.prompt_linears.relative),
        ]

    def line(self) -> tuple[str, ...]:
        """The row in a table of several."""
        return (
            f"{self.values} {self.sparsity:.0%}",
            str(self.batch),
            str(self.prompt),
            f"{self.decode_tokens_per_s:.1f} {self.steps.relative}",
            f"{self.bound_tokens_per_s:.1f}",
            f"{1e3 * self.step_p50_s:.1f} / {1e3 * self.step_p99_s:.1f}",
            f"{self.gb_per_s:.1f}",
            f"{self.bandwidth_share:.0%}",
            f"{self.prompt_tokens_per_s:.0f} {self.prompts.relative}",
            f"{1e3 * self.time_to_first_token_s:.0f}",
            f"{self.prompt_linears_peak_share:.0%}",
            *([] if self.linears_speedup is None else [f"{self.linears_speedup:.1f}x"]),
        )


COLUMNS = (
    *("weights", "batch", "context", "decode tokens/s", "bound", "step p50 / p99 ms", "GB/s"),
    *(
        "of bandwidth",
        "prompt tokens/s",
        "first token ms",
        "linears of INT8 peak",
        "linears against dense f32",
    ),
)


@dataclass(frozen=True)
class BenchResult(Result):
    """A row for every setting of the sweep, in the order measured."""

    rows: tuple[BenchRow, ...]
    picture: str | None = None

    @property
    def row(self) -> BenchRow:
        """The only row of a run that is no sweep."""
        [row] = self.rows
        return row

    def objects(self) -> tuple[BenchRow, ...]:
        """What --json prints, one a line."""
        return self.rows

    def tables(self) -> list[Table]:
        if len(self.rows) == 1:
            return [self.row.table()]
        first = self.rows[0]
        read, peak = max(row.read_gb_per_s for row in self.rows), max(r.int8_peak_tops for r in self.rows)
        title = f"{first.cpu}: {first.num_threads} threads, {first.isa}, {first.repeats} rounds, "
        title += f"reads {read:.1f} GB/s, INT8 peak {peak:.2f} TOPS"
        lines = [row.line() for row in self.rows]
        return [Table(title, COLUMNS[: len(lines[0])], lines, to_paste=True)]

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
