"""`evaluate`: perplexity of a text and accuracy in tasks, through transformers or the engine."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from gossamer.data.rows import evaluation_rows
from gossamer.data.tables import TABLES
from gossamer.engine import EngineOptions
from gossamer.errors import ConfigError
from gossamer.evaluation.backends import open_backend
from gossamer.evaluation.figures import Figures, measure_tasks, measure_text, recovery, recovery_errors
from gossamer.evaluation.file_tasks import file_task
from gossamer.evaluation.harness import Scores, load_tasks, primary, run
from gossamer.evaluation.tasks import DOCTESTS, Choice, Example, task_examples
from gossamer.job.options import option
from gossamer.job.report import Event, Progress, Result, Table, quiet
from gossamer.job.threads import use_threads


@dataclass(frozen=True)
class Evaluate(EngineOptions):
    """Measure a model: perplexity of --dataset, accuracy in --tasks (exact match or choice), or both."""

    model: str = option(
        help="checkpoint directory, org/name[@revision] of the hub, or a .goss file",
        positional=True,
    )
    dataset: str = option("", help="text whose perplexity to measure: SRC; with --kind, a file of examples")
    kind: Literal["", "multiple-choice", "cloze", "exact-match", "perplexity", "code", "summarization"] = (
        option(
            "",
            help="the examples of --dataset FILE, run by lm-evaluation-harness",
        )
    )
    tasks: tuple[str, ...] = option(
        (),
        help="tasks of lm-evaluation-harness (arc_easy, piqa, ...), doctest, doctest-unseen, or files "
        "(.jsonl[.zst], .parquet) with fields prompt and answer (text to match), or prompt, choices and "
        "answer (the right one's index; the likeliest a character wins)",
    )
    backend: Literal["auto", "torch", "engine"] = option(
        "auto", help="transformers, or Gossamer's own engine; auto: torch for directories, engine for files"
    )
    baseline: str = option("", help="model to compare with; adds recovery")
    skip_bad_rows: int = option(0, help="rows of --kind that cannot be used and are left out")
    allow_code_execution: bool = option(
        False, help="--kind code runs what the model writes, confined: no network, no files but its own"
    )
    chat: bool = option(False, help="the harness's prompts are turns of a user in the model's chat template")
    row_length: int = option(
        255, help="tokens of a row of --dataset; each is seen after those before it in its row, BOS first"
    )
    limit: int = option(0, help="rows of text and examples a task at most; 0: all (500 doctests)")
    seed: int = option(0, help="choice of the doctests")


@dataclass(frozen=True)
class EvaluateResult(Result):
    """Perplexity (None without --dataset) over `num_tokens`; accuracy of each task and kind of example.

    `backend`: the one that was used.
    `row_length`: tokens of a row of the text. `recovery`: accuracy over the baseline's, and for "perplexity"
    the baseline's over ours; 1 is all of it. Of the tasks that the harness ran: `metrics` and their
    `standard_errors`; the first of `acc_norm`, `acc`, ... is their accuracy. `recovery_errors`: the standard
    error of their recovery, paired by example.
    """

    model: str
    backend: str
    perplexity: float | None
    num_tokens: int
    row_length: int
    accuracy: dict[str, float]
    accuracy_by_kind: dict[str, dict[str, float]]
    num_examples: dict[str, int]
    recovery: dict[str, float]
    metrics: dict[str, dict[str, float]]
    standard_errors: dict[str, dict[str, float]]
    recovery_errors: dict[str, float]
    seconds: float

    def tables(self) -> list[Table]:
        """One row a figure."""
        rows = [
            (name, self._value(name, value), f"{self.num_examples[name]}")
            for name, value in self.accuracy.items()
        ]
        if self.perplexity is not None:
            rows.insert(
                0,
                (
                    "perplexity",
                    f"{self.perplexity:.4g}",
                    f"{self.num_tokens} tokens, {self.row_length} a row",
                ),
            )
        columns = ("", "value", "examples")
        if self.recovery:
            columns = (*columns, "recovery")
            rows = [(*row, self._recovery(row[0])) for row in rows if row[0] in self.recovery]
        return [Table(f"{self.model} ({self.backend}, {self.seconds:.1f} s)", columns, rows)]

    def _value(self, name: str, value: float) -> str:
        """A figure with its standard error where there is one; perplexities of tasks are no shares."""
        if name not in self.metrics:
            return f"{value:.1%}"
        metric = primary(self.metrics[name])
        error = self.standard_errors[name].get(metric)
        if metric.endswith("perplexity"):
            return f"{value:.4g} ({metric})"
        return f"{value:.1%}" + (f" +- {error:.1%}" if error is not None else "") + f" ({metric})"

    def _recovery(self, name: str) -> str:
        error = self.recovery_errors.get(name)
        return f"{self.recovery[name]:.1%}" + ("" if error is None else f" +- {error:.1%}")


def evaluate(job: Evaluate, progress: Progress = quiet) -> EvaluateResult:
    """Measure the model, and the baseline for comparison if there is one."""
    start = time.monotonic()
    if job.kind and not job.dataset:
        raise ConfigError(f"--kind {job.kind} needs --dataset FILE, the examples")
    if job.kind == "code" and not job.allow_code_execution:
        raise ConfigError(
            "--kind code runs programs that the model writes; they are confined (own process, no network, no "
            "files but their own, limits on CPU, memory and time), and --allow-code-execution lets them run"
        )
    if not job.dataset and not job.tasks:
        raise ConfigError("nothing to evaluate; give --dataset SRC, --tasks NAME..., or both")
    if job.limit < 0:
        raise ConfigError(f"--limit is {job.limit}; expected a number of examples, or 0 for all")
    own = [task for task in job.tasks if task in DOCTESTS or task.endswith(TABLES)]
    tasks = {task: task_examples(task, job.limit, job.seed) for task in own}
    for_harness: list[str | dict[str, Any]] = [task for task in job.tasks if task not in own]
    if job.kind:
        for_harness.append(file_task(Path(job.dataset), job.kind, job.skip_bad_rows))
    manager = load_tasks(for_harness, offline=job.offline) if for_harness else None
    if job.row_length < 1:
        raise ConfigError(f"--row-length is {job.row_length}; expected a number of tokens, at least 1")
    if job.backend == "auto":
        packed = any(Path(model).is_file() for model in (job.model, job.baseline) if model)
        job = replace(job, backend="engine" if packed else "torch")
    if job.backend == "torch":
        if job.kv_cache_dtype != "auto":
            raise ConfigError("--kv-cache-dtype is the engine's; add --backend engine")
        if job.threads is not None:
            use_threads(job.threads)
    through = partial(run, for_harness, manager, limit=job.limit, chat=job.chat) if for_harness else None
    ours = measure(job.model, job, tasks, through, progress)
    base = measure(job.baseline, job, tasks, through, progress) if job.baseline else None
    num_examples = {task: len(examples) for task, examples in tasks.items()}
    return EvaluateResult(
        model=job.model,
        backend=job.backend,
        perplexity=ours.perplexity,
        num_tokens=ours.num_tokens,
        row_length=job.row_length,
        accuracy=ours.accuracy,
        accuracy_by_kind=ours.by_kind,
        num_examples=num_examples | {task: scores.num_examples for task, scores in ours.scores.items()},
        recovery=recovery(ours, base) if base else {},
        metrics={task: scores.metrics for task, scores in ours.scores.items()},
        standard_errors={task: scores.standard_errors for task, scores in ours.scores.items()},
        recovery_errors=recovery_errors(ours, base) if base else {},
        seconds=time.monotonic() - start,
    )


def measure(
    model: str,
    job: Evaluate,
    tasks: dict[str, list[Example | Choice]],
    harness: Callable[[Any], dict[str, Scores]] | None,
    progress: Progress,
) -> Figures:
    """Run one model through the text and the tasks, and through those that `harness` runs."""
    backend, figures = (
        open_backend(model, job.backend, job.threads, job.kv_cache_dtype, offline=job.offline),
        Figures(),
    )
    if job.dataset and not job.kind:
        if job.row_length > backend.context:
            raise ConfigError(
                f"--row-length is {job.row_length}; expected at most {backend.context}, what the context of "
                f"{model} holds"
            )
        rows_BT = evaluation_rows(job.dataset, backend.tokenizer, job.row_length, offline=job.offline)
        measure_text(figures, backend, job.dataset, rows_BT[: job.limit or None], progress)
    measure_tasks(figures, backend, tasks, progress)
    if harness is not None:
        progress(Event("evaluate", "lm-evaluation-harness"))
        figures.scores = harness(backend.for_harness())
        figures.accuracy |= {task: scores.value for task, scores in figures.scores.items()}
    return figures
