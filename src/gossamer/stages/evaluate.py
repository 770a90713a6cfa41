"""`evaluate`: perplexity of a text and exact-match accuracy of tasks, through transformers or the engine."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from gossamer.data.rows import evaluation_rows
from gossamer.errors import ConfigError
from gossamer.evaluation.backends import BATCH_ROWS, Backend, open_backend
from gossamer.evaluation.tasks import Example, task_examples
from gossamer.job.options import option
from gossamer.job.report import Event, Progress, Table, quiet

SLACK_TOKENS = 8


@dataclass(frozen=True)
class Evaluate:
    """Measure a model: perplexity of --dataset, exact-match accuracy of --tasks, or both."""

    model: str = option(help="checkpoint directory, or a .goss file (engine only)", positional=True)
    dataset: str = option("", help="text whose perplexity to measure: SRC")
    tasks: tuple[str, ...] = option(
        (), help="doctest, doctest-unseen, or .jsonl files with fields prompt and answer"
    )
    backend: Literal["torch", "engine"] = option("torch", help="transformers, or Gossamer's own engine")
    kv_cache_dtype: Literal["auto", "f32", "bf16", "i8"] = option(
        "auto", help="the engine's type of cached keys and values (auto: f32 for float32 models, else bf16)"
    )
    baseline: str = option("", help="model to compare with; adds recovery")
    limit: int = option(0, help="rows of text and examples a task at most; 0: all (500 doctests)")
    seed: int = option(0, help="choice of the doctests")
    offline: bool = option(False, help="never touch the network")


@dataclass(frozen=True)
class EvaluateResult:
    """Perplexity (None without --dataset) over `num_tokens`; accuracy of each task and kind of example.

    `recovery`: accuracy over the baseline's, and for "perplexity" the baseline's over ours; 1 is all of it.
    """

    model: str
    backend: str
    perplexity: float | None
    num_tokens: int
    accuracy: dict[str, float]
    accuracy_by_kind: dict[str, dict[str, float]]
    num_examples: dict[str, int]
    recovery: dict[str, float]
    seconds: float

    def tables(self) -> list[Table]:
        """One row a figure."""
        rows = [(name, f"{value:.1%}", f"{self.num_examples[name]}") for name, value in self.accuracy.items()]
        if self.perplexity is not None:
            rows.insert(0, ("perplexity", f"{self.perplexity:.4g}", f"{self.num_tokens} tokens"))
        columns = ("", "value", "examples")
        if self.recovery:
            columns = (*columns, "recovery")
            rows = [(*row, f"{self.recovery[row[0]]:.1%}") for row in rows if row[0] in self.recovery]
        return [Table(f"{self.model} ({self.backend}, {self.seconds:.1f} s)", columns, rows)]


def evaluate(job: Evaluate, progress: Progress = quiet) -> EvaluateResult:
    """Measure the model, and the baseline for comparison if there is one."""
    start = time.monotonic()
    if not job.dataset and not job.tasks:
        raise ConfigError("nothing to evaluate; give --dataset SRC, --tasks NAME..., or both")
    if job.limit < 0:
        raise ConfigError(f"--limit is {job.limit}; expected a number of examples, or 0 for all")
    tasks = {task: task_examples(task, job.limit, job.seed) for task in job.tasks}
    if job.backend != "engine" and job.kv_cache_dtype != "auto":
        raise ConfigError("--kv-cache-dtype is the engine's; add --backend engine")
    ours = measure(job.model, job, tasks, progress)
    base = measure(job.baseline, job, tasks, progress) if job.baseline else None
    return EvaluateResult(
        model=job.model,
        backend=job.backend,
        perplexity=ours.perplexity,
        num_tokens=ours.num_tokens,
        accuracy=ours.accuracy,
        accuracy_by_kind=ours.by_kind,
        num_examples={task: len(examples) for task, examples in tasks.items()},
        recovery=recovery(ours, base) if base else {},
        seconds=time.monotonic() - start,
    )


@dataclass
class Figures:
    """What was measured of one model."""

    perplexity: float | None = None
    num_tokens: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)
    by_kind: dict[str, dict[str, float]] = field(default_factory=dict)


def measure(model: str, job: Evaluate, tasks: dict[str, list[Example]], progress: Progress) -> Figures:
    """Run one model through the text and the tasks."""
    backend, figures = open_backend(model, job.backend, job.kv_cache_dtype), Figures()
    if job.dataset:
        rows_BT = evaluation_rows(job.dataset, backend.tokenizer, offline=job.offline)[: job.limit or None]
        total, figures.num_tokens = 0.0, rows_BT[:, 1:].size
        for first in range(0, len(rows_BT), BATCH_ROWS):
            total += backend.log_likelihood(rows_BT[first : first + BATCH_ROWS])
            progress(Event("evaluate", job.dataset, min(first + BATCH_ROWS, len(rows_BT)), len(rows_BT)))
        figures.perplexity = float(np.exp(-total / figures.num_tokens))
    for task, examples in tasks.items():
        passed = judge(backend, task, examples, progress)
        kinds = sorted({example.kind for example in examples})
        figures.accuracy[task] = float(np.mean(passed))
        figures.by_kind[task] = {
            kind: float(np.mean([ok for ok, e in zip(passed, examples, strict=True) if e.kind == kind]))
            for kind in kinds
        }
    return figures


def judge(backend: Backend, task: str, examples: Sequence[Example], progress: Progress) -> list[bool]:
    """Whether the greedy completion of each example is right; one line where the answer is one line."""
    passed: list[bool] = []
    lengths = [len(backend.tokenizer.encode(example.answer, bos=False)) for example in examples]
    stop = "" if any("\n" in example.answer for example in examples) else "\n"
    for first in range(0, len(examples), BATCH_ROWS):
        batch = slice(first, first + BATCH_ROWS)
        prompts = [example.prompt for example in examples[batch]]
        texts = backend.complete(prompts, stop, max(lengths[batch]) + SLACK_TOKENS)
        passed += [example.check(text) for example, text in zip(examples[batch], texts, strict=True)]
        progress(Event("evaluate", task, len(passed), len(examples), {"accuracy": float(np.mean(passed))}))
    return passed


def recovery(ours: Figures, base: Figures) -> dict[str, float]:
    """Share of the baseline's figures; a task that the baseline fails wholly has none."""
    shares = {task: ours.accuracy[task] / value for task, value in base.accuracy.items() if value > 0}
    if ours.perplexity is not None and base.perplexity is not None:
        shares = {"perplexity": base.perplexity / ours.perplexity} | shares
    return shares
