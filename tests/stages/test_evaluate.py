"""`evaluate` against transformers' own logits and generation."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer.data import doctests
from gossamer.errors import CheckpointError, ConfigError, UnsupportedError
from gossamer.evaluation.backends import TorchBackend
from gossamer.stages.evaluate import Evaluate, evaluate
from gossamer.stages.pack import Pack, pack
from gossamer.stages.pretrain import Pretrain, pretrain
from gossamer.stages.prune import Prune, prune
from gossamer.stages.quantize import Quantize, quantize

TinyLlama = Callable[[str], Path]
Backend = Literal["torch", "engine"]
PAIRS = {
    "3 + 4 = ": "7",
    "def square(x): return ": "x * x",
    "import numpy as ": "np",
    "xs = ": "[1, 2, 3]",
    "x: ": "int",
}
PROMPTS = ["def ", "import numpy as np\n", "x", "class Tokenizer:\n    def __init__(self", "return 1 + "]


def reference_perplexity(model_dir: Path, text: str, num_rows: int | None = None, length: int = 255) -> float:
    """shared/data/README.md's protocol, written with transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:num_rows]
    total = 0.0
    for row in rows:
        ids_1T = torch.tensor([[tokenizer.bos_token_id, *row]])
        with torch.no_grad():
            total += model(ids_1T, labels=ids_1T).loss.item() * length
    return math.exp(total / (length * len(rows)))


