"""`finetune` of heads that mark answers: against transformers, in windows, and with new heads."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import kl_div
from transformers import AutoTokenizer

from encoders import save_encoder
from gossamer.data.questions import FIRST, LAST, Question, marked_windows
from gossamer.errors import ConfigError
from gossamer.stages.finetune import Finetune, finetune
from gossamer.tokens.texts import Texts
from gossamer.tokens.tokenizer import Tokenizer

NAMES = ["BertForQuestionAnswering", "RobertaForQuestionAnswering", "ModernBertForQuestionAnswering"]


def questions(count: int, seed: int = 0, length: int = 12) -> list[dict[str, Any]]:
    """The question is a letter; the answer is that and the one behind it, where it is in the context."""
    generator, found = np.random.default_rng(seed), []
    for _ in range(count):
        words = generator.permutation([*"abcdefghijklmnop"])[:length].tolist()
        asked = str(generator.choice([*"abcdefghijklmnop"]))
        answers: dict[str, Any] = {"text": [], "answer_start": []}
        if asked in words[:-1]:
            at = words.index(asked)
            answers = {"text": [f"{asked} {words[at + 1]}"], "answer_start": [2 * at]}
        found.append({"question": asked, "context": " ".join(words), "answers": answers})
    return found


def prepared(folder: Path, kind: str, count: int, **changes: Any) -> Finetune:
    save_encoder(folder / "model", kind)
    rows = "".join(json.dumps(row) + "\n" for row in questions(count))
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    settings: dict[str, Any] = {
        "dataset": (str(folder / "rows.jsonl"),),
        "format": "qa",
        "distill": "none",
        "num_train_epochs": 1,
        "batch_tokens": 10**5,
        "learning_rate": 3e-3,
        "precision": "f32",
        "report_to": "none",
    }
    return Finetune(str(folder / "model"), str(folder / "out"), **settings | changes)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_transformers_own(tmp_path: Path, name: str) -> None:
    """Of each question alone: cross-entropy, and KL of a teacher's two ends at a temperature."""
    job, t = prepared(tmp_path, name, 30), 5.5
    save_encoder(tmp_path / "dense", name, seed=1, num_labels=2, id2label={0: "first", 1: "last"})
    student, teacher = (
        getattr(transformers, name).from_pretrained(tmp_path / it).eval() for it in ("model", "dense")
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    losses, divergences = [], []
    for row in questions(30):
        given = tokenizer(row["question"], row["context"], return_tensors="pt", return_token_type_ids=True)
        ends = [0, 0]
        for start, text in zip(row["answers"]["answer_start"], row["answers"]["text"], strict=True):
            ends = [given.char_to_token(at, sequence_index=1) for at in (start, start + len(text) - 1)]
        positions = {"start_positions": torch.tensor(ends[:1]), "end_positions": torch.tensor(ends[1:])}
        with torch.no_grad():
            ours, theirs = (model(**given, **positions) for model in (student, teacher))
        losses.append(float(ours.loss))
        both = [torch.cat([it.start_logits, it.end_logits]) / t for it in (ours, theirs)]
        q, p = (it.log_softmax(-1) for it in both)
        divergences.append(float(t**2 * kl_div(q, p, reduction="sum", log_target=True)) / 2)
    assert finetune(job).losses == (pytest.approx(np.mean(losses), rel=1e-4),)
    hard: dict[str, Any] = {"distill": "kl", "distill_temperature": t, "teacher": str(tmp_path / "dense")}
    alone = finetune(replace(job, overwrite=True, cross_entropy_weight=0.0, **hard))
    assert alone.losses == (pytest.approx(np.mean(divergences), rel=1e-3),)
    assert alone.cross_entropy_first == pytest.approx(np.mean(losses), rel=1e-4)
    half = finetune(replace(job, overwrite=True, cross_entropy_weight=0.5, **hard))
    assert half.losses == (pytest.approx(np.mean(divergences) + np.mean(losses) / 2, rel=1e-3),)


@pytest.mark.parametrize(
    "kind", ["BertModel", "RobertaForMaskedLM", "BertForQuestionAnswering", "ModernBertModel"]
)
def test_it_learns_to_mark_answers(tmp_path: Path, kind: str) -> None:
    job, said = prepared(tmp_path, kind, 400, batch_tokens=512, num_train_epochs=14), []
    result = finetune(job, lambda event: said.append(event.message))
    assert result.loss_last < 0.8 * result.loss_first
    assert any("a new head of random weights for both ends" in it for it in said) == (kind not in NAMES)
    _, info = transformers.AutoModelForQuestionAnswering.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_answers_are_learned_of_a_teacher_alone(tmp_path: Path) -> None:
    job = prepared(tmp_path, NAMES[0], 200, batch_tokens=512, num_train_epochs=10)
    save_encoder(tmp_path / "dense", NAMES[0], seed=1)
    taught: dict[str, Any] = {"teacher": str(tmp_path / "dense"), "distill": "kl"}
    result = finetune(replace(job, cross_entropy_weight=0.0, **taught))
    assert result.kl_first is not None and result.kl_last is not None
    assert result.kl_last < 0.7 * result.kl_first


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_learned_of_a_teacher_that_is_the_model_itself(tmp_path: Path, name: str) -> None:
    """Whose layers differ in nothing before the first step, so that the loss is that of the labels."""
    job = prepared(tmp_path, name, 30)
    taught = replace(job, teacher=str(tmp_path / "model"), distill="squarehead", overwrite=True)
    assert finetune(taught).losses[0] == pytest.approx(finetune(replace(job, overwrite=True)).losses[0])


def test_squads_json_teaches_a_model_that_had_three_classes(tmp_path: Path) -> None:
    save_encoder(tmp_path / "three", "BertForTokenClassification", num_labels=3)
    job = prepared(tmp_path, "BertModel", 10)
    listed = [
        {
            **row,
            "answers": [
                {"text": text, "answer_start": at}
                for text, at in zip(*(row["answers"][it] for it in ("text", "answer_start")), strict=True)
            ],
        }
        for row in questions(10)
    ]
    paragraphs = [{"context": row["context"], "qas": [row]} for row in listed]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}), encoding="utf-8")
    finetune(replace(job, model=str(tmp_path / "three"), dataset=(str(tmp_path / "squad.json"),)))
    model = transformers.BertForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert model.qa_outputs.weight.shape == (2, 24)


