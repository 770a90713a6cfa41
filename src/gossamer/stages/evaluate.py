"""`evaluate`: perplexity of a text and accuracy in tasks, through transformers, a GPU or the engine."""

import shlex
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from gossamer.checkpoint.partial import refuse_existing
from gossamer.data.rows import evaluation_rows
from gossamer.data.sources import manifest
from gossamer.data.tables import TABLES
from gossamer.engine import EngineOptions
from gossamer.errors import ConfigError
from gossamer.evaluation.backends import Backend, instructions, open_backend
from gossamer.evaluation.chat import Journal, Speaker, compare, read_prompts
from gossamer.evaluation.encoder_tasks import ENCODER_KINDS, EncoderKind, EncoderTask, read_encoder_tasks
from gossamer.evaluation.encoders import open_encoder
from gossamer.evaluation.figures import Figures, measure_task, measure_text
from gossamer.evaluation.file_tasks import FEW_SHOT, Kind, Shots, file_task
from gossamer.evaluation.harness import SEED, load_tasks, run
from gossamer.evaluation.judge import Judge
from gossamer.evaluation.kept import KeptFigures, digest, model_hash, program
from gossamer.evaluation.report import EvaluateResult
from gossamer.evaluation.scores import Scores, recovery, recovery_error
from gossamer.evaluation.task_yaml import FileTask, yaml_file
from gossamer.evaluation.tasks import DOCTESTS, Choice, Example, task_examples
from gossamer.gpu.found import gpu_device
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
    kind: Literal[Kind, EncoderKind, "chat"] | None = option(
        None,
        help="the examples of --dataset FILE, run by lm-evaluation-harness; chat: prompts for --judge; of "
        "encoders: sts (pairs with scores, or a folder of such files), retrieval (a folder as BEIR has it), "
        "classification, tokens (words with labels: f1 of spans), qa (questions as SQuAD has them)",
    )
    judge: str = option(
        "", help="URL of an OpenAI-compatible endpoint that compares answers of --kind chat with --baseline's"
    )
    judge_model: str = option("", help="the judge's name at its endpoint")
    max_tokens: int = option(512, help="tokens of an answer of --kind chat at most")
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
    backend: Literal["auto", "torch", "engine", "gpu"] = option(
        "auto",
        help="torch: transformers; engine: Gossamer's own; gpu: transformers with sparse linears on a GPU; "
        "auto: torch for directories, engine for files",
    )
    baseline: str = option("", help="model to compare with; adds recovery")
    skip_bad_rows: int = option(0, help="rows of --kind that cannot be used and are left out")
    allow_code_execution: bool = option(
        False, help="--kind code runs what the model writes, confined: no network, no files but its own"
    )
    apply_chat_template: bool = option(
        False, help="the harness's prompts are turns of a user in the model's chat template"
    )
    row_length: int = option(
        255,
        help="tokens of a row of --dataset, each seen after BOS and those before it in its row; papers quote "
        "perplexity of rows of 2,048, which is lower: for that --row-length 2048 and a model that holds them",
    )
    write_tasks: str = option(
        "", help="folder for the task that lm-evaluation-harness runs of --kind: YAML for its --include_path"
    )
    limit: int = option(0, help="rows of text and examples a task at most; 0: all (500 doctests)")
    seed: int = option(0, help="choice of the doctests")
    output: str = option(
        "", help="FILE.json for all figures, beside it a table (.md) and a picture (.png)", short="-o"
    )
    overwrite: bool = option(False, help="replace an existing output")
    no_cache: bool = option(False, help="measure anew what an earlier run measured of the same content")


@dataclass(frozen=True)
class Asked:
    """What both models are asked: `own` examples, or `of_encoders`; tasks of the harness, from its `manager`.

    `decides` says of each of the latter what its figures depend on, `text` that of the text: None where the
    same name may stand for something else tomorrow.
    """

    own: dict[str, list[Example | Choice]]
    of_encoders: dict[str, EncoderTask]
    harness: list[str | FileTask]
    manager: Any
    decides: dict[str, Any]
    text: dict[str, Any] | None


