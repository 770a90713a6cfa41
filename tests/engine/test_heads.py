"""Heads for whole texts: labels and scores are transformers', of texts and of pairs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoders import save_encoder
from gossamer.engine import Encoder
from gossamer.errors import ConfigError, UnsupportedError

TEXTS = ["a b c", ("a b", "c d e"), "z"]
LABELS = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
ROBERTA = {"max_position_embeddings": 68, "type_vocab_size": 1, "pad_token_id": 0}
KINDS = {
    "BertForSequenceClassification": {},
    "RobertaForSequenceClassification": ROBERTA,
    "XLMRobertaForSequenceClassification": ROBERTA,
    "ModernBertForSequenceClassification": {},
}


def logits(model: Any, encoder: Encoder, texts: Any) -> torch.Tensor:
    """float32 [N, L] of transformers."""
    rows = encoder.token_ids(texts)
    with torch.no_grad():
        found = [
            model(torch.tensor([row.ids]), token_type_ids=torch.tensor([row.type_ids])).logits for row in rows
        ]
    return torch.cat(found)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_labels_are_those_of_transformers(name: str, problem: str, tmp_path: Path) -> None:
    model = save_encoder(tmp_path, name, **KINDS[name], **LABELS, problem_type=problem)
    encoder = Encoder(tmp_path, 1)
    expected_NL = logits(model, encoder, TEXTS)
    several = problem.startswith("multi")
    expected_NL = expected_NL.sigmoid() if several else expected_NL.softmax(-1)
    found = encoder.classify(TEXTS)
    for of_text, expected_L in zip(found, expected_NL, strict=True):
        order = expected_L.argsort(descending=True)
        assert [it["label"] for it in of_text] == [LABELS["id2label"][int(index)] for index in order]
        np.testing.assert_allclose([it["score"] for it in of_text], expected_L[order], rtol=0, atol=1e-5)
    assert [encoder.classify([text])[0] for text in TEXTS] == found
    assert encoder.classify([]) == []


@pytest.mark.parametrize("name", KINDS)
def test_one_label_reranks(name: str, tmp_path: Path) -> None:
    model = save_encoder(tmp_path, name, **KINDS[name], num_labels=1)
    encoder, documents = Encoder(tmp_path, 1), ["c d", "e", "f g h"]
    expected_N = logits(model, encoder, [("a b", document) for document in documents])[:, 0]
    raw = encoder.rerank("a b", documents, raw_scores=True)
    np.testing.assert_allclose(raw, expected_N, rtol=0, atol=1e-5)
    np.testing.assert_allclose(encoder.rerank("a b", documents), expected_N.sigmoid(), rtol=0, atol=1e-5)
    assert encoder.rerank("a b", []) == []
    [[only]] = encoder.classify([("a b", "e")])
    assert only["score"] == pytest.approx(float(expected_N[1].sigmoid()), abs=1e-5)


def test_vectors_rerank_by_cosines_with_their_prompts(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    prompts = '{"prompts": {"query": "q ", "passage": "p "}}'
    modules = '[{"type": "sentence_transformers.models.Transformer", "path": ""}]'
    (tmp_path / "modules.json").write_text(modules, encoding="utf-8")
    (tmp_path / "config_sentence_transformers.json").write_text(prompts, encoding="utf-8")
    encoder = Encoder(tmp_path, 1)
    vectors_ND = encoder.encode(["q a", "p b c", "p d"], normalize_embeddings=True)
    assert isinstance(vectors_ND, np.ndarray)
    np.testing.assert_allclose(encoder.rerank("a", ["b c", "d"]), vectors_ND[1:] @ vectors_ND[0], atol=1e-6)


def test_what_a_head_is_not_for_is_refused(tmp_path: Path) -> None:
    names = ("BertModel", "BertForSequenceClassification", "BertForTokenClassification")
    for name in names:
        save_encoder(tmp_path / name, name, num_labels=3)
    vectors, sequence, tokens = (Encoder(tmp_path / name, 1) for name in names)
    with pytest.raises(UnsupportedError, match=r"makes vectors of texts \(Encoder.encode.*cannot classify"):
        vectors.classify(["a"])
    with pytest.raises(UnsupportedError, match=r"scores whole texts.*Encoder.classify.*cannot encode"):
        sequence.encode(["a"])
    with pytest.raises(
        UnsupportedError, match="cannot rerank, which takes one label: it has 3; use classify"
    ):
        sequence.rerank("a", ["b"])
    for ask in (tokens.encode, tokens.classify):
        with pytest.raises(
            UnsupportedError, match=r"labels each token \(Encoder.tag.*cannot (encode|classify)"
        ):
            ask(["a"])
    for texts in ("a", [3], [("a", 3)], [("a",)], [("a", "b", "c")]):
        with pytest.raises(ConfigError, match=r"found .*expected"):
            sequence.classify(texts)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="1 of 2 texts, the first of them number 1 from 0 on"):
        sequence.classify(["a", "a b " * 100], truncate=False)
    with pytest.raises(ConfigError, match="1 of 2 texts, the first of them number 1 from 0 on"):
        tokens.tag(["a", ["a", "b"] * 100], truncate=False)
    with pytest.raises(ConfigError, match="expected a list of lists of words"):
        tokens.label_words("")
