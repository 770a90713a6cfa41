"""Answers in texts: the spans that transformers' scores make likeliest, over windows of long contexts."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from encoders import save_encoder
from gossamer.engine import Encoder
from gossamer.errors import ConfigError, UnsupportedError

ROBERTA = {"max_position_embeddings": 67, "type_vocab_size": 1, "pad_token_id": 0}
KINDS = {
    "BertForQuestionAnswering": {},
    "RobertaForQuestionAnswering": ROBERTA,
    "XLMRobertaForQuestionAnswering": ROBERTA,
    "ModernBertForQuestionAnswering": {},
}
QUESTION = "who is a b"


def context(number: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice([*"abcdefghijklmnop"], number))


def expected(model: Any, path: Path, question: str, text: str, most: int) -> dict[str, Any]:
    """By transformers' tokenizer and model, and a loop over all spans."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = tokenizer(
        question,
        text,
        truncation="only_second",
        max_length=66,
        stride=20,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    spans, none = {}, float("inf")
    for index, offsets in enumerate(rows["offset_mapping"]):
        ids, types = (torch.tensor([rows[it][index]]) for it in ("input_ids", "token_type_ids"))
        is_roberta = model.config.type_vocab_size == 1
        with torch.no_grad():
            out = model(ids, token_type_ids=types * 0 if is_roberta else types)
        start, end = out.start_logits[0].double(), out.end_logits[0].double()
        none = min(none, float(start[0] + end[0]))
        inside = [it for it, sequence in enumerate(rows.sequence_ids(index)) if sequence == 1]
        for a, b in product(inside, inside):
            if a <= b < a + most:
                spans[index, offsets[a][0], offsets[b][1]] = float(start[a] + end[b])
    (_, first, last), score = max(spans.items(), key=lambda it: it[1])
    p = torch.tensor([score, none, *spans.values()]).double()
    p = p.exp() / p[1:].exp().sum()
    return {
        "answer": text[first:last],
        "start": first,
        "end": last,
        "score": pytest.approx(float(p[0]), abs=1e-5),
        "no_answer_score": pytest.approx(float(p[1]), abs=1e-5),
    }


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("most", [1, 4, 30])
def test_the_best_span_is_that_of_transformers_scores(name: str, most: int, tmp_path: Path) -> None:
    model = save_encoder(tmp_path, name, **KINDS[name])
    encoder = Encoder(tmp_path, 1)
    asked = [(QUESTION, context(number, number)) for number in (1, 12, 57, 58, *range(150, 158))]
    found = encoder.answers(asked, max_answer_len=most, stride=20)
    assert found == [expected(model, tmp_path, *it, most) for it in asked]
    assert len({it["start"] > 120 for it in found}) == 2  # also behind the first window
    assert [encoder.answer(*it, max_answer_len=most, stride=20) for it in asked] == found


def test_windows_share_half_of_themselves_at_most(tmp_path: Path) -> None:
    save_encoder(tmp_path, "BertForQuestionAnswering")
    encoder, text = Encoder(tmp_path, 1), context(200)
    assert encoder.answer(QUESTION, text) == encoder.answer(QUESTION, text, stride=29)
    question = " ".join(["a"] * 62)
    assert len(encoder.answer(question, text)["answer"]) == 1  # windows of one token


def test_what_cannot_be_answered_is_refused(tmp_path: Path) -> None:
    for name in ("BertModel", "BertForTokenClassification", "BertForQuestionAnswering"):
        save_encoder(tmp_path / name, name)
    with pytest.raises(UnsupportedError, match=r"makes vectors of texts.*cannot answer"):
        Encoder(tmp_path / "BertModel", 1).answer("a", "b")
    with pytest.raises(UnsupportedError, match=r"labels each token.*cannot answer"):
        Encoder(tmp_path / "BertForTokenClassification", 1).answer("a", "b")
    encoder = Encoder(tmp_path / "BertForQuestionAnswering", 1)
    with pytest.raises(UnsupportedError, match=r"marks answers.*Encoder.answer.*cannot tag"):
        encoder.tag(["a"])
    for options in ({"max_answer_len": 0}, {"stride": -1}):
        with pytest.raises(ConfigError, match="expected at least 1, and 0"):
            encoder.answer("a", "b", **options)
    with pytest.raises(ConfigError, match="the question has 63 tokens; expected at most 62"):
        encoder.answer(" ".join(["a"] * 63), "b")
    with pytest.raises(ConfigError, match="found the context ' '; expected a text"):
        encoder.answer("a", " ")
    with pytest.raises(ConfigError, match="expected texts"):
        encoder.answer("a", 3)  # type: ignore[arg-type]
    for asked in (["ab"], [("a", "b", "c")], "ab", [3]):
        with pytest.raises(ConfigError, match=r"found .*expected .*pairs"):
            encoder.answers(asked)  # type: ignore[arg-type]
    assert encoder.answers([]) == []
