"""Whole texts in rows: what is in the file, and what training reads of it."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders import save_encoder
from gossamer.data.mixture import Mixture
from gossamer.data.packing import ROWS, read_rows
from gossamer.data.whole_texts import PADDING, pack_whole, row_lengths
from gossamer.errors import ConfigError
from gossamer.tokens.tokenizer import Tokenizer
from gossamer.training.rows import Rows
from gossamer.training.text_rows import begins, text_batch

CLS, SEP = 2, 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    save_encoder(folder := tmp_path_factory.mktemp("encoder"))
    return Tokenizer.open(folder)


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text("abc d", max_size=60), min_size=1, max_size=30).filter(
        lambda ts: any(map(str.strip, ts))
    ),
    length=st.integers(3, 40),
    truncate=st.booleans(),
)
def test_rows_hold_every_text_whole(
    texts: list[str],
    length: int,
    truncate: bool,
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A document longer than a row becomes several texts, or its beginning is one."""
    source = (folder := tmp_path_factory.mktemp("packed")) / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if text.strip()))
    mixture = Mixture([str(source)], 0, piece_characters=10**6, truncate=truncate)
    packed = pack_whole(mixture, tokenizer, length, 10**6, folder / ROWS)
    rows_ST = read_rows(folder, packed)
    expected: list[list[int]] = []
    for text in texts:
        ids = tokenizer.encode(text, bos=False)
        parts = [[CLS, *ids[at : at + length - 2], SEP] for at in range(0, len(ids), length - 2)]
        expected += parts[:1] if truncate else parts
    rows = Rows(rows_ST, lengths_S=row_lengths(rows_ST), digest=packed.sha256).padded(7)
    batch = text_batch(rows, [*range(len(rows))])
    found = [batch["input_ids"][batch["texts"] == index].tolist() for index in range(len(expected))]
    assert sorted(found) == sorted(expected)
    assert int(batch["texts"].max()) == len(expected) - 1
    assert (batch["position_ids"][begins(batch["texts"])] == 0).all()
    assert rows.num_tokens(len(rows)) == sum(map(len, expected)) == (rows_ST != PADDING).sum()
    assert packed.num_tokens == [sum(map(len, expected)) - 2 * len(expected)]


def test_a_dataset_without_a_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    mixture = Mixture([str(tmp_path / "a.txt")], 0)
    with pytest.raises(ConfigError, match="holds no text"):
        pack_whole(mixture, tokenizer, 8, 4, tmp_path / ROWS)