def evaluate(job: Evaluate, progress: Progress = quiet) -> EvaluateResult:
    """Measure the model, and the baseline for comparison if there is one.

    What an earlier run measured of the same content is taken from the cache, unless `no_cache`.
    """
    check(job)
    with tempfile.TemporaryDirectory(prefix="gossamer-tasks-") as temporary:
        return _evaluate(job, Path(job.write_tasks or temporary), progress)


def _evaluate(job: Evaluate, folder: Path, progress: Progress) -> EvaluateResult:
    """Likewise; the tasks of files are written into the folder."""
    start = time.monotonic()
    prompts = read_prompts(Path(job.dataset), job.skip_bad_rows, progress) if job.kind == "chat" else []
    asked = _asked(job, folder, progress)
    if job.backend == "auto":
        packed = any(Path(model).is_file() for model in (job.model, job.baseline) if model)
        job = replace(job, backend="engine" if packed else "torch")
    if job.backend != "engine":
        job.refuse_given("kv_cache_dtype")
        if job.threads is not None:
            use_threads(job.threads)
    kept = KeptFigures(progress, anew=job.no_cache)
    identity = model_hash(job.model, offline=job.offline)
    ours = measure(job.model, identity, job, asked, kept, progress)
    base = None
    if job.baseline:
        base_identity = model_hash(job.baseline, offline=job.offline)
        base = measure(job.baseline, base_identity, job, asked, kept, progress)
        if prompts:
            speakers = _speaker(job.model, identity, job), _speaker(job.baseline, base_identity, job)
            journal = _journal(job, progress)
            judge = Judge(job.judge, job.judge_model)
            scores = compare(
                prompts[: job.limit or None], *speakers, judge, journal, job.max_tokens, progress
            )
            ours.scores[Path(job.dataset).name] = scores
    result = EvaluateResult(
        model=job.model,
        backend=job.backend,
        perplexity=ours.text.value if ours.text else None,
        num_tokens=int(sum(ours.text.weights)) if ours.text else 0,
        row_length=job.row_length,
        accuracy={task: scores.value for task, scores in ours.scores.items()},
        accuracy_by_kind=ours.by_kind,
        num_examples={task: scores.num_examples for task, scores in ours.scores.items()},
        recovery=_compared(recovery, ours, base),
        metrics={task: scores.metrics for task, scores in ours.scores.items()},
        standard_errors={name: scores.standard_errors for name, scores in ours.named.items()},
        recovery_errors=_compared(recovery_error, ours, base),
        baseline=base.values() if base else {},
        model_hash=identity,
        from_cache=tuple(kept.found),
        cache=str(kept.folder),
        seconds=time.monotonic() - start,
    )
    if job.output:
        result.write(Path(job.output), job)
    return result


def _compared(
    how: Callable[[Scores, Scores], float | None], ours: Figures, base: Figures | None
) -> dict[str, float]:
    """By name, where there is a figure of both models and something to say of them."""
    both = {name: (ours.named[name], scores) for name, scores in (base.named if base else {}).items()}
    return {name: found for name, pair in both.items() if (found := how(*pair)) is not None}


def check(job: Evaluate) -> None:
    """Raise ConfigError for options that do not go together, or for a GPU that is not there."""
    if job.backend == "gpu":
        gpu_device()
    if job.kind and not job.dataset:
        raise ConfigError(f"--kind {job.kind} needs --dataset FILE, the examples")
    if job.kind == "code" and not job.allow_code_execution:
        raise ConfigError(
            "--kind code runs programs that the model writes; they are confined (own process, no network, no "
            "files but their own, limits on CPU, memory and time), and --allow-code-execution lets them run"
        )
    if not job.dataset and not job.tasks:
        raise ConfigError("nothing to evaluate; give --dataset SRC, --tasks NAME..., or both")
    if job.kind == "chat":
        _check_chat(job)
    elif job.judge or job.judge_model:
        raise ConfigError("--judge and --judge-model are for --kind chat")
    if job.write_tasks:
        if job.kind in (None, "chat", *ENCODER_KINDS):
            raise ConfigError(
                "--write-tasks keeps the task of --dataset FILE --kind KIND that the harness runs"
            )
        refuse_existing(yaml_file(Path(job.write_tasks), Path(job.dataset).name), job.overwrite)
    if job.skip_bad_rows < 0:
        raise ConfigError(f"--skip-bad-rows {job.skip_bad_rows}: expected a number of rows, or 0 for none")
    if (job.num_fewshot or 0) < 0:
        raise ConfigError(f"--num-fewshot is {job.num_fewshot}; expected a number of examples, or 0 for none")
    if job.fewshot_dataset and (job.kind in (None, "chat") or not job.num_fewshot):
        raise ConfigError("--fewshot-dataset has examples for --dataset FILE --kind KIND --num-fewshot N")
    if job.limit < 0:
        raise ConfigError(f"--limit is {job.limit}; expected a number of examples, or 0 for all")
    if job.row_length < 1:
        raise ConfigError(f"--row-length is {job.row_length}; expected a number of tokens, at least 1")
    if job.output:
        if not job.output.endswith(".json"):
            raise ConfigError(f"--output is {job.output}; expected FILE.json")
        refuse_existing(Path(job.output), job.overwrite)


