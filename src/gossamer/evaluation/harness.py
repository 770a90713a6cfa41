"""lm-evaluation-harness as the runner of its own tasks, by name, and of files (file_tasks.py)."""

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gossamer.data.tables import TABLES
from gossamer.errors import ConfigError, UnsupportedError
from gossamer.evaluation.scores import LOG_LIKELIHOODS, Scores, log_likelihood_error, primary, share_error
from gossamer.evaluation.task_yaml import FileTask

SEED = 1234
NUM_BOOTSTRAPS = 1000  # for the standard errors of metrics that are no means


def load_tasks(
    tasks: Sequence[str | FileTask], num_fewshot: int | None = None, *, offline: bool = False
) -> tuple[Any, dict[str, Any]]:
    """lm-evaluation-harness's manager, once it has loaded these tasks, and what decides what each asks.

    Raises ConfigError for a name that it does not know, UnsupportedError for a task that runs code outside of
    the sandbox, OSError for a dataset that cannot be loaded. The files of its own tasks are read only where
    one of them is named. `num_fewshot` as `run` has it.
    """
    from lm_eval.tasks import TaskManager

    _log_errors_only()
    names = [task for task in tasks if isinstance(task, str)]
    manager = TaskManager(include_defaults=bool(names))
    asked = {task.name: task.decides for task in tasks if isinstance(task, FileTask)}
    for name in names:
        if name not in manager.all_tasks:
            raise ConfigError(
                f"unknown task {name!r}; expected doctest, doctest-unseen, a {', '.join(TABLES)} file, or a "
                "task of lm-evaluation-harness (`lm-eval ls tasks` lists them)"
            )
        _refuse_code(name, manager)
        with _without_network() if offline else contextlib.nullcontext():
            try:
                loaded = manager.load([name])["tasks"]
            except OSError as error:
                raise _not_here(name, manager, error) from error
            except ModuleNotFoundError as error:
                raise ConfigError(f"task {name} needs a module that is not here: {error}") from error
        asked[name] = {
            leaf: [f"{task.VERSION}", content_of(task, num_fewshot)] for leaf, task in loaded.items()
        }
    return manager, asked


def _leaves(manager: Any, name: str) -> Iterator[str]:
    """The tasks that a name of the harness stands for: itself, or the members of a tag or group."""
    entry = manager.task_index[name]
    members = sorted(entry.tags) if name in manager.all_tags else entry.cfg["task"]
    if isinstance(members, str):
        yield name
        return
    for member in members:
        known = member.get("group", member.get("task")) if isinstance(member, dict) else member
        if isinstance(known, str) and known in manager.task_index:
            yield from _leaves(manager, known)


def _refuse_code(name: str, manager: Any) -> None:
    """Raise UnsupportedError for a task that would run what a model writes, and confine nothing."""
    for task in _leaves(manager, name):
        if manager.task_index[task].cfg.get("unsafe_code"):
            raise UnsupportedError(
                f"task {task} of lm-evaluation-harness runs what the model writes unconfined; in the sandbox "
                "runs --dataset FILE --kind code --allow-code-execution, where rows have the fields prompt, "
                "test and entry_point (HumanEval's), or text and test_list (MBPP's)"
            )


def content_of(task: Any, num_fewshot: int | None) -> str:
    """sha256 of the examples of a task of the harness, and of those that it shows where it shows any."""
    content = hashlib.sha256()
    shows = task.get_config("num_fewshot") if num_fewshot is None else num_fewshot
    for examples in (task.eval_docs, task.fewshot_docs() if shows else ()):
        for example in examples:
            content.update(json.dumps(example, default=str).encode() + b"\n")
        content.update(b"\n")
    return content.hexdigest()


