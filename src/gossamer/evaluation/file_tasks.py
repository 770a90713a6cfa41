"""Local files as tasks of lm-evaluation-harness.

A file has one row an example; its kind says what the fields mean:

    multiple-choice   query (or question, prompt), choices, gold (or answer, label: the right one's index); or
                      context_options, continuation, gold: which context the continuation goes with
    cloze             context, continuation: the text that must be the likeliest, token by token
    exact-match       prompt (or query, question), answer: the line that must be generated
    perplexity        text, each scored by itself, in windows of the model's context
    code              prompt, test, entry_point: a function to complete, as HumanEval's; or text, test_list:
                      one to write, as MBPP's. What is generated runs in a sandbox (sandbox.py).
    summarization     prompt, completion (or target, which may be a list of texts): ROUGE of what is generated
    gsm8k             question (or context), answer that ends in "#### 18", or chain_of_thought and answer:
                      the harness's own rules find the number after "####" (strict) or the last one (flexible)
    ifeval            prompt, instruction_id_list, kwargs (ifeval.py)

Prompts are those of the harness's own tasks of these kinds: a query that begins with "Question:" ends with
"Answer:" on a line of its own, and an answer follows after a space. The harness's YAML is task_yaml.py's.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from gossamer.data.tables import TABLES, BadRows, check_table, table_rows, text_of
from gossamer.errors import ConfigError
from gossamer.evaluation import ifeval
from gossamer.evaluation.sandbox import run_python
from gossamer.evaluation.task_yaml import FileTask, Function, write_task
from gossamer.job.report import Event, Progress, quiet

Kind = Literal[
    "multiple-choice", "cloze", "exact-match", "perplexity", "code", "summarization", "gsm8k", "ifeval"
]
FEW_SHOT = ("multiple-choice", "cloze", "exact-match", "summarization", "gsm8k")


@dataclass(frozen=True)
class Shots:
    """How many rows of `file` are shown with their answers before each prompt, never the asked row itself."""

    number: int
    file: Path


def file_task(
    file: Path,
    kind: Kind,
    folder: Path,
    skip_bad_rows: int = 0,
    shots: Shots | None = None,
    *,
    offline: bool = False,
    progress: Progress = quiet,
) -> FileTask:
    """A local file as a task of the harness, named as the file is and written into `folder`.

    Raises ConfigError for a row that is not of this kind, or more of them than may be left out.
    """
    rules = ifeval.rules(offline=offline) if kind == "ifeval" else None
    read = partial(ifeval.read_instructions, rules=rules) if rules else READERS[kind]
    rows = {"test": _examples(file, kind, read, BadRows(skip_bad_rows), progress)}
    if shots is not None:
        rows["shots"] = _examples(shots.file, kind, read, BadRows(skip_bad_rows), progress)
        _check_shots(shots, rows)
    several_contexts = kind == "multiple-choice" and isinstance(rows["test"][0]["prompt"], list)
    if several_contexts != any(isinstance(row.get("prompt"), list) for part in rows.values() for row in part):
        raise ConfigError(f"{file}: some rows have context_options and some have not; expected one form")
    settings = _gsm8k() if kind == "gsm8k" else _SEVERAL_CONTEXTS if several_contexts else _TASKS[kind]
    shown = {"num_fewshot": 0}
    if shots is not None:
        if rows["shots"] == rows["test"]:  # of rows of its own the harness leaves out the one that it asks
            del rows["shots"]
        shown = {"fewshot_split": [*rows][-1], "num_fewshot": shots.number}
    return write_task(folder, file.name, {**settings, **shown, "metadata": {"kind": kind}}, rows)


def _examples(
    file: Path,
    kind: Kind,
    read: Callable[[Mapping[str, Any], str], dict[str, Any]],
    bad: BadRows,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The rows of a file of this kind, at least one; tells of those that were left out."""
    check_table(file, f"{file}, for --kind {kind}", (*TABLES, ".txt") if kind == "perplexity" else TABLES)
    rows = list(_rows(file, read, bad))
    for note in bad.notes():
        progress(Event("evaluate", f"{file}: {note}", lasting=True))
    if not rows:
        raise ConfigError(f"{file} has no examples")
    return rows


def _check_shots(shots: Shots, rows: Mapping[str, list[dict[str, Any]]]) -> None:
    """Raise ConfigError for more examples to show than there are beside the one that is asked."""
    there = len(rows["shots"])
    if rows["shots"] == rows["test"]:  # the harness leaves out all that are equal to that one
        there -= max(Counter(json.dumps(row, sort_keys=True) for row in rows["shots"]).values())
    if shots.number > there:
        raise ConfigError(
            f"--num-fewshot is {shots.number}; expected at most {there}: so many examples has {shots.file} "
            "beside one that is asked"
        )


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
        return {"prompt": choices, "target": text_of(row, where, "continuation").strip(), "gold": gold}
    return {
        "prompt": _asked(text_of(row, where, "query", "question", "prompt").rstrip()),
        "choices": choices,
        "gold": gold,
    }