def _check_chat(job: Evaluate) -> None:
    needed = {
        "--baseline": job.baseline,
        "--judge": job.judge,
        "--judge-model": job.judge_model,
        "--output": job.output,
    }
    if lacking := [name for name, value in needed.items() if not value]:
        raise ConfigError(
            "--kind chat has a judge compare the answers of two models, and keeps them beside the output; it "
            f"needs {', '.join(lacking)}"
        )
    if job.max_tokens < 1:
        raise ConfigError(f"--max-tokens is {job.max_tokens}; expected a number of tokens, at least 1")
    Judge(job.judge, job.judge_model)  # whose URL must be one


def _asked(job: Evaluate, folder: Path, progress: Progress) -> Asked:
    """Read the examples, and load the harness's tasks, before a model is opened."""
    own = [task for task in job.tasks if task in DOCTESTS or task.endswith(TABLES)]
    examples = {task: task_examples(task, job.limit, job.seed) for task in own}
    names: list[str | FileTask] = [task for task in job.tasks if task not in own]
    of_encoders: dict[str, EncoderTask] = {}
    if job.kind in ("sts", "retrieval", "classification", "tokens", "qa"):
        of_encoders = read_encoder_tasks(Path(job.dataset), job.kind, job.limit)
    elif job.kind and job.kind != "chat":
        read = partial(file_task, Path(job.dataset), job.kind, folder, job.skip_bad_rows, _shots(job))
        names.append(task := read(offline=job.offline, progress=progress))
        if job.write_tasks:
            progress(Event("evaluate", _how_to_run(task, job), lasting=True))
    if job.num_fewshot and not names:
        raise ConfigError(
            f"--num-fewshot is {job.num_fewshot}, and nothing that is asked for shows examples; it is for "
            f"--tasks of lm-evaluation-harness and --kind {', '.join(FEW_SHOT)}"
        )
    manager, decides = load_tasks(names, job.num_fewshot, offline=job.offline) if names else (None, {})
    text = None
    if job.dataset and not job.kind:
        text = manifest(job.dataset, offline=job.offline)
        text = None if text.get("revision", "") is None else text
    return Asked(examples, of_encoders, names, manager, decides, text)


def _how_to_run(task: FileTask, job: Evaluate) -> str:
    """The harness's own command for a task that is kept."""
    options = ["--model", "hf", "--model_args", f"pretrained={job.model}"]
    options += ["--include_path", str(task.file.parent), "--tasks", task.name]
    if job.apply_chat_template:
        options.append("--apply_chat_template")
    if job.kind == "code":
        options.append("--confirm_run_unsafe_code")
    return f"{task.file} is the task; run it by {shlex.join(['lm_eval', 'run', *options])}"


def _speaker(model: str, identity: str, job: Evaluate) -> Speaker:
    return Speaker(model, digest({**_how(identity, job), "program": program()}), _opener(model, job))


def _how(identity: str, job: Evaluate) -> dict[str, Any]:
    """What a model's answers depend on beside what it is asked."""
    return {
        "model": identity,
        "backend": job.backend,
        "instructions": instructions(job.backend),
        "kv_cache": job.kv_cache_dtype,
    }


