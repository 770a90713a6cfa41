"""lm-evaluation-harness as the runner: its own tasks by name, and local files as tasks that are made for it.

A local file has one row an example; its kind says what the fields mean:

    multiple-choice   query (or question, prompt), choices, gold (or answer, label: the right one's index); or
                      context_options, continuation, gold: which context the continuation goes with
    cloze             context, continuation: the text that must be the likeliest, token by token
    exact-match       prompt (or query, question), answer: the line that must be generated
    perplexity        text, each scored by itself, in windows of the model's context

Prompts are those of the harness's own tasks of these kinds: a query that begins with "Question:" ends with
"Answer:" on a line of its own, and an answer follows after a space.
"""

import contextlib
import io
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gossamer.data.tables import TABLES, BadRows, table_rows
from gossamer.errors import ConfigError

Kind = Literal["multiple-choice", "cloze", "exact-match", "perplexity"]
PRIMARY = ("acc_norm", "acc", "exact_match", "pass@1", "f1", "word_perplexity")
SEED = 1234
NUM_BOOTSTRAPS = 1000  # for the standard errors of metrics that are no means


@dataclass(frozen=True)
class Scores:
    """Of one task: value and standard error of each metric, and of each example the primary one."""

    metrics: dict[str, float]
    standard_errors: dict[str, float]
    samples: tuple[float, ...]

    @property
    def value(self) -> float:
        """The primary metric."""
        return self.metrics[primary(self.metrics)]

    @property
    def lower_is_better(self) -> bool:
        """Whether it is a perplexity."""
        return primary(self.metrics).endswith("perplexity")


def primary(metrics: Mapping[str, float]) -> str:
    """The metric by which a task is known."""
    return next((name for name in PRIMARY if name in metrics), next(iter(metrics)))