def _cloze(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {
        "prompt": text_of(row, where, "context", "prompt").rstrip(),
        "target": text_of(row, where, "continuation").strip(),
    }


def _exact(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {
        "prompt": _asked(text_of(row, where, "prompt", "query", "question", "context")),
        "target": text_of(row, where, "answer").strip(),
    }


def _document(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {"prompt": "", "target": text_of(row, where, "text")}


def _asked(query: str) -> str:
    return f"{query.rstrip()}\nAnswer:" if query.startswith("Question:") else query


def _program(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    if "test_list" in row:
        tests = row["test_list"]
        if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
            raise ConfigError(f"{where}: expected a list of texts in the field test_list; found {tests!r}")
        if not isinstance(setup := row.get("test_setup_code", ""), str):
            raise ConfigError(f"{where}: expected text in the field test_setup_code; found {setup!r}")
        shown = "\n".join(tests)
        asked = f"You are an expert Python programmer, and here is your task: {text_of(row, where, 'text')}"
        return {
            "prompt": f"{asked} Your code should pass these tests:\n\n{shown}\n[BEGIN]\n",
            "before": f"{setup}\n",
            "tests": shown,
        }
    prompt = text_of(row, where, "prompt")
    tests = f"{text_of(row, where, 'test')}\ncheck({text_of(row, where, 'entry_point')})"
    return {"prompt": prompt, "before": prompt, "tests": tests}


def _summary(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    target = row.get("target")
    if isinstance(target, list) and target and all(isinstance(text, str) for text in target):
        targets = target
    else:
        targets = [text_of(row, where, "completion", "target", "summary").strip()]
    source = row.get("source")
    if isinstance(source, list) and all(isinstance(text, str) for text in source):
        source = " ".join(source)
    prompt = source if isinstance(source, str) and source else text_of(row, where, "prompt", "article")
    return {"prompt": prompt, "targets": targets}


def _arithmetic(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    answer = text_of(row, where, "answer").strip()
    if "####" not in answer:
        steps = row.get("chain_of_thought", "")
        if not isinstance(steps, str):
            raise ConfigError(f"{where}: expected text in the field chain_of_thought; found {steps!r}")
        answer = f"{steps.strip()}\n#### {answer}".lstrip()
    if not any(character.isdigit() for character in answer.rpartition("####")[2]):
        raise ConfigError(
            f"{where}: expected an answer that is a number, or ends in '#### 18'; found {answer!r}"
        )
    return {"question": text_of(row, where, "question", "context").strip(), "answer": answer}


def passes(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the tests of a `code` example pass after what was generated, in the sandbox."""
    return {"pass@1": float(run_python(f"{row['before']}{results[0]}\n{row['tests']}\n").passed)}


def rouge(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """F1 of words, pairs of words, and the longest common subsequence; of several targets the best."""
    from rouge_score.rouge_scorer import RougeScorer

    found = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score_multi(
        row["targets"], results[0]
    )
    return {name: score.fmeasure for name, score in found.items()}


READERS: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "multiple-choice": _choice,
    "cloze": _cloze,
    "exact-match": _exact,
    "perplexity": _document,
    "code": _program,
    "summarization": _summary,
    "gsm8k": _arithmetic,
}


def _gsm8k() -> dict[str, Any]:
    """The harness's own settings: its prompt, where an answer ends, the two filters that find a number."""
    import lm_eval.tasks
    import yaml

    file = Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml"
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    settings["generation_kwargs"]["max_gen_toks"] = 256  # its default, said here
    wanted = (
        "output_type",
        "doc_to_text",
        "doc_to_target",
        "metric_list",
        "generation_kwargs",
        "filter_list",
    )
    return {name: settings[name] for name in wanted}


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
    "code": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{tests}}",
        "generation_kwargs": {
            "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "[DONE]"],
            "do_sample": False,
            "max_gen_toks": 512,
        },
        "unsafe_code": True,
        "process_results": Function(f"{__name__}.passes"),
        "metric_list": _mean("pass@1"),
    },
    "summarization": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{targets[0]}}",
        "generation_kwargs": {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 128},
        "process_results": Function(f"{__name__}.rouge"),
        "metric_list": _mean("rouge1", "rouge2", "rougeL"),
    },
    "ifeval": ifeval.TASK,
}
_SEVERAL_CONTEXTS: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "gold",
    "doc_to_choice": "prompt",
    "doc_to_target": "target",
    "metric_list": _mean("acc"),
}
