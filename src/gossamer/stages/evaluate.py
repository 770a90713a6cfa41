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
from gossamer.evaluation.file_tasks import FEW_SHOT, Kind, Shots, file_task
from gossamer.evaluation.harness import Scores, load_tasks, run
from gossamer.evaluation.report import EvaluateResult
from gossamer.evaluation.tasks import DOCTESTS, Choice, Example, task_examples
from gossamer.job.options import option
from gossamer.job.report import Event, Progress, quiet
from gossamer.job.threads import use_threads


@dataclass(frozen=True)
class Evaluate(EngineOptions):
    """Measure a model: perplexity of --dataset, accuracy in --tasks (exact match or choice), or both."""

    model: str = option(
        help="checkpoint directory, org/name[@revision] of the hub, or a .goss file",
        positional=True,
    )
    dataset: str = option("", help="text whose perplexity to measure: SRC; with --kind, a file of examples")
    kind: Kind | Literal[""] = option("", help="the examples of --dataset FILE, run by lm-evaluation-harness")
    num_fewshot: int | None = option(
        None, help="examples shown before each prompt (default: the harness's own number; of --kind none)"
    )
    fewshot_dataset: str = option("", help="FILE of --kind, whose rows --num-fewshot shows")
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
    if (job.num_fewshot or 0) < 0:
        raise ConfigError(f"--num-fewshot is {job.num_fewshot}; expected a number of examples, or 0 for none")
    if job.fewshot_dataset and not (job.kind and job.num_fewshot):
        raise ConfigError("--fewshot-dataset has examples for --dataset FILE --kind KIND --num-fewshot N")
    if job.limit < 0:
        raise ConfigError(f"--limit is {job.limit}; expected a number of examples, or 0 for all")
    own = [task for task in job.tasks if task in DOCTESTS or task.endswith(TABLES)]
    tasks = {task: task_examples(task, job.limit, job.seed) for task in own}
    for_harness: list[str | dict[str, Any]] = [task for task in job.tasks if task not in own]
    if job.kind:
        for_harness.append(
            file_task(
                Path(job.dataset),
                job.kind,
                job.skip_bad_rows,
                _shots(job),
                offline=job.offline,
                progress=progress,
            )
        )
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
    how: dict[str, Any] = {"limit": job.limit, "chat": job.chat, "num_fewshot": job.num_fewshot}
    through = partial(run, for_harness, manager, **how) if for_harness else None
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


def _shots(job: Evaluate) -> Shots | None:
    """The examples that prompts of --kind begin with."""
    if not job.num_fewshot:
        return None
    if job.kind not in FEW_SHOT:
        raise ConfigError(f"--num-fewshot shows examples of {', '.join(FEW_SHOT)}; --kind is {job.kind}")
    if not job.fewshot_dataset:
        raise ConfigError(
            f"--num-fewshot {job.num_fewshot} needs --fewshot-dataset FILE, the examples it shows"
        )
    return Shots(job.num_fewshot, Path(job.fewshot_dataset))


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
