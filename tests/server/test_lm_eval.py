"""lm-evaluation-harness over HTTP: its own client, `local-completions`, and a real server process."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI

from gossamer.engine import LLM, SamplingParams
from gossamer.evaluation.backends import EngineBackend, TorchBackend
from gossamer.evaluation.file_tasks import file_task
from gossamer.stages.evaluate import Evaluate, evaluate

from .conftest import Running, end, start

Tiny = Callable[[str], Path]
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
    "é",
    "0",
]


@pytest.fixture(scope="module")
def model(tiny_llama: Tiny) -> Path:
    return tiny_llama("llama3")


@pytest.fixture(scope="module")
def running(packed: Callable[[str], Path]) -> Iterator[Running]:
    running = start(packed("plain"))
    yield running
    end(running)


def harness_model(running: Running, model: Path, **options: Any) -> Any:
    return LocalCompletionsAPI(
        base_url=f"{running.url}/v1/completions",
        model=running.name,
        tokenizer=str(model),
        add_bos_token=True,
        max_length=512,
        **options,
    )


def asked(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


@pytest.mark.parametrize("options", [{"batch_size": 7}, {"num_concurrent": 5}], ids=str)
def test_100_requests_get_what_the_engine_and_transformers_answer(
    running: Running, model: Path, options: dict[str, Any]
) -> None:
    chance = np.random.default_rng(0)

    def words(low: int, high: int) -> str:
        return "".join(chance.choice(WORDS) for _ in range(chance.integers(low, high)))

    over_http = harness_model(running, model, **options)
    ours, theirs = EngineBackend(str(running.path), 1).for_harness(), TorchBackend(str(model)).for_harness()
    contexts = [words(0, 20) for _ in range(25)]
    pairs = [(context, " " + words(1, 6)) for context in contexts for _ in range(4)]
    until = {"until": ["\n", "self"], "do_sample": False, "max_gen_toks": 16}
    prompts = asked("generate_until", *[(context or "x", until) for context in contexts])
    assert over_http.generate_until(prompts) == ours.generate_until(prompts)
    requests = asked("loglikelihood", *pairs)
    found, engine, torch = (lm.loglikelihood(requests) for lm in (over_http, ours, theirs))
    np.testing.assert_allclose([t for t, _ in found], [t for t, _ in engine], atol=1e-9, rtol=0)
    np.testing.assert_allclose([t for t, _ in found], [t for t, _ in torch], atol=1e-3, rtol=0)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in engine]
    rows = [ours.tok_encode(context or "x") for context in contexts[:9]]
    chosen = [of.token_ids for of in LLM(running.path, 1).generate(rows, SamplingParams(max_tokens=4))]
    others = [[*ids[:-1], (ids[-1] + 1) % 320] for ids in chosen]
    for answers, greedy in ((chosen, True), (others, False)):
        told = over_http._loglikelihood_tokens(
            [(None, row, ids) for row, ids in zip(rows, answers, strict=True)]
        )
        assert [of for _, of in told] == [greedy] * 9
    texts = asked("loglikelihood_rolling", *[(words(5, 30),) for _ in range(4)])
    rolled = [lm.loglikelihood_rolling(texts) for lm in (over_http, ours, theirs)]
    np.testing.assert_allclose(rolled[0], rolled[1], atol=1e-9, rtol=0)
    np.testing.assert_allclose(rolled[0], rolled[2], atol=1e-2, rtol=1e-5)


def test_a_files_task_has_the_scores_that_evaluate_gives_it(
    running: Running, model: Path, tmp_path: Path
) -> None:
    """The options that docs/design.md names, as `lm_eval --model_args` takes them."""
    words = [word for word in WORDS if word.strip()]
    rows = [{"query": text, "choices": words[n : n + 3], "gold": n % 3} for n, text in enumerate(words[:9])]
    file = tmp_path / "choices.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = f"base_url={running.url}/v1/completions,model={running.name},tokenizer={model},max_length=512"
    found: Any = simple_evaluate(
        "local-completions",
        f"{options},num_concurrent=8,add_bos_token=True",
        tasks=[str(file_task(file, "multiple-choice", tmp_path).file)],
        bootstrap_iters=0,
    )
    expected = evaluate(Evaluate(str(running.path), dataset=str(file), kind="multiple-choice", threads=1))
    told = found["results"][file.name]
    assert {name: told[f"{name},none"] for name in ("acc", "acc_norm")} == expected.metrics[file.name]
