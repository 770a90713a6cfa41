"""Texts and pairs, cut at a length, get the ids that transformers gives them."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from encoders import save_encoder
from gossamer.errors import ConfigError
from gossamer.tokens.encoder import Encoder
from gossamer.tokens.texts import Texts

TEXTS = [
    "",
    "a",
    "a b c d e f g h i j k l m",
    ("a b", "c"),
    ("a b c d e f g", "h i j k l"),
    ("", "a b c d e f g h i j"),
]


def test_ids_and_types_are_those_of_transformers(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    for text, encoded in zip(TEXTS, Texts(Encoder.open(tmp_path), 9).encode(TEXTS), strict=True):
        pair = (text,) if isinstance(text, str) else text
        expected = other(*pair, truncation="longest_first", max_length=9, return_token_type_ids=True)
        assert encoded.ids == expected["input_ids"]
        assert encoded.type_ids == expected["token_type_ids"]


def test_what_is_no_text_in_utf8_becomes_a_replacement(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    texts = Texts(Encoder.open(tmp_path), 9)
    assert [it.ids for it in texts.encode(["a \ud800", ("a", "\udc00")])] == [[2, 5, 1, 3], [2, 5, 3, 1, 3]]


def test_a_length_without_room_for_words_is_refused(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    with pytest.raises(ConfigError, match="expected more than 3, its marks"):
        Texts(Encoder.open(tmp_path), 3)
