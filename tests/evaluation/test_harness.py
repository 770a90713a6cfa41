"""`evaluate` through lm-evaluation-harness: our engine against its own backend, and files of each kind."""

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer.errors import ConfigError, UnsupportedError
from gossamer.evaluation.backends import EngineBackend, TorchBackend
from gossamer.evaluation.engine_lm import sampling
from gossamer.evaluation.file_tasks import file_task
from gossamer.evaluation.harness import load_tasks, run
from gossamer.evaluation.sandbox import run_python
from gossamer.evaluation.scores import accuracy, perplexity, recovery, recovery_error
from gossamer.stages.evaluate import Evaluate, evaluate

TinyLlama = Callable[[str], Path]
Backend = Literal["torch", "engine"]
WORDS = [
    "def ",
    "import numpy",
    " as np",
    "x = 1\n",
    "return ",
    "class A:",
    " self",
    "(",
    ")",
    "  ",
    "for i in",
    "0",
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def asked(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("variant", ["llama2", "llama3"])
def test_our_engine_answers_500_requests_as_the_harnesss_own_backend(
    variant: str, tiny_llama: TinyLlama
) -> None:
    """Log likelihoods within 1e-3, the same greedy choices and texts; texts longer than the context too."""
    model, chance = str(tiny_llama(variant)), np.random.default_rng(0)
    ours, theirs = EngineBackend(model, 2).for_harness(), TorchBackend(model).for_harness()

    def words(low: int, high: int) -> str:
        return "".join(chance.choice(WORDS) for _ in range(chance.integers(low, high)))

    contexts = [words(0, 20) for _ in range(125)]
    pairs = [(context, " " + words(1, 6)) for context in contexts for _ in range(4)]
    pairs[7] = (words(700, 710), " x")
    requests = asked("loglikelihood", *pairs)
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    assert len(found) == 500
    np.testing.assert_allclose([t for t, _ in found], [t for t, _ in expected], atol=1e-3, rtol=0)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    texts = asked("loglikelihood_rolling", *[(words(5, 30),) for _ in range(8)], (words(800, 810),))
    rolled = [lm.loglikelihood_rolling(texts) for lm in (ours, theirs)]
    np.testing.assert_allclose(rolled[0], rolled[1], atol=1e-2, rtol=1e-5)
    options = {"until": ["\n", "self"], "do_sample": False, "max_gen_toks": 16}
    prompts = asked("generate_until", *[(context or "x", options) for context in contexts[:24]])
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)


def test_answers_as_long_as_the_context_are_refused(tiny_llama: TinyLlama) -> None:
    """Where else each prompt would be cut to its last token, and the score be about nothing."""
    ours = EngineBackend(str(tiny_llama("llama3")), 1).for_harness()
    for tokens in (ours.max_length, ours.max_length + 1):
        with pytest.raises(ConfigError, match=f"answers of {tokens} tokens; expected fewer than"):
            ours.generate_until(asked("generate_until", ("x = 1", {"max_gen_toks": tokens})))


def test_an_answer_that_cannot_be_scored_is_refused(tiny_llama: TinyLlama) -> None:
    ours = EngineBackend(str(tiny_llama("llama3")), 1).for_harness()
    for answer, found in (([], 0), ([5] * (ours.max_length + 1), ours.max_length + 1)):
        with pytest.raises(
            ConfigError, match=f"an answer of {found} tokens; expected 1 to {ours.max_length}"
        ):
            ours._loglikelihood_tokens([(("", ""), [3, 4], answer)])


def test_a_tasks_sampling_is_the_engines() -> None:
    greedy = sampling({"until": "\n", "max_gen_toks": 9, "temperature": 0.0, "top_p": 0.9})
    assert (greedy.stop, greedy.max_tokens, greedy.temperature, greedy.top_p) == (("\n",), 9, 0.0, 1.0)
    drawn = sampling({"until": ["a", ""], "do_sample": True, "temperature": 0.2, "top_p": 0.95, "top_k": 7})
    assert (drawn.stop, drawn.temperature, drawn.top_p, drawn.top_k) == (("a",), 0.2, 0.95, 7)


@pytest.mark.parametrize("fails", [False, True])
def test_the_harness_is_left_as_it_was(
    fails: bool, tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it would ask git and torch is not asked, and asked again by whoever runs it later."""
    called: list[str] = []
    names = ("get_git_commit_hash", "add_env_info")
    for name in names:
        monkeypatch.setattr(evaluator, name, lambda *given, name=name: called.append(name))
    before = [getattr(evaluator, name) for name in names]
    file = Path(write(tmp_path / "a.jsonl", [{"context": "a", "continuation": "b"}]))
    task = file_task(file, "cloze", tmp_path)
    model = EngineBackend(str(tiny_llama("llama3")), 1).for_harness()
    if fails:
        monkeypatch.setattr(model, "loglikelihood", lambda requests: 1 / 0)
    manager, _ = load_tasks([task])
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        assert run([task], manager, model, 0)["a.jsonl"].num_examples == 1
    assert called == [] and [getattr(evaluator, name) for name in names] == before


def reference(model_dir: Path, prompt: str, answer: str) -> tuple[float, int, bool]:
    """log p(answer | prompt), its tokens, and whether each is the likeliest, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    given, ids = len(tokenizer(prompt).input_ids), tokenizer(prompt + answer).input_ids
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    places = range(given, len(ids))
    total = sum(log_probs[at - 1, ids[at]].item() for at in places)
    return total, len(places), all(log_probs[at - 1].argmax().item() == ids[at] for at in places)


@pytest.mark.parametrize("backend", ["torch", "engine"])
def test_files_of_each_kind_are_scored_as_written_out(
    backend: Backend, tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    model = tiny_llama("llama3")
    questions = ["Question: what is x?", "def f(", "class A:", "Question: 1 + 1?\n", "x"]
    choices = ["a", "import numpy as np", "0 and 1", "x = 1"]
    rows = [
        {"query": text, "choices": choices[: 2 + n % 3], "gold": n % 2} for n, text in enumerate(questions)
    ]
    plain, normed = [], []
    for row in rows:
        prompt = row["query"].rstrip() + ("\nAnswer:" if row["query"].startswith("Question:") else "")
        totals = [reference(model, prompt, f" {choice}")[0] for choice in row["choices"]]
        by_length = [total / len(choice) for total, choice in zip(totals, row["choices"], strict=True)]
        plain.append(float(np.argmax(totals) == row["gold"]))
        normed.append(float(np.argmax(by_length) == row["gold"]))
    file = write(tmp_path / "choices.jsonl", rows)
    result = evaluate(Evaluate(str(model), dataset=file, kind="multiple-choice", backend=backend))
    task = "choices.jsonl"
    assert result.metrics[task] == {"acc": np.mean(plain), "acc_norm": np.mean(normed)}
    assert result.accuracy[task] == np.mean(normed) and result.num_examples[task] == 5
    assert result.standard_errors[task]["acc_norm"] == pytest.approx(np.std(normed, ddof=1) / math.sqrt(5))
    assert "+-" in result.tables()[0].rows[0][1] and "acc_norm" in result.tables()[0].rows[0][1]

    contexts = [["x = 1\ny", "class A:"], ["def f(", "import"], ["0", "return"]]
    rows = [{"context_options": c, "continuation": "self", "gold": n % 2} for n, c in enumerate(contexts)]
    expected = [
        float(
            np.argmax([reference(model, text, " self")[0] for text in row["context_options"]]) == row["gold"]
        )
        for row in rows
    ]
    file = write(tmp_path / "contexts.jsonl", rows)
    result = evaluate(Evaluate(str(model), dataset=file, kind="multiple-choice", backend=backend))
    assert result.metrics == {"contexts.jsonl": {"acc": np.mean(expected)}}

    rows = [{"context": text, "continuation": "self"} for text in questions]
    scored = [reference(model, row["context"].rstrip(), " self") for row in rows]
    file = write(tmp_path / "cloze.jsonl", rows)
    result = evaluate(Evaluate(str(model), dataset=file, kind="cloze", backend=backend))
    assert result.metrics["cloze.jsonl"] == {
        "acc": np.mean([greedy for _, _, greedy in scored]),
        "perplexity": pytest.approx(math.exp(-np.mean([total for total, _, _ in scored])), rel=1e-4),
    }

    texts = ["x = 1\ny = 2\n", "def f(x): return x\n"]
    file = write(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    result = evaluate(
        Evaluate(str(model), dataset=file, kind="perplexity", backend=backend, baseline=str(model))
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    total = 0.0
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text).input_ids]
        with torch.no_grad():
            log_probs = loaded(torch.tensor([ids])).logits[0].log_softmax(-1)
        total += sum(log_probs[at - 1, ids[at]].item() for at in range(1, len(ids)))
    num_bytes = sum(len(text.encode()) for text in texts)
    found = result.metrics["texts.jsonl"]["bits_per_byte"]
    assert found == pytest.approx(-total / num_bytes / math.log(2), rel=1e-4)
    assert result.recovery["texts.jsonl"] == pytest.approx(1.0) and result.num_examples == {"texts.jsonl": 2}


@pytest.mark.parametrize("backend", ["torch", "engine"])
def test_an_answer_is_the_line_that_the_model_writes(
    backend: Backend, tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    model = tiny_llama("llama3")
    prompts = ["def f(", "x = ", "class A:", "return "]
    written = [
        text.split("\n")[0].strip() for text in EngineBackend(str(model), 1).complete(prompts, "\n", 256)
    ]
    rows = [
        {"prompt": prompt, "answer": answer if n % 2 else f"{answer}!"}
        for n, (prompt, answer) in enumerate(zip(prompts, written, strict=True))
        if answer
    ]
    expected = np.mean([not row["answer"].endswith("!") for row in rows])
    file = write(tmp_path / "lines.jsonl", rows)
    result = evaluate(Evaluate(str(model), dataset=file, kind="exact-match", backend=backend, limit=9))
    assert result.metrics == {"lines.jsonl": {"exact_match": expected}}


def test_code_runs_only_where_it_is_allowed(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    model = str(tiny_llama("llama3"))
    rows = [
        {
            "prompt": "def f():\n    return 7\n\n\ndef g(",
            "test": "def check(f): assert f() == 7",
            "entry_point": "f",
        },
        {"text": "Write f.", "test_list": ["assert f() == 7"]},
    ]
    job = Evaluate(model, dataset=write(tmp_path / "code.jsonl", rows), kind="code")
    with pytest.raises(ConfigError, match=r"--kind code runs programs.*--allow-code-execution lets them run"):
        evaluate(job)
    try:
        run_python("pass")
    except UnsupportedError as error:
        pytest.skip(str(error))
    result = evaluate(replace(job, allow_code_execution=True))
    assert result.metrics == {"code.jsonl": {"pass@1": 0.0}} and result.num_examples == {"code.jsonl": 2}


def test_summaries_are_scored_by_rouge(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """Of what our own completion gives, by the library that papers use."""
    from rouge_score.rouge_scorer import RougeScorer

    model = tiny_llama("llama3")
    prompts = ["def f(", "class A:"]
    written = EngineBackend(str(model), 1).complete(prompts, "\n\n", 128)
    rows = [
        {"prompt": prompts[0], "completion": written[0][:40] or "x"},
        {"source": [prompts[1]], "target": ["other words", written[1] or "x"]},
    ]
    file = write(tmp_path / "summaries.jsonl", rows)
    result = evaluate(Evaluate(str(model), dataset=file, kind="summarization", backend="engine"))
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    first = scorer.score(rows[0]["completion"].strip(), written[0])["rougeL"].fmeasure
    second = scorer.score_multi(rows[1]["target"], written[1])["rougeL"].fmeasure
    assert result.metrics["summaries.jsonl"]["rougeL"] == pytest.approx((first + second) / 2)
    assert set(result.metrics["summaries.jsonl"]) == {"rouge1", "rouge2", "rougeL"}


def test_the_error_of_recovery_is_paired() -> None:
    """Against the spread of the ratio over bootstraps; two models that fail together differ by less."""
    chance = np.random.default_rng(0)
    y = (chance.random(400) < 0.6).astype(float)
    x = np.where(chance.random(400) < 0.9, y, 0.0)
    ours, base = accuracy(x.tolist()), accuracy(y.tolist())
    drawn = chance.integers(0, 400, (2000, 400))
    spread = np.std(x[drawn].mean(1) / y[drawn].mean(1))
    assert recovery(ours, base) == pytest.approx(x.mean() / y.mean())
    assert recovery_error(ours, base) == pytest.approx(spread, rel=0.1)


def test_the_errors_of_perplexities_are_those_of_their_rows() -> None:
    """Against the spread over bootstraps of rows of several lengths; hard rows are hard for both models."""
    chance = np.random.default_rng(0)
    lengths = chance.integers(5, 200, 300).astype(float)
    hard = chance.normal(2.0, 0.5, 300)
    losses = [lengths * (hard + chance.normal(extra, 0.1, 300)) for extra in (0.3, 0.0)]
    ours, base = (perplexity((-loss).tolist(), lengths.tolist()) for loss in losses)
    drawn = chance.integers(0, 300, (3000, 300))
    values = [np.exp(loss[drawn].sum(1) / lengths[drawn].sum(1)) for loss in losses]
    for scores, spread in zip((ours, base), values, strict=True):
        assert scores.standard_errors["perplexity"] == pytest.approx(np.std(spread), rel=0.1)
    assert recovery(ours, base) == pytest.approx(base.value / ours.value)
    paired = recovery_error(ours, base)
    assert paired == pytest.approx(np.std(values[1] / values[0]), rel=0.1)
    assert paired is not None and paired < 0.3 * base.standard_errors["perplexity"] / ours.value
    assert perplexity([-9.0], [3]).standard_errors == {}


def test_every_score_has_an_error_and_so_has_every_recovery(
    tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    """A text, doctests, a file of prompts and answers, and documents, of which the harness gives none."""
    rows = [{"prompt": f"{n}", "choices": ["a", "import", "x = 1"], "answer": n % 3} for n in range(8)]
    file = write(tmp_path / "own.jsonl", rows)
    model, other = str(tiny_llama("llama3")), str(tiny_llama("llama2"))
    asked = Evaluate(model, dataset=str(text_file), tasks=("doctest", file), limit=8, baseline=other)
    found = evaluate(asked)
    assert set(found.standard_errors) == {"perplexity", "doctest", file}
    p = found.accuracy[file]
    assert found.standard_errors[file] == {"acc": pytest.approx(math.sqrt(p * (1 - p) / 7))}
    assert found.standard_errors["perplexity"]["perplexity"] > 0
    assert set(found.recovery_errors) == set(found.recovery) >= {"perplexity"}
    assert all("+-" in row[1] and ("+-" in row[3]) == (row[0] in found.recovery) for row in found._rows())
    texts = [{"text": f"x = {n}\n" * (n + 1)} for n in range(6)]
    asked = replace(asked, dataset=write(tmp_path / "texts.jsonl", texts), kind="perplexity", tasks=())
    found = evaluate(asked)
    errors = found.standard_errors["texts.jsonl"]
    assert set(errors) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    slope = found.metrics["texts.jsonl"]["byte_perplexity"] * math.log(2)
    assert errors["byte_perplexity"] == pytest.approx(errors["bits_per_byte"] * slope)
    assert found.recovery_errors["texts.jsonl"] > 0
    same = evaluate(replace(asked, baseline=model)).recovery_errors
    assert same == {"texts.jsonl": pytest.approx(0.0, abs=1e-9)}


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("multiple-choice", {"query": "a"}, "expected a list of texts in the field choices; found None"),
        ("multiple-choice", {"query": "a", "choices": ["b"], "gold": 0}, "at least two choices"),
        ("multiple-choice", {"query": "a", "choices": ["b", ""], "gold": 0}, "list of texts"),
        ("multiple-choice", {"query": "a", "choices": ["b", "c"], "gold": 2}, "index, 0 to 1.*found 2"),
        ("multiple-choice", {"query": "a", "choices": ["b", "c"], "gold": True}, "found True"),
        (
            "multiple-choice",
            {"choices": ["b", "c"], "gold": 0},
            "text in the field query, question or prompt",
        ),
        ("multiple-choice", {"context_options": ["b", "c"], "gold": 0}, "text in the field continuation"),
        ("cloze", {"context": "a"}, r"text in the field continuation; found fields \['context'\]"),
        ("exact-match", {"prompt": "a", "answer": " "}, "text in the field answer"),
        ("perplexity", {"txt": "a"}, "text in the field text"),
        ("code", {"prompt": "a"}, "text in the field test"),
        ("code", {"text": "a", "test_list": []}, "list of texts in the field test_list"),
        ("summarization", {"prompt": "a"}, "text in the field completion, target or summary"),
    ],
)
def test_rows_of_another_kind_are_named(kind: Any, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {
        "query": "a", "choices": ["b", "c"], "gold": 1, "context": "a", "continuation": "b",
        "prompt": "a", "answer": "b", "text": "a", "test": "a", "entry_point": "a", "completion": "a",
    }  # fmt: skip
    if kind == "multiple-choice":
        del good["answer"]
    file = write(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(ConfigError, match=rf"rows\.jsonl:2: .*{message}"):
        file_task(Path(file), kind, tmp_path)
    assert file_task(Path(file), kind, tmp_path, skip_bad_rows=1).name == "rows.jsonl"


def test_files_that_are_no_tasks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.jsonl has no examples"):
        file_task(tmp_path / "empty.jsonl", "cloze", tmp_path)
    rows = [
        {"query": "a", "choices": ["b", "c"], "gold": 0},
        {"context_options": ["a", "b"], "continuation": "c", "gold": 0},
    ]
    with pytest.raises(ConfigError, match="some rows have context_options and some have not"):
        file_task(Path(write(tmp_path / "both.jsonl", rows)), "multiple-choice", tmp_path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(
        ConfigError, match=r"a\.txt, for --kind cloze: found another kind of file; expected a \.jsonl"
    ):
        file_task(tmp_path / "a.txt", "cloze", tmp_path)
    assert file_task(tmp_path / "a.txt", "perplexity", tmp_path).name == "a.txt"
