"""f1 of spans: cases worked by hand, its errors by bootstrap, and `evaluate --kind tokens`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from encoders import save_encoder
from gossamer.errors import ConfigError
from gossamer.evaluation.encoder_tasks import read_encoder_tasks
from gossamer.evaluation.entity_tasks import span_scores
from gossamer.stages.evaluate import Evaluate, evaluate

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
NAMED = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}


@pytest.mark.parametrize(
    ("found", "wanted", "precision", "recall"),
    [
        ("B-PER I-PER O B-LOC", "B-PER I-PER O B-LOC", 1, 1),
        ("B-PER O O B-LOC", "B-PER I-PER O B-LOC", 1 / 2, 1 / 2),  # half a name is none
        ("B-LOC I-LOC O B-LOC", "B-PER I-PER O B-LOC", 1 / 2, 1 / 2),  # nor is one of another kind
        ("I-PER I-PER O O", "B-PER I-PER O B-LOC", 1, 1 / 2),  # I- after O begins one
        ("B-PER B-PER O O", "B-PER I-PER O O", 0, 0),
        ("O O O O", "B-PER I-PER O B-LOC", 0, 0),
        ("B-PER O O O", "O O O O", 0, 0),
        ("B-PER B-PER B-LOC O", "B-PER O B-LOC I-LOC", 1 / 3, 1 / 2),
    ],
)
def test_spans_by_hand(found: str, wanted: str, precision: float, recall: float) -> None:
    metrics = span_scores([found.split()], [wanted.split()]).metrics
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
    assert metrics == pytest.approx({"f1": f1, "precision": precision, "recall": recall})


def drawn(number: int, seed: int) -> tuple[list[list[str]], list[list[str]]]:
    """Labels, and the same with mistakes."""
    rng = np.random.default_rng(seed)
    wanted = [rng.choice(LABELS, rng.integers(1, 20)).tolist() for _ in range(number)]
    found = [[it if rng.random() < 0.8 else str(rng.choice(LABELS)) for it in labels] for labels in wanted]
    return found, wanted


def test_errors_are_those_of_a_bootstrap_over_texts() -> None:
    found, wanted = drawn(300, 0)
    scores, rng = span_scores(found, wanted), np.random.default_rng(1)
    assert scores.value == scores.metrics["f1"] == pytest.approx(np.mean(scores.samples))
    values = [
        span_scores([found[it] for it in chosen], [wanted[it] for it in chosen]).metrics
        for chosen in rng.integers(0, 300, (300, 300))
    ]
    for name in ("f1", "precision", "recall"):
        spread = np.std([it[name] for it in values])
        assert scores.standard_errors[name] == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize("backend", ["torch", "engine"])
def test_evaluate_counts_the_spans_that_a_model_finds(tmp_path: Path, backend: Any) -> None:
    model = save_encoder(tmp_path / "model", "BertForTokenClassification", **NAMED)
    tokenizer, rng = AutoTokenizer.from_pretrained(tmp_path / "model"), np.random.default_rng(0)
    found, wanted, rows = [], [], []
    for number in range(12):
        words = rng.choice([*"abcdefgh"], 5 if number else 80).tolist()
        with torch.no_grad():
            ids = tokenizer(
                words, is_split_into_words=True, truncation=True, max_length=66, return_tensors="pt"
            )
            numbers = model(**ids).logits[0, 1:-1].argmax(-1).tolist()
        found.append([LABELS[it] for it in numbers] + ["O"] * (len(words) - len(numbers)))
        wanted.append([it if rng.random() < 0.8 else "O" for it in found[-1]])
        named = wanted[-1] if number % 2 else [LABELS.index(it) for it in wanted[-1]]
        rows.append(json.dumps({"tokens": words, "labels": named}))
    file = tmp_path / "it.jsonl"
    file.write_text("\n".join(rows), encoding="utf-8")
    job = Evaluate(str(tmp_path / "model"), dataset=str(file), kind="tokens", backend=backend, threads=1)
    result, expected = evaluate(job), span_scores(found, wanted)
    assert 0 < expected.value < 1
    assert result.metrics == {"it.jsonl": pytest.approx(expected.metrics)}
    assert result.standard_errors["it.jsonl"] == pytest.approx(expected.standard_errors)
    assert result.num_examples == {"it.jsonl": 12}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"tokens": ["a", "b"], "labels": ["O"]}', r"it.jsonl:1: found labels .*one for each of 2 tokens"),
        ('{"tokens": "a b", "labels": ["O", "O"]}', r"it.jsonl:1: found tokens .*a list of words"),
        ("", "has no examples"),
    ],
)
def test_other_rows_are_refused(tmp_path: Path, row: str, words: str) -> None:
    (tmp_path / "it.jsonl").write_text(row, encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        read_encoder_tasks(tmp_path / "it.jsonl", "tokens", 0)


def test_other_labels_and_other_heads_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "it.jsonl"
    file.write_text('{"tokens": ["a"], "labels": ["B-GENE"]}', encoding="utf-8")
    save_encoder(tmp_path / "vectors")
    with pytest.raises(ConfigError, match="this one's is for embedding"):
        evaluate(Evaluate(str(tmp_path / "vectors"), dataset=str(file), kind="tokens", threads=1))
    save_encoder(tmp_path / "model", "BertForTokenClassification", **NAMED)
    with pytest.raises(ConfigError, match=r"it.jsonl:1: found label 'B-GENE'; expected one of O, B-PER"):
        evaluate(Evaluate(str(tmp_path / "model"), dataset=str(file), kind="tokens", threads=1))
