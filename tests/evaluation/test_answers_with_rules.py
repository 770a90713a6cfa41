"""GSM8K and IFEval on local files, by the harness's own rules: what a small model writes, scored by hand."""

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import nltk
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer.errors import ConfigError
from gossamer.evaluation.file_tasks import Shots, file_task
from gossamer.evaluation.harness import load_tasks
from gossamer.evaluation.task_yaml import FileTask
from gossamer.job.report import Event
from gossamer.stages.evaluate import Evaluate, evaluate

TinyLlama = Callable[[str], Path]
Backend = Literal["torch", "engine"]
WRITTEN = {
    "Question: one\nAnswer:": " 3 of 4 is 7.\n#### 7",
    "Question: two\nAnswer:": " so 12 of them",
    "Question: three\nAnswer:": " 5\n#### 1,600.",
    "Say a thing.": "a plain thing",
    "Say two.": "One, two",
}


@pytest.fixture(scope="module")
def parrot(tiny_llama: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that has learnt what to write after each prompt by heart."""
    path = tmp_path_factory.mktemp("parrot") / "parrot"
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama("llama2"))
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama("llama2"), dtype=torch.float32).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rows = [
        torch.tensor([[*tokenizer(prompt + text).input_ids, tokenizer.eos_token_id]])
        for prompt, text in WRITTEN.items()
    ]
    for _ in range(120):
        for row in rows:
            model(row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def examples_of(task: FileTask) -> list[dict[str, Any]]:
    """As the harness reads them."""
    return [*load_tasks([task])[0].load([str(task.file)])["tasks"][task.name].eval_docs]


@pytest.mark.parametrize("backend", ["torch", "engine"])
def test_gsm8k_is_scored_strictly_and_flexibly(backend: Backend, parrot: Path, tmp_path: Path) -> None:
    """Strict: the number after ####; flexible: the last one. Commas and a full stop do not count."""
    rows: list[dict[str, Any]] = [
        {"context": "one", "chain_of_thought": "3 + 4 = <<3+4=7>>7", "answer": "7"},
        {"question": "two", "answer": "6 + 6 = 12\n#### 12"},
        {"context": "three", "answer": "1600"},
        {"question": "one", "answer": "8"},
    ]
    job = Evaluate(str(parrot), dataset=write(tmp_path / "sums.jsonl", rows), kind="gsm8k", backend=backend)
    result = evaluate(job)
    assert result.metrics["sums.jsonl"] == {
        "exact_match,strict-match": 0.5,
        "exact_match,flexible-extract": 0.75,
    }
    spread = {name: math.sqrt(p * (1 - p) / 3) for name, p in result.metrics["sums.jsonl"].items()}
    assert result.standard_errors["sums.jsonl"] == pytest.approx(spread)
    assert result.accuracy == {"sums.jsonl": 0.5} and result.num_examples == {"sums.jsonl": 4}
    values = [row[1] for row in result.tables()[0].rows]
    assert values == [
        "50.0% +- 28.9% (exact_match, strict-match)",
        "75.0% +- 25.0% (exact_match, flexible-extract)",
    ]


def test_examples_with_their_answers_come_before_the_prompt(tmp_path: Path) -> None:
    shown = write(
        tmp_path / "train.jsonl", [{"question": f"q{n}", "answer": f"a\n#### {n}"} for n in range(9)]
    )
    asked = write(tmp_path / "test.jsonl", [{"context": "two", "answer": "12"}])
    settings = file_task(Path(asked), "gsm8k", tmp_path / "tasks", shots=Shots(3, Path(shown)))
    task = load_tasks([settings])[0].load([str(settings.file)])["tasks"]["test.jsonl"]
    task.set_fewshot_seed(1)
    task.build_all_requests()
    [instance] = task.instances
    pattern = r"(Question: q(\d)\nAnswer: a\n#### \2\n\n){3}Question: two\nAnswer:"
    assert re.fullmatch(pattern, instance.args[0])
    assert instance.args[1]["until"] == ["Question:", "</s>", "<|im_end|>"]


def test_the_asked_row_is_not_shown(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": f"a\n#### {n}"} for n in range(4)]
    file, other = write(tmp_path / "test.jsonl", rows), write(tmp_path / "copy.jsonl", rows)
    for shown in (file, other):
        settings = file_task(Path(file), "gsm8k", tmp_path / "tasks", shots=Shots(3, Path(shown)))
        task = load_tasks([settings])[0].load([str(settings.file)])["tasks"]["test.jsonl"]
        task.set_fewshot_seed(1)
        task.build_all_requests()
        for number, instance in enumerate(task.instances):
            assert sorted(re.findall(r"Question: q(\d)", instance.args[0])) == list("0123")
            assert instance.args[0].endswith(f"Question: q{number}\nAnswer:")


CHAT = {
    "kind": "chat",
    "judge": "http://127.0.0.1:9",
    "judge_model": "a",
    "baseline": "b",
    "output": "c.json",
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_fewshot": 2}, "--num-fewshot 2 needs --fewshot-dataset FILE"),
        ({"num_fewshot": -1}, "--num-fewshot is -1"),
        (
            {"num_fewshot": 2, "kind": "perplexity"},
            "--num-fewshot shows examples of .*; --kind is perplexity",
        ),
        ({"fewshot_dataset": "a.jsonl"}, "--fewshot-dataset has examples for"),
        (
            {"num_fewshot": 2, "kind": None},
            "--num-fewshot is 2, and nothing that is asked for shows examples",
        ),
        ({"num_fewshot": 2, **CHAT}, "--num-fewshot is 2, and nothing that is asked for shows examples"),
        ({"num_fewshot": 2, "fewshot_dataset": "a.jsonl", **CHAT}, "--fewshot-dataset has examples for"),
        (
            {"num_fewshot": 2, "fewshot_dataset": "nowhere.jsonl"},
            r"nowhere\.jsonl, for --kind gsm8k: no such",
        ),
    ],
)
def test_examples_to_show_are_asked_for_in_full(
    options: dict[str, Any], message: str, parrot: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "test.jsonl", [{"question": "two", "answer": "12", "text": "a"}])
    with pytest.raises(ConfigError, match=message):
        evaluate(Evaluate(str(parrot), dataset=file, **{"kind": "gsm8k", **options}))


def followed(text: str, instruction: str) -> bool:
    """The three rules of the test below, written anew."""
    if instruction == "punctuation:no_comma":
        return "," not in text
    if instruction == "change_case:english_lowercase":
        return text.islower()
    return len(re.findall(r"\w+", text)) >= 3


@pytest.mark.parametrize("backend", ["torch", "engine"])
def test_ifeval_checks_each_instruction_of_a_prompt(backend: Backend, parrot: Path, tmp_path: Path) -> None:
    words: dict[str, Any] = {"relation": "at least", "num_words": 3}
    asked = {
        "Say a thing.": ["punctuation:no_comma", "length_constraints:number_words"],
        "Say two.": ["punctuation:no_comma", "length_constraints:number_words", "punctuation:no_comma"],
        "Question: two\nAnswer:": ["length_constraints:number_words"],
    }
    rows = [
        {
            "key": number,
            "prompt": prompt,
            "instruction_id_list": names,
            "kwargs": [words if name.startswith("length") else {} for name in names],
        }
        for number, (prompt, names) in enumerate(asked.items())
    ]
    job = Evaluate(str(parrot), dataset=write(tmp_path / "rules.jsonl", rows), kind="ifeval", backend=backend)
    result = evaluate(job)
    right = [[followed(WRITTEN[prompt], name) for name in names] for prompt, names in asked.items()]
    assert right == [[True, True], [False, False, False], [True]]  # so the test can tell prompts from rules
    share = {"prompt_level": 2 / 3, "inst_level": 3 / 6}
    for level, expected in share.items():
        for way in ("strict", "loose"):
            assert result.metrics["rules.jsonl"][f"{level}_{way}_acc"] == pytest.approx(expected)
    assert result.accuracy["rules.jsonl"] == pytest.approx(2 / 3)
    errors = result.standard_errors["rules.jsonl"]
    assert errors["prompt_level_strict_acc"] == pytest.approx(1 / 3)
    rest = [2 - 0.5 * 2, 0 - 0.5 * 3, 1 - 0.5 * 1]  # of a ratio of sums, by prompts; they add up to 0
    assert errors["inst_level_loose_acc"] == pytest.approx(math.sqrt(sum(x * x for x in rest) / 2 / 3) / 2)


@pytest.mark.parametrize(
    ("names", "kwargs", "message"),
    [
        (["punctuation:no_comma"], [], r"rows\.jsonl:2: expected 1 objects in the field kwargs"),
        ([], [], "expected names in the field instruction_id_list"),
        (["no:such"], [{}], "instruction 'no:such' is none of IFEval's"),
        (["punctuation:no_comma"], [{"colour": 1}], "punctuation:no_comma cannot take {'colour': 1}"),
        (["keywords:existence"], [{}], "keywords:existence lacks keywords in the field kwargs"),
        (["keywords:existence"], ["x"], "keywords:existence cannot take 'x'"),
    ],
)
def test_instructions_that_no_rule_can_check_are_named(
    names: list[str], kwargs: list[Any], message: str, tmp_path: Path
) -> None:
    good = {"prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    bad = {"prompt": "a", "instruction_id_list": names, "kwargs": kwargs}
    file = Path(write(tmp_path / "rows.jsonl", [good, bad]))
    with pytest.raises(ConfigError, match=message):
        file_task(file, "ifeval", tmp_path)


def test_rows_that_need_data_which_are_not_there_are_named_and_can_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    kwargs: list[dict[str, Any]] = [{"relation": "at least", "num_sentences": 2}]
    rows = [
        {"prompt": "a", "instruction_id_list": ["length_constraints:number_sentences"], "kwargs": kwargs},
        {"prompt": "b", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    ]
    file = Path(write(tmp_path / "rows.jsonl", rows))
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: .*tokenizers/punkt_tab/english/.*NLTK_DATA"):
        file_task(file, "ifeval", tmp_path, offline=True)
    events: list[Event] = []
    settings = file_task(file, "ifeval", tmp_path, 1, offline=True, progress=events.append)
    assert len(examples_of(settings)) == 1
    assert "left out 1 rows" in events[0].message and events[0].lasting


def test_a_package_that_the_rules_need_is_named(
    parrot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gossamer.cli import call

    row = {"prompt": "b", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    file = write(tmp_path / "rows.jsonl", [row])
    monkeypatch.setitem(sys.modules, "langdetect", None)
    assert call(["evaluate", str(parrot), "--dataset", file, "--kind", "ifeval"]) == 1
    assert "`evaluate` needs langdetect: pip install 'gossamer[compress]'" in capsys.readouterr().err


def test_real_gsm8k_and_ifeval_are_read(shared_data: Path, tmp_path: Path) -> None:
    tasks = shared_data / "tasks"
    rows = examples_of(file_task(tasks / "gsm8k.jsonl", "gsm8k", tmp_path))
    assert len(rows) == 1000 and rows[0]["answer"].endswith("\n#### 18")
    settings = file_task(tasks / "ifeval.jsonl", "ifeval", tmp_path, skip_bad_rows=64, offline=True)
    assert 541 - 64 <= len(examples_of(settings)) <= 541
