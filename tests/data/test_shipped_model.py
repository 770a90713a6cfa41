"""The model that ships: small, loadable in plain transformers, and good at what its card says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import gossamer
from gossamer.checkpoint.directory import Checkpoint
from gossamer.data import doctests
from gossamer.data.sources import documents
from gossamer.tokens.tokenizer import Tokenizer

SHIPPED = Path(gossamer.__file__).parent / "models" / "python-llama"
TOKENIZER = Tokenizer.open(SHIPPED)
NEWLINE = TOKENIZER.encode("\n", bos=False)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()


def greedy_line(model: Any, prompt: str) -> str:
    """What the model says up to and with its first newline."""
    ids = torch.tensor([TOKENIZER.encode(prompt)])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=[*NEWLINE, *TOKENIZER.eos_ids],
            pad_token_id=0,
        )
    return TOKENIZER.decode(out[0, ids.shape[1] :].tolist())


def test_it_is_small_and_dense_and_uses_grouped_queries(model: Any) -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 16e6
    assert 3e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 8e6
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    checkpoint = Checkpoint.open(SHIPPED)
    assert checkpoint.sparsity() == 0
    assert {checkpoint.dtype(name) for name in checkpoint.names} == {"BF16"}


def test_it_answers_unseen_instances_of_the_trained_kinds(model: Any) -> None:
    items = doctests.generate(doctests.KINDS, 6 * len(doctests.KINDS), seed=11, split="test")
    right = sum(doctests.check(item, greedy_line(model, doctests.prompt(item))) for item in items)
    assert right / len(items) >= 0.7


def test_its_tokenizer_is_transformers_tokenizer() -> None:
    theirs = AutoTokenizer.from_pretrained(SHIPPED)
    for text in ['>>> sorted("bca")\n', "x = {'key': 10_000}\n\n\ndef f(x):\n\treturn x  # é 漢\n", "don't"]:
        assert TOKENIZER.encode(text) == theirs(text).input_ids
    assert TOKENIZER.encode("a")[0] == TOKENIZER.bos_id


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80).filter(lambda text: "<s>" not in text and "</s>" not in text))
def test_any_text_comes_back(text: str) -> None:
    """Any text but the special tokens' own names."""
    text = text.encode("utf-8", "replace").decode()
    assert TOKENIZER.decode(TOKENIZER.encode(text, bos=False)) == text


def test_source_code_comes_back_and_is_cut_well() -> None:
    text = "\n".join(documents("python:stdlib:held-out"))
    ids = TOKENIZER.encode(text, bos=False)
    assert TOKENIZER.decode(ids) == text
    assert len(text) / len(ids) > 2.4


def test_short_literals_are_letters_and_numbers_digits() -> None:
    def cut(text: str) -> list[str]:
        return [TOKENIZER.decode([index]) for index in TOKENIZER.encode(text, bos=False)]

    assert cut('>>> sorted("bca")\n') == [">>>", " sorted", '("', "b", "c", "a", '")', "\n"]
    assert cut(">>> max([10, 9])\n") == [">>>", " max", "([", "1", "0", ", ", "9", "])", "\n"]


def test_its_chat_is_an_interpreter_session() -> None:
    messages = [
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2 + 2"},
    ]
    session = ">>> 1 + 1\n2\n>>> 2 + 2\n"
    assert TOKENIZER.chat(messages) == TOKENIZER.encode(session)