def _journal(job: Evaluate, progress: Progress) -> Journal:
    """Beside the output. `no_cache` empties it, unless it is newer than that: then a run did not end."""
    output = Path(job.output)
    file = output.with_suffix(".chat.jsonl")
    ended = file.exists() and output.exists() and file.stat().st_mtime_ns <= output.stat().st_mtime_ns
    return Journal(file, progress, anew=job.no_cache and ended)


def _opener(model: str, job: Evaluate) -> Callable[[], Backend]:
    """Opens the model the first time that it is called."""
    return cache(
        lambda: open_backend(model, job.backend, job.threads, job.kv_cache_dtype, offline=job.offline)
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
    model: str, identity: str, job: Evaluate, asked: Asked, kept: KeptFigures, progress: Progress
) -> Figures:
    """One model's figures of the text, of our own examples, and of the harness's tasks.

    `identity`: its content's hash. It is opened once something has to be measured.
    """
    opened = _opener(model, job)
    how = {**_how(identity, job), "limit": job.limit}
    figures = Figures()
    if job.dataset and not job.kind:
        decides = asked.text and {**how, "text": asked.text, "row_length": job.row_length}
        found = kept.of(decides, f"{model}: perplexity", lambda: _of_text(model, opened(), job, progress))
        figures.text = _scores(found)
    for task, examples in asked.own.items():
        measured = partial(_of_examples, opened, task, examples, progress)
        found = kept.of({**how, "examples": repr(examples)}, f"{model}: {task}", measured)
        figures.scores[task], figures.by_kind[task] = _scores(found["scores"]), found["by_kind"]
    for task, encoder_task in asked.of_encoders.items():
        measured = partial(_of_encoder, model, task, encoder_task, job, progress)
        found = kept.of({**how, "examples": repr(encoder_task)}, f"{model}: {task}", measured)
        figures.scores[task] = _scores(found)
        if num_cut := figures.scores[task].num_cut:
            note = f"{task}: cut {num_cut:,} texts that are longer than the limit of {model}"
            progress(Event("evaluate", note, lasting=True))
    for task in asked.harness:
        name = task if isinstance(task, str) else task.name
        options = {
            "apply_chat_template": job.apply_chat_template,
            "num_fewshot": job.num_fewshot,
            "seed": SEED,
        }
        measured = partial(_of_harness, opened, name, task, job, asked.manager, progress)
        decides = {**how, **options, "task": asked.decides[name]}
        for leaf, found in kept.of(decides, f"{model}: {name}", measured).items():
            figures.scores[leaf] = _scores(found)
    return figures


def _scores(found: dict[str, Any]) -> Scores:
    """As they were before JSON."""
    return Scores(**{**found, "samples": tuple(found["samples"]), "weights": tuple(found["weights"])})


def _of_text(model: str, backend: Backend, job: Evaluate, progress: Progress) -> dict[str, Any]:
    if job.row_length > backend.context:
        raise ConfigError(
            f"--row-length is {job.row_length}; expected at most {backend.context}, what the context of "
            f"{model} holds"
        )
    rows_BT = evaluation_rows(
        job.dataset, backend.tokenizer, job.row_length, max_rows=job.limit or None, offline=job.offline
    )
    return asdict(measure_text(backend, job.dataset, rows_BT, progress))


def _of_examples(
    opened: Callable[[], Backend], task: str, examples: list[Example | Choice], progress: Progress
) -> dict[str, Any]:
    scores, by_kind = measure_task(opened(), task, examples, progress)
    return {"scores": asdict(scores), "by_kind": by_kind}


def _of_encoder(
    model: str, name: str, task: EncoderTask, job: Evaluate, progress: Progress
) -> dict[str, Any]:
    progress(Event("evaluate", name))
    backend = open_encoder(model, job.backend, job.threads, offline=job.offline)
    return {**asdict(task.measure(backend)), "num_cut": backend.num_cut}


def _of_harness(
    opened: Callable[[], Backend],
    name: str,
    task: str | FileTask,
    job: Evaluate,
    manager: Any,
    progress: Progress,
) -> dict[str, Any]:
    progress(Event("evaluate", name))
    model = opened().for_harness()
    found = run(
        [task],
        manager,
        model,
        job.limit,
        apply_chat_template=job.apply_chat_template,
        num_fewshot=job.num_fewshot,
    )
    return {leaf: asdict(scores) for leaf, scores in found.items()}