def test_windows_mark_the_answer_where_they_have_all_of_it(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    tokenizer, words = Tokenizer.open(tmp_path), [*"abcdefghijklmnop"]
    question = Question("1", "z", " ".join(words), ["i j"], [16])
    found = list(marked_windows(question, Texts(tokenizer, 12)))
    assert len(found) > 2 and sum(marks[0] == FIRST + LAST for _, marks in found) >= 1
    for ids, marks in found:
        context = [chr(ord("a") + it - 5) for it in ids[3:-1]]
        marked = [at for at, mark in enumerate(marks) if mark > 0]
        if {"i", "j"} <= {*context}:
            first = 3 + context.index("i")
            assert marked == [first, first + 1] and marks[first : first + 2] == [FIRST, LAST]
        else:
            assert marked == [0] and marks[0] == FIRST + LAST
    unanswerable = replace(question, answers=[], starts=[])
    assert all(marks[0] == FIRST + LAST for _, marks in marked_windows(unanswerable, Texts(tokenizer, 12)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"distill": "kl", "teacher": "dense"},
            "--distill kl: --teacher dense has a head for embedding; expected one for spans",
        ),
        ({"max_length": 5}, r"rows.jsonl:1: the question has \d+ tokens; expected at most"),
    ],
    ids=str,
)
def test_what_does_not_suit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    job = prepared(tmp_path, NAMES[0], 2)
    save_encoder(tmp_path / "dense", "BertModel")
    row = {"question": "a b c", "context": "a", "answers": {"text": [], "answer_start": []}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(ConfigError, match=says):
        finetune(replace(job, **changes))
