"""`finetune` of embedding models on pairs of texts and how alike they are."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from encoders import save_encoder
from gossamer.errors import ConfigError, UnsupportedError
from gossamer.stages.evaluate import Evaluate, evaluate
from gossamer.stages.finetune import Finetune, finetune


def pairs(count: int, seed: int) -> list[tuple[float, str, str]]:
    """Texts are as alike as their first words' places in the alphabet are near, from 0 to 5."""
    generator, found = np.random.default_rng(seed), []
    for _ in range(count):
        first, second = (generator.choice([*"abcdef"], generator.integers(1, 6)).tolist() for _ in range(2))
        score = 5 - abs(ord(first[0]) - ord(second[0]))
        found.append((float(score), " ".join(first), " ".join(second)))
    return found


def prepared(folder: Path, kind: str = "BertModel", **changes: Any) -> Finetune:
    save_encoder(folder / "model", kind)
    for seed, name in enumerate(("train.tsv", "test.tsv")):
        lines = ["\t".join(map(str, pair)) + "\n" for pair in pairs(300, seed)]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    settings: dict[str, Any] = {
        "dataset": (str(folder / "train.tsv"),),
        "format": "sts",
        "distill": "none",
        "num_train_epochs": 6,
        "batch_tokens": 256,
        "learning_rate": 5e-3,
        "precision": "f32",
        "report_to": "none",
    }
    return Finetune(str(folder / "model"), str(folder / "out"), **settings | changes)


def test_the_loss_is_that_of_each_pair_alone(tmp_path: Path) -> None:
    job = prepared(tmp_path, num_train_epochs=1, batch_tokens=10**5)
    model = AutoModel.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    errors = []
    for score, *texts in pairs(300, 0):
        with torch.no_grad():
            u, v = (model(**tokenizer(it, return_tensors="pt")).last_hidden_state[0].mean(0) for it in texts)
        errors.append(float((torch.cosine_similarity(u, v, 0) - score / 5) ** 2))
    assert finetune(job).losses == (pytest.approx(np.mean(errors), rel=1e-3),)


@pytest.mark.parametrize("teacher", [False, True])
def test_ranks_of_pairs_that_it_has_not_seen_come_nearer_to_peoples(tmp_path: Path, teacher: bool) -> None:
    job = prepared(tmp_path)
    if teacher:
        finetune(replace(job, output_dir=str(tmp_path / "dense")))
        job = replace(job, teacher=str(tmp_path / "dense"), distill="squarehead")
    result = finetune(job)
    measured = [
        evaluate(Evaluate(str(tmp_path / it), dataset=str(tmp_path / "test.tsv"), kind="sts", threads=1))
        for it in ("model", "out")
    ]
    before, after = (it.metrics["test.tsv"]["spearman"] for it in measured)
    assert after > before + 0.2
    assert (result.squared_error_last is not None) == teacher


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"distill": "kl", "teacher": "dense"}, UnsupportedError, "has no logits"),
        ({"new_head": True}, ConfigError, "--new-head with --format sts"),
        ({"kind": "BertForMaskedLM"}, ConfigError, "learned by embedding models; .* a bert for masked"),
    ],
    ids=str,
)
def test_what_does_not_suit(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        finetune(prepared(tmp_path, **changes))


@pytest.mark.parametrize("score", [-1.0, "high", True])
def test_scores_that_are_none(tmp_path: Path, score: object) -> None:
    row = {"sentence1": "a", "sentence2": "b", "score": score}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: score is"):
        finetune(prepared(tmp_path, dataset=(str(tmp_path / "rows.jsonl"),)))