def reference_completions(model_dir: Path, prompts: list[str], max_tokens: int) -> list[str]:
    """transformers' greedy generation, one prompt at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    texts = []
    for prompt in prompts:
        encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        chosen = model.generate(**encoded, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
        texts.append(tokenizer.decode(chosen[0, encoded.input_ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.fixture(scope="module")
def parrot(tiny_llama: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that has learnt `PAIRS` by heart."""
    path = tmp_path_factory.mktemp("parrot") / "parrot"
    shutil.copytree(tiny_llama("llama2"), path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    rows = [tokenizer(f"{prompt}{answer}\n").input_ids for prompt, answer in PAIRS.items()]
    for _ in range(80):
        for row in rows:
            ids_1T = torch.tensor([row])
            model(ids_1T, labels=ids_1T).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("backend", ["torch", "engine"])
@pytest.mark.parametrize("variant", ["llama2", "llama3"])
def test_perplexity_equals_transformers(
    variant: str,
    backend: Backend,
    tiny_llama: TinyLlama,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    result = evaluate(Evaluate(str(tiny_llama(variant)), dataset=str(text_file), backend=backend, limit=20))
    expected = reference_perplexity(tiny_llama(variant), text_file.read_text(), 20)
    assert result.perplexity == pytest.approx(expected, rel=1e-4)
    assert result.num_tokens == 20 * 255


@pytest.mark.parametrize("backend", ["torch", "engine"])
@pytest.mark.parametrize("length", [1, 40, 512])
def test_rows_are_as_long_as_asked_for(
    length: int,
    backend: Backend,
    tiny_llama: TinyLlama,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    model, text = tiny_llama("llama2"), str(text_file)
    result = evaluate(Evaluate(str(model), dataset=text, backend=backend, limit=12, row_length=length))
    assert result.perplexity == pytest.approx(
        reference_perplexity(model, text_file.read_text(), 12, length), rel=1e-4
    )
    assert (result.num_tokens, result.row_length) == (12 * length, length)
    assert f"{length} a row" in result.tables()[0].rows[0][2]
    for wrong in (0, 513):
        with pytest.raises(ConfigError, match="--row-length"):
            evaluate(Evaluate(str(model), dataset=text, backend=backend, row_length=wrong))


def test_threads_are_taken_by_every_stage_that_computes(
    tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    model, text = str(tiny_llama("llama2")), str(text_file)
    how: dict[str, Any] = {"num_calibration_samples": 4}
    runs: list[tuple[Any, Any]] = [
        (prune, Prune(model, str(tmp_path / "a"), dataset=(text,), max_seq_length=32, threads=2, **how)),
        (
            quantize,
            Quantize(model, str(tmp_path / "b"), dataset=(text,), max_seq_length=32, threads=3, **how),
        ),
        (
            pretrain,
            Pretrain(
                model,
                str(tmp_path / "c"),
                dataset=(text,),
                num_tokens=64,
                max_length=32,
                report_to="none",
                threads=2,
            ),
        ),
        (evaluate, Evaluate(model, dataset=text, limit=1, threads=3)),
    ]
    try:
        for verb, job in runs:
            torch.set_num_threads(1)
            verb(job)
            assert torch.get_num_threads() == job.threads
            with pytest.raises(ConfigError, match="--threads is 0"):
                verb(replace(job, threads=0))
    finally:
        torch.set_num_threads(1)
    manifest = json.loads((tmp_path / "a" / "gossamer.json").read_text())
    assert manifest["num_threads"] == 2


def test_batched_completions_equal_transformers_one_by_one(tiny_llama: TinyLlama) -> None:
    model = tiny_llama("llama3")
    completions = TorchBackend(str(model)).complete(PROMPTS, "", 12)
    assert completions == reference_completions(model, PROMPTS, 12)


@pytest.mark.parametrize("backend", ["torch", "engine"])
def test_exact_match_counts_right_and_wrong_answers(
    backend: Backend, parrot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    wrong = {"3 + 4 = ": "8"}
    file = tmp_path / "task.jsonl"
    rows = [{"prompt": p, "answer": wrong.get(p, f" {a} "), "kind": p[0]} for p, a in PAIRS.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate(Evaluate(str(parrot), tasks=(str(file),), backend=backend))
    assert result.num_examples == {str(file): 5}
    assert result.accuracy == {str(file): pytest.approx(0.8)}
    assert result.accuracy_by_kind[str(file)] == {"3": 0.0, "d": 1.0, "i": 1.0, "x": 1.0}


def test_doctests_are_scored_by_kind_and_a_random_model_fails_most(tiny_llama: TinyLlama) -> None:
    tasks = ("doctest", "doctest-unseen")
    result = evaluate(Evaluate(str(tiny_llama("llama2")), tasks=tasks, limit=32, seed=3))
    assert set(result.accuracy_by_kind["doctest"]) <= set(doctests.KINDS)
    assert set(result.accuracy_by_kind["doctest-unseen"]) == set(doctests.UNSEEN_KINDS)
    assert result.num_examples == {"doctest": 32, "doctest-unseen": 32}
    assert result.accuracy["doctest"] < 0.5
    assert [row[0] for row in result.tables()[0].rows] == ["doctest", "doctest-unseen"]


def test_a_model_recovers_all_of_itself(tiny_llama: TinyLlama, text_file: Path) -> None:
    model = str(tiny_llama("llama2"))
    result = evaluate(Evaluate(model, dataset=str(text_file), baseline=model, limit=4))
    assert result.recovery == {"perplexity": 1.0}
    assert result.tables()[0].columns[-1] == "recovery"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ConfigError, "nothing to evaluate"),
        ({"tasks": ("mmul",)}, ConfigError, "unknown task 'mmul'; expected doctest.*lm-evaluation-harness"),
        (
            {"tasks": ("mmlu_anatomy",), "offline": True},
            OSError,
            r"task mmlu_anatomy: its dataset cais/mmlu \(anatomy\) is not in .*datasets.*--dataset FILE",
        ),
        (
            {"tasks": ("mmlusr_answer_only_anatomy",), "offline": True},
            OSError,
            r"its dataset NiniCat/MMLU-SR, files .*answer_only_test/answer_only_anatomy_test\.csv.* is not",
        ),
        (
            {"tasks": ("ai2_arc",), "offline": True},  # two tasks, by a tag
            OSError,
            r"task arc_challenge: its dataset allenai/ai2_arc \(ARC-Challenge\) is not",
        ),
        ({"kind": "cloze"}, ConfigError, "--kind cloze needs --dataset FILE"),
        (
            {"kind": "cloze", "dataset": "nowhere.jsonl"},
            ConfigError,
            "nowhere.jsonl, for --kind cloze: no such file",
        ),
        ({"tasks": ("nowhere.jsonl",)}, ConfigError, "nowhere.jsonl"),
        ({"tasks": ("doctest",), "limit": -1}, ConfigError, "-1"),
        ({"tasks": ("doctest",), "model": "nowhere"}, CheckpointError, "nowhere"),
    ],
)
def test_bad_options(
    options: dict[str, Any], error: type[Exception], message: str, tiny_llama: TinyLlama
) -> None:
    with pytest.raises(error, match=message):
        evaluate(Evaluate(**{"model": str(tiny_llama("llama2")), **options}))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', r"task.jsonl:2.*answer.*prompt"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "task.jsonl:2.*0 to 1.*found 2"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "task.jsonl:2.*index.*True"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": "b"}', "task.jsonl:2.*index.*'b'"),
        ('{"prompt": "a", "choices": ["b", "b"], "answer": 0}', "task.jsonl:2.*differ"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "task.jsonl:2.*two choices"),
        ('{"prompt": "a", "choices": ["b", ""], "answer": 0}', "task.jsonl:2.*list of texts"),
        ('{"prompt": "a", "choices": "bc", "answer": 0}', "task.jsonl:2.*list of texts"),
        ('{"prompt": " ", "choices": ["b", "c"], "answer": 0}', "task.jsonl:2.*prompt"),
        ("[1]", "task.jsonl:2.*list"),
        ("{", "task.jsonl:2.*JSON"),
    ],
)
def test_bad_rows_are_named(line: str, message: str, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=message):
        evaluate(Evaluate(str(tiny_llama("llama2")), tasks=(str(file),)))