def _log_errors_only() -> None:
    for name in ("lm-eval", "lm_eval"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def without_its_output() -> Iterator[None]:
    """Drop the harness's bars, warnings, and news of bootstrapping."""
    _log_errors_only()
    drop = io.StringIO()
    with contextlib.redirect_stderr(drop), contextlib.redirect_stdout(drop):
        yield


def _not_here(name: str, manager: Any, error: OSError) -> OSError:
    """Says which dataset a task lacks, and where it would be."""
    import datasets.config

    lacking = next((leaf for leaf in _leaves(manager, name) if not _loads(leaf, manager)), name)
    settings = manager.task_index[lacking].cfg
    what = "a file of it is"
    if path := settings.get("dataset_path"):
        part, files = settings.get("dataset_name"), (settings.get("dataset_kwargs") or {}).get("data_files")
        what = f"its dataset {path}{f' ({part})' if part else ''}{f', files {files}' if files else ''} is"
    return OSError(
        f"task {lacking}: {what} not in {datasets.config.HF_DATASETS_CACHE} and cannot be loaded ({error}); "
        "run it once with a network, which keeps it there, or give a file by --dataset FILE --kind KIND"
    )


def _loads(task: str, manager: Any) -> bool:
    try:
        manager.load([task])
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _without_network() -> Iterator[None]:
    """Have the libraries that load datasets take what is in their caches."""
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def run(
    tasks: Sequence[str | FileTask],
    manager: Any,
    model: Any,
    limit: int,
    *,
    apply_chat_template: bool = False,
    num_fewshot: int | None = None,
) -> dict[str, Scores]:
    """Run tasks through a model of the harness; at most `limit` examples of each, 0: all.

    `apply_chat_template`: prompts are turns of a user in the model's chat template. `num_fewshot`: examples
    shown before each prompt of the harness's own tasks, None: as many as a task itself says.
    """
    from lm_eval import evaluator
    from transformers import set_seed

    with without_its_output(), _in_our_words(tasks):
        # Not by `simple_evaluate`: it asks git, which complains outside of a repository, and torch, slowly.
        loaded = manager.load([task if isinstance(task, str) else str(task.file) for task in tasks])
        for name, task in loaded["tasks"].items():
            _show(task, num_fewshot)
            if any(isinstance(ours, FileTask) and ours.name == name for ours in tasks):
                _fit(task, model.max_length)
        set_seed(SEED)
        found: Any = evaluator.evaluate(
            model,
            loaded,
            limit=limit or None,
            bootstrap_iters=NUM_BOOTSTRAPS,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=True,
            confirm_run_unsafe_code=not any(isinstance(task, str) for task in tasks),
        )
    return {name: _scores(found["results"][name], samples) for name, samples in found["samples"].items()}


def _show(task: Any, num_fewshot: int | None) -> None:
    """Have a task show so many examples, unless it says that it shows none; None: as many as it says."""
    says = task.get_config("num_fewshot")
    if num_fewshot is not None and says != 0:
        task.set_config("num_fewshot", num_fewshot)
    elif says is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(SEED)


def _fit(task: Any, context: int) -> None:
    """Have a task generate no more than half of what the model's context holds."""
    if task.OUTPUT_TYPE == "generate_until":
        tokens = min(task.get_config("generation_kwargs")["max_gen_toks"], max(1, context // 2))
        task.set_config("generation_kwargs", {"max_gen_toks": tokens}, update=True)


@contextlib.contextmanager
def _in_our_words(tasks: Sequence[str | FileTask]) -> Iterator[None]:
    """What the harness finds wrong with a task for this model, as a ConfigError: it uses assertions."""
    try:
        yield
    except (AssertionError, ValueError) as error:
        names = " ".join(task if isinstance(task, str) else task.name for task in tasks)
        raise ConfigError(f"{names}: lm-evaluation-harness cannot run it with this model: {error}") from error


def _scores(result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Scores:
    """Of `metric,filter` and `metric_stderr,filter`, as the harness names them."""
    pairs = [key.partition(",")[::2] for key, value in result.items() if isinstance(value, int | float)]
    found = [(m, way) for m, way in pairs if way and not m.endswith("_stderr")]
    if not found:
        raise ConfigError(f"the task gives no metric that is a number; found {sorted(result)}")
    several = len({way for _, way in found}) > 1
    metrics, errors, values = {}, {}, {}
    for metric, way in found:
        name = f"{metric},{way}" if several else metric
        metrics[name] = float(result[f"{metric},{way}"])
        values[name] = [s[metric] for s in samples if s.get("filter", "none") == way and metric in s]
        error = result.get(f"{metric}_stderr,{way}")
        if not isinstance(error, int | float):
            error = _error(metric, metrics[name], values[name])
        if error is not None:
            errors[name] = float(error)
    first = primary(metrics)
    kept = values[first]
    if first.partition(",")[0] in LOG_LIKELIHOODS:
        log_probs, lengths = _lengths(kept)
        return Scores(metrics, errors, log_probs, len(kept), lengths)
    return Scores(metrics, errors, tuple(float(x) for x in kept if isinstance(x, int | float)), len(kept))


def _error(metric: str, value: float, samples: Sequence[Any]) -> float | None:
    """The standard error of a metric of which the harness gives none."""
    if metric in LOG_LIKELIHOODS:
        return log_likelihood_error(metric, value, *_lengths(samples))
    if samples and all(isinstance(sample, list) for sample in samples):
        return share_error([sum(sample) for sample in samples], [len(sample) for sample in samples])
    return None


def _lengths(samples: Sequence[Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """log p of each example, and its length: 1 where an example is one prediction."""
    pairs = [sample if isinstance(sample, tuple | list) else (sample, 1) for sample in samples]
    return tuple(float(total) for total, _ in pairs), tuple(float(length) for _, length in pairs)
