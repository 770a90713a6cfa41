"""Answers to questions: cases worked by hand by the rules of SQuAD's program, and `evaluate --kind qa`."""

import json
from pathlib import Path
from typing import Any

import pytest

from encoders import save_encoder
from gossamer.engine import Encoder
from gossamer.errors import ConfigError
from gossamer.evaluation.question_tasks import answer_scores, overlap, words
from gossamer.stages.evaluate import Evaluate, evaluate


def test_words_are_normalized_as_squad_does() -> None:
    assert words("The  Eiffel-Tower, in\tan (old) Paris!") == ["eiffeltower", "in", "old", "paris"]
    assert words("A. the an") == [] == words("")
    assert words("theatre Ana") == ["theatre", "ana"]


@pytest.mark.parametrize(
    ("answer", "right", "f1"),
    [
        ("the cat sat", "Cat, sat.", 1.0),
        ("cat", "cat sat", 2 / 3),
        ("cat cat", "cat", 2 / 3),  # a word counts as often as it is in both
        ("dog", "cat", 0.0),
        ("", "", 1.0),
        ("", "cat", 0.0),
        ("cat", "", 0.0),
        ("the", "", 1.0),
    ],
)
def test_overlap_by_hand(answer: str, right: str, f1: float) -> None:
    assert overlap(answer, right) == pytest.approx(f1)


def test_questions_with_and_without_answers_are_counted_apart() -> None:
    found = ["the cat", "cat sat", "", "dog", ""]
    wanted = [["cat", "dog"], ["cat", "sat down"], ["cat"], [], []]
    scores = answer_scores(found, wanted)
    assert scores.metrics == pytest.approx(
        {
            "f1": (1 + 2 / 3 + 0 + 0 + 1) / 5,
            "exact": 2 / 5,
            "HasAns_f1": (1 + 2 / 3) / 3,
            "HasAns_exact": 1 / 3,
            "NoAns_f1": 1 / 2,
            "NoAns_exact": 1 / 2,
        }
    )
    assert scores.value == scores.metrics["f1"] and scores.num_examples == 5
    assert set(scores.standard_errors) == set(scores.metrics)
    assert set(answer_scores(["a b"], [["b"]]).metrics) == {"f1", "exact"}
    assert answer_scores([""], [["the"]]).metrics["exact"] == 1  # an answer of articles alone is none


@pytest.mark.parametrize("backend", ["torch", "engine"])
@pytest.mark.parametrize("has_none", [False, True])
def test_evaluate_compares_the_spans_that_a_model_finds(tmp_path: Path, backend: Any, has_none: bool) -> None:
    save_encoder(tmp_path / "model", "BertForQuestionAnswering", seed=1)
    encoder, rows, found = Encoder(tmp_path / "model", 1), [], []
    for number in range(8):
        context = " ".join("bcdefghij"[(number * it) % 9] for it in range(1, 20 + 20 * number))
        answer = encoder.answer("x y", context)
        text = answer["answer"] if number % 4 else context
        texts = [] if has_none and number == 5 else [text]
        starts = [context.find(it) for it in texts]
        rows.append(
            {"question": "x y", "context": context, "answers": {"text": texts, "answer_start": starts}}
        )
        none = has_none and answer["no_answer_score"] > answer["score"]
        found.append("" if none else answer["answer"])
    file = tmp_path / "it.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    job = Evaluate(str(tmp_path / "model"), dataset=str(file), kind="qa", backend=backend, threads=1)
    result = evaluate(job)
    expected = answer_scores(found, [row["answers"]["text"] for row in rows])
    assert result.metrics == {"it.jsonl": pytest.approx(expected.metrics)}
    assert 0 < result.metrics["it.jsonl"]["exact"] < 1
    assert result.standard_errors == {"it.jsonl": pytest.approx(expected.standard_errors)}
    assert evaluate(Evaluate(**vars(job) | {"limit": 2})).num_examples == {"it.jsonl": 2}


def test_other_heads_and_empty_files_are_refused(tmp_path: Path) -> None:
    save_encoder(tmp_path / "model")
    file = tmp_path / "it.jsonl"
    row = {"question": "a", "context": "b c", "answers": {"text": ["c"], "answer_start": [2]}}
    file.write_text(json.dumps(row), encoding="utf-8")
    job = Evaluate(str(tmp_path / "model"), dataset=str(file), kind="qa", threads=1)
    with pytest.raises(ConfigError, match="a head for spans; this one's is for embedding"):
        evaluate(job)
    file.write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"it\.jsonl.* (has|no) .*"):
        evaluate(job)
