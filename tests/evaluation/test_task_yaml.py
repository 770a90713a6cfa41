"""The task files that `evaluate` runs from, run by lm-evaluation-harness itself: the same scores."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from gossamer.errors import ConfigError, UnsupportedError
from gossamer.evaluation.backends import TorchBackend
from gossamer.evaluation.sandbox import run_python
from gossamer.job.report import Event
from gossamer.stages.evaluate import Evaluate, evaluate

TinyLlama = Callable[[str], Path]
ROWS: dict[Any, list[dict[str, Any]]] = {
    "multiple-choice": [
        {"query": f"Question: {n}?", "choices": ["a", "import numpy", "x"], "gold": n % 3} for n in range(6)
    ],
    "cloze": [{"context": word, "continuation": "self"} for word in ("def", "class A", "x =")],
    "exact-match": [{"prompt": word, "answer": "2020-01-01"} for word in ("def f(", "x = ")],
    "perplexity": [{"text": "x = 1\ny = 2\n"}, {"text": "2021-02-03 10:00:00"}],
    "summarization": [{"prompt": "def f(", "target": ["self", "x = 1"]}, {"prompt": "0", "completion": "a"}],
    "gsm8k": [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(3)],
    "ifeval": [
        {
            "prompt": "Say a thing.",
            "instruction_id_list": ["punctuation:no_comma", "keywords:forbidden_words"],
            "kwargs": [{}, {"forbidden_words": ["self"]}],
        },
        {"prompt": "Say two.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    ],
    "code": [{"text": "Write f.", "test_list": ["assert f() == 7"]}],
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))


def job(model: Path, kind: Any, folder: Path, rows: list[dict[str, Any]], **options: Any) -> Evaluate:
    file = folder.parent / f"{kind}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Evaluate(
        str(model), dataset=str(file), kind=kind, backend="torch", write_tasks=str(folder), **options
    )


def without_filter(result: dict[str, Any]) -> dict[str, float]:
    """The harness's metrics by our names."""
    several = len({key.partition(",")[2] for key in result if "," in key}) > 1
    names = [key for key, value in result.items() if "," in key and isinstance(value, int | float)]
    return {key if several else key.partition(",")[0]: result[key] for key in names if "_stderr," not in key}


def test_each_kind_is_run_by_the_harness_alone(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """In a folder whose name is a pattern; and what looks like a time stays the text that it is."""
    model, folder = tiny_llama("llama3"), tmp_path / "a[b]*"
    rows = {kind: rows for kind, rows in ROWS.items() if kind != "code"}
    ours = {kind: evaluate(job(model, kind, folder, rows[kind], limit=9)) for kind in rows}
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found: Any = simple_evaluate(
        TorchBackend(str(model)).for_harness(),
        tasks=[f"{kind}.jsonl" for kind in rows],
        task_manager=manager,
        gen_kwargs={"max_gen_toks": 256},  # half of this model's context, as `evaluate` has it
        bootstrap_iters=0,
    )
    for kind, result in ours.items():
        told = without_filter(found["results"][f"{kind}.jsonl"])
        assert told == pytest.approx(result.metrics[f"{kind}.jsonl"], rel=1e-5), kind


def test_the_command_that_is_said_gives_the_same_score(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """lm-eval's own command line, with the examples that come before each prompt."""
    shown = tmp_path / "shown.jsonl"
    shown.write_text("".join(json.dumps(row) + "\n" for row in ROWS["multiple-choice"][:4]))
    asked = job(
        tiny_llama("llama3"), "multiple-choice", tmp_path / "tasks", ROWS["multiple-choice"],
        num_fewshot=2, fewshot_dataset=str(shown),
    )  # fmt: skip
    events: list[Event] = []
    result = evaluate(asked, events.append)
    [said] = [event.message for event in events if event.lasting]
    command = shlex.split(said[said.index("lm_eval run ") :])
    command[0] = str(Path(sys.executable).with_name("lm_eval"))
    output = tmp_path / "out.json"
    subprocess.run(
        [*command, "--device", "cpu", "--output_path", str(output)],
        check=True,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
    )
    [written] = tmp_path.rglob("out_*.json")
    found = json.loads(written.read_text())
    task = "multiple-choice.jsonl"
    assert without_filter(found["results"][task]) == pytest.approx(result.metrics[task])
    assert found["n-shot"][task] == 2 and found["n-samples"][task]["effective"] == 6
    with pytest.raises(ConfigError, match=r"multiple-choice\.jsonl\.yaml exists; .*--overwrite"):
        evaluate(asked)


def test_code_runs_in_the_sandbox_there_too(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """And only where the harness is told that it may run code."""
    model, folder = tiny_llama("llama3"), tmp_path / "tasks"
    try:
        run_python("pass")
    except UnsupportedError as error:
        pytest.skip(str(error))
    result = evaluate(job(model, "code", folder, ROWS["code"], allow_code_execution=True))
    lm = TorchBackend(str(model)).for_harness()
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    options: dict[str, Any] = {"gen_kwargs": {"max_gen_toks": 256}, "bootstrap_iters": 0}
    with pytest.raises(ValueError, match="unsafe"):
        simple_evaluate(lm, tasks=["code.jsonl"], task_manager=manager, **options)
    found: Any = simple_evaluate(
        lm, tasks=["code.jsonl"], task_manager=manager, confirm_run_unsafe_code=True, **options
    )
    assert without_filter(found["results"]["code.jsonl"]) == result.metrics["code.jsonl"]
