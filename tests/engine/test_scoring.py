"""Log probabilities of given tokens: native, in batches, against the logits that the engine gives."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gossamer.engine import LLM
from gossamer.engine import scoring as module
from gossamer.engine.scoring import score
from gossamer.errors import EngineError

TINY = Callable[[str], Path]


@pytest.fixture(scope="module")
def llm(tiny_llama: TINY, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_CACHE", str(tmp_path_factory.mktemp("cache")))
        return LLM(tiny_llama("llama3"), num_threads=2)


def expected(llm: LLM, context: list[int], continuation: list[int]) -> tuple[list[float], list[bool]]:
    logits_TV = llm.logits([*context, *continuation][:-1])[len(context) - 1 :].astype(np.float64)
    log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True))
    return (
        [float(log_p_TV[place, token]) for place, token in enumerate(continuation)],
        [bool(logits_TV[place].argmax() == token) for place, token in enumerate(continuation)],
    )


def requests(seed: int) -> list[tuple[list[int], list[int]]]:
    """Questions of 1 to 40 tokens, each with 1 to 4 answers of 1 to 9; a long one among them."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(12):
        context = generator.integers(2, 320, generator.integers(1, 40)).tolist()
        for _ in range(generator.integers(1, 5)):
            made.append((context, generator.integers(2, 320, generator.integers(1, 10)).tolist()))
    made.insert(7, ([5], generator.integers(2, 320, 300).tolist()))
    return made


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_scores_are_those_of_the_logits(llm: LLM, batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", batch_tokens)
    asked = requests(0)
    found = list(score(llm.model.native, asked))
    assert len(found) == len(asked)
    for (context, continuation), (log_probs, likeliest) in zip(asked, found, strict=True):
        wanted, greedy = expected(llm, context, continuation)
        assert log_probs == pytest.approx(wanted, abs=2e-5) and likeliest == greedy


def test_what_is_asked_together_changes_no_bit(llm: LLM) -> None:
    asked = requests(1)
    together = list(score(llm.model.native, asked))
    assert together == [next(score(llm.model.native, [request])) for request in asked]


def test_greedy_text_is_the_likeliest(llm: LLM) -> None:
    prompt = [3, 4, 5]
    [generation] = llm.generate([prompt])
    chosen = generation.token_ids[:20]
    [(log_probs, likeliest)] = score(llm.model.native, [(prompt, chosen)])
    assert all(likeliest) and len(log_probs) == len(chosen)


def test_each_target_has_its_likeliest(llm: LLM) -> None:
    native, ids = llm.model.native, np.array([3, 4, 5, 6], np.int32)
    targets = [ids[1:], ids[2:]]
    sequences = [native.new_sequence(4), native.new_sequence(4)]
    scores = native.score(sequences, [ids[:-1]] * 2, targets, num_likeliest=3)
    logits_TV = llm.logits(ids.tolist())[[0, 1, 2, 1, 2]].astype(np.float64)
    log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True))
    for (log_p, likeliest), target, log_p_V in zip(scores, [4, 5, 6, 5, 6], log_p_TV, strict=True):
        order = np.argsort(-log_p_V, kind="stable")[:3]
        assert log_p == pytest.approx(log_p_V[target], abs=2e-5)
        assert [token for token, _ in likeliest] == order.tolist()
        assert [of for _, of in likeliest] == pytest.approx(log_p_V[order], abs=2e-5)
    assert {len(likeliest) for _, likeliest in scores} == {3}


def test_targets_that_do_not_fit_are_refused(llm: LLM) -> None:
    native = llm.model.native
    ids = np.array([3, 4], np.int32)
    for targets, words in (
        ([], "targets for 0 of 1"),
        ([np.array([1, 2, 3], np.int32)], "more targets than new tokens"),
        ([np.array([1, 999_999], np.int32)], "found token id 999999"),
        ([np.array([1, -1], np.int32)], "found token id -1"),
    ):
        with pytest.raises(EngineError, match=words):
            native.score([native.new_sequence(4)], [ids], targets)
    many = np.zeros(257, np.int32)
    with pytest.raises(EngineError, match="257 targets; expected at most 256"):
        native.score([native.new_sequence(300)], [many], [many])