def load_tasks(tasks: Sequence[str | Mapping[str, Any]]) -> Any:
    """lm-evaluation-harness's manager, once it has loaded these tasks and what they ask.

    Raises ConfigError for a name that it does not know, OSError for a dataset that cannot be loaded. The
    files of its own tasks are read only where one of them is named.
    """
    from lm_eval.tasks import TaskManager

    for name in ("lm-eval", "lm_eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    names = [task for task in tasks if isinstance(task, str)]
    manager = TaskManager(include_defaults=bool(names))
    for name in names:
        if name not in manager.all_tasks:
            raise ConfigError(
                f"unknown task {name!r}; expected doctest, doctest-unseen, a {', '.join(TABLES)} file, or a "
                "task of lm-evaluation-harness (`lm-eval ls tasks` lists them)"
            )
        try:
            manager.load([name])
        except OSError as error:
            raise OSError(
                f"task {name}: its dataset cannot be loaded ({error}); run it again with a network, or "
                "give a file by --dataset FILE --kind KIND"
            ) from error
    return manager


def run(
    tasks: Sequence[str | Mapping[str, Any]], manager: Any, model: Any, limit: int, *, chat: bool = False
) -> dict[str, Scores]:
    """Run tasks through a model of the harness; at most `limit` examples of each, 0: all.

    `chat`: prompts are turns of a user in the model's chat template.
    """
    from lm_eval import evaluator

    seeds: dict[str, Any] = {f"{of}_random_seed": SEED for of in ("numpy", "torch", "fewshot")}
    drop = io.StringIO()  # bars, and news of bootstrapping
    with contextlib.redirect_stderr(drop), contextlib.redirect_stdout(drop):
        found: Any = evaluator.simple_evaluate(
            model,
            tasks=[dict(task) if isinstance(task, Mapping) else task for task in tasks],
            limit=limit or None,
            task_manager=manager,
            bootstrap_iters=NUM_BOOTSTRAPS,
            apply_chat_template=chat,
            random_seed=SEED,
            **seeds,
        )
    return {name: _scores(found["results"][name], samples) for name, samples in found["samples"].items()}


def _scores(result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Scores:
    """Of `metric,filter` and `metric_stderr,filter`, as the harness names them; the first filter counts."""
    metrics, errors, filters = {}, {}, {}
    for key, value in result.items():
        metric, comma, chosen = key.partition(",")
        if not comma or not isinstance(value, int | float):
            continue
        if metric.endswith("_stderr"):
            errors.setdefault(metric.removesuffix("_stderr"), float(value))
        else:
            metrics.setdefault(metric, float(value))
            filters.setdefault(metric, chosen)
    name = primary(metrics)
    kept = [sample for sample in samples if sample.get("filter", "none") == filters[name]]
    return Scores(metrics, errors, tuple(float(s[name]) for s in kept if isinstance(s[name], int | float)))


def file_task(file: Path, kind: Kind, skip_bad_rows: int = 0) -> dict[str, Any]:
    """A local file as a task, in the harness's words, named as the file is.

    Raises ConfigError for a row that is not of this kind, or more of them than may be left out.
    """
    if not file.is_file() or not (
        file.name.endswith(TABLES) or (kind == "perplexity" and file.suffix == ".txt")
    ):
        raise ConfigError(f"--dataset {file} --kind {kind}: expected a {', '.join(TABLES)} file")
    bad = BadRows(skip_bad_rows)
    rows = list(_rows(file, READERS[kind], bad))
    if not rows:
        raise ConfigError(f"{file} has no examples")
    from datasets import Dataset

    several_contexts = kind == "multiple-choice" and isinstance(rows[0]["prompt"], list)
    if several_contexts != any(isinstance(row["prompt"], list) for row in rows):
        raise ConfigError(f"{file}: some rows have context_options and some have not; expected one form")
    return {
        "task": file.name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        **(_SEVERAL_CONTEXTS if several_contexts else _TASKS[kind]),
    }


def _rows(
    file: Path, read: Callable[[Mapping[str, Any], str], dict[str, Any]], bad: BadRows
) -> Iterable[dict[str, Any]]:
    if file.suffix == ".txt":
        yield read({"text": file.read_text(encoding="utf-8")}, str(file))
        return
    for where, row in table_rows(file, bad):
        try:
            yield read(row, where)
        except ConfigError as error:
            bad.leave_out(error)


def _choice(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    choices = row.get("context_options", row.get("choices"))
    if not isinstance(choices, list) or not all(isinstance(text, str) and text.strip() for text in choices):
        raise ConfigError(f"{where}: expected a list of texts in the field choices; found {choices!r}")
    if len(choices) < 2:
        raise ConfigError(f"{where}: expected at least two choices; found {choices!r}")
    gold = next((row[name] for name in ("gold", "answer", "label") if name in row), None)
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise ConfigError(
            f"{where}: expected the right choice's index, 0 to {len(choices) - 1}, in the field gold; "
            f"found {gold!r}"
        )
    if "context_options" in row:
        return {"prompt": choices, "target": _text(row, where, "continuation").strip(), "gold": gold}
    return {
        "prompt": _asked(_text(row, where, "query", "question", "prompt").rstrip()),
        "choices": choices,
        "gold": gold,
    }


def _cloze(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {
        "prompt": _text(row, where, "context", "prompt").rstrip(),
        "target": _text(row, where, "continuation").strip(),
    }


def _exact(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {
        "prompt": _asked(_text(row, where, "prompt", "query", "question", "context")),
        "target": _text(row, where, "answer").strip(),
    }


def _document(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {"prompt": "", "target": _text(row, where, "text")}


def _text(row: Mapping[str, Any], where: str, *names: str) -> str:
    """The first of these fields; ConfigError unless it is a text with something in it."""
    found = next((row[name] for name in names if name in row), None)
    if not isinstance(found, str) or not found.strip():
        wanted = " or ".join(names)
        raise ConfigError(f"{where}: expected text in the field {wanted}; found fields {sorted(row)}")
    return found


def _asked(query: str) -> str:
    return f"{query.rstrip()}\nAnswer:" if query.startswith("Question:") else query


READERS: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "multiple-choice": _choice,
    "cloze": _cloze,
    "exact-match": _exact,
    "perplexity": _document,
}


def _mean(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


_TASKS: dict[str, dict[str, Any]] = {
    "multiple-choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": _mean("acc", "acc_norm"),
    },
    "cloze": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{' ' + target}}",
        "target_delimiter": "",
        "metric_list": [
            *_mean("acc"),
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    },
    "exact-match": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 256},
        "metric_list": [{**_mean("exact_match")[0], "regexes_to_ignore": [r"^\s+", r"\s+$"]}],
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{target}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
}
_SEVERAL_CONTEXTS: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": lambda row: row["gold"],
    "doc_to_choice": lambda row: row["prompt"],
    "doc_to_target": lambda row: row["target"],
    "metric_list": _mean("acc"),
}