def test_packed_files_go_through_the_engine(tiny_llama: TinyLlama, text_file: Path, tmp_path: Path) -> None:
    model, file, text = str(tiny_llama("llama2")), str(tmp_path / "model.goss"), str(text_file)
    pack(Pack(model, file))
    result = evaluate(Evaluate(file, dataset=text, limit=4, baseline=model))
    assert result.backend == "engine"
    assert result.perplexity == pytest.approx(reference_perplexity(Path(model), text_file.read_text(), 4))
    assert result.recovery == {"perplexity": pytest.approx(1.0)}
    assert evaluate(Evaluate(model, dataset=text, limit=4, baseline=file)).backend == "engine"
    assert evaluate(Evaluate(model, dataset=text, limit=4)).backend == "torch"
    with pytest.raises(UnsupportedError, match="--backend engine"):
        evaluate(Evaluate(file, dataset=text, backend="torch"))


def reference_choice(model_dir: Path, prompt: str, choices: list[str]) -> int:
    """lm-eval's `acc_norm`, written with transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    given, scores = len(tokenizer(prompt).input_ids), []
    for choice in choices:
        ids = tokenizer(f"{prompt} {choice}").input_ids
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total = sum(log_probs[at - 1, ids[at]].item() for at in range(given, len(ids)))
        scores.append(total / len(choice))
    return scores.index(max(scores))


@pytest.mark.parametrize("backend", ["torch", "engine"])
@pytest.mark.parametrize("variant", ["llama2", "llama3"])
def test_choices_are_made_as_lm_eval_makes_them(
    variant: str, backend: Backend, tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    model, words = tiny_llama(variant), ["a", "import numpy as np", "def forward(self)", "0", "x = 1\ny"]
    asked = [(prompt, [*words[n:], *words[:n]][: 2 + n % 4]) for n, prompt in enumerate(PROMPTS)]
    found = [reference_choice(model, prompt, choices) for prompt, choices in asked]
    rows = [
        {"prompt": prompt, "choices": choices, "answer": (answer + n % 2) % len(choices), "kind": str(n % 2)}
        for n, ((prompt, choices), answer) in enumerate(zip(asked, found, strict=True))
    ]
    rows.insert(2, {"prompt": "x: ", "answer": "no such thing", "kind": "text"})  # one file may hold both
    file = tmp_path / "task.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate(Evaluate(str(model), tasks=(str(file),), backend=backend))
    assert result.accuracy_by_kind[str(file)] == {"0": 1.0, "1": 0.0, "text": 0.0}
    assert result.num_examples == {str(file): 6}


def test_choices_that_the_model_has_learnt_are_chosen(parrot: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{prompt.rstrip()}", "choices": [*sorted(PAIRS.values())], "answer": 0}
        for prompt in PAIRS
    ]
    for row, answer in zip(rows, PAIRS.values(), strict=True):
        row["answer"] = sorted(PAIRS.values()).index(answer)
    file = tmp_path / "task.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(Evaluate(str(parrot), tasks=(str(file),))).accuracy[str(file)] >= 0.8


@pytest.mark.parametrize(("model", "expected"), [("stories3m", 6.205), ("stories260k", 4.924)])
def test_dense_reference_points(model: str, expected: float, shared_data: Path, reserved_slice: Path) -> None:
    result = evaluate(Evaluate(str(shared_data / "models" / model), dataset=str(reserved_slice)))
    assert result.perplexity == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("model", ["stories3m", "stories260k"])
def test_an_int8_cache_costs_less_than_half_a_percent(
    model: str, shared_data: Path, reserved_slice: Path
) -> None:
    job = Evaluate(
        str(shared_data / "models" / model), dataset=str(reserved_slice), backend="engine", limit=40
    )
    perplexity = {kv: evaluate(replace(job, kv_cache_dtype=kv)).perplexity for kv in ("f32", "bf16", "i8")}
    assert perplexity["bf16"] == pytest.approx(perplexity["f32"], rel=1e-3)
    assert perplexity["i8"] == pytest.approx(perplexity["bf16"], rel=5e-3)
    assert len(set(perplexity.values())) == 3


def test_the_type_of_the_cache_is_the_engines(tiny_llama: TinyLlama, text_file: Path) -> None:
    job = Evaluate(str(tiny_llama("llama2")), dataset=str(text_file), kv_cache_dtype="i8")
    with pytest.raises(ConfigError, match="--backend engine"):
        evaluate(job)
