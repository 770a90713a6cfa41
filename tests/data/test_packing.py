"""Documents packed into rows: what is in the file, and what training reads of it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.data.mixture import Mixture
from gossamer.data.packing import RECORD, ROWS, PackedText, pack, pack_once, read_rows
from gossamer.errors import ConfigError
from gossamer.tokens.tokenizer import Tokenizer
from gossamer.training.rows import Rows


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Callable[[str], Path]) -> Tokenizer:
    return Tokenizer.open(tiny_llama("llama2"))


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def packed(texts: list[str], tokenizer: Tokenizer, folder: Path, length: int, **options: bool) -> np.ndarray:
    source = write(folder / "a.jsonl", texts)
    mixture = Mixture([source], 0, piece_characters=10**6, **options)
    return read_rows(folder, pack(mixture, tokenizer, length, 10**6, folder / ROWS))


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text("abc d\n", min_size=1, max_size=60), min_size=4, max_size=30),
    length=st.integers(3, 40),
)
def test_rows_hold_the_documents_and_begin_with_bos(
    texts: list[str], length: int, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Without BOS, the rows one behind the other are the documents; only what fills no row is left out."""
    folder = tmp_path_factory.mktemp("packed")
    all_ids = [tokenizer.encode(text, bos=False) for text in texts]
    if sum(map(len, all_ids)) < 2 * length:
        return
    rows_ST = packed(texts, tokenizer, folder, length)
    assert (rows_ST[:, 0] == ~np.int32(tokenizer.required_bos())).all()
    begins = rows_ST < 0
    assert (rows_ST[begins] == ~np.int32(tokenizer.required_bos())).all()
    order = [piece.text for piece in Mixture([str(folder / "a.jsonl")], 0, piece_characters=10**6)]
    joined = np.concatenate([tokenizer.encode(text, bos=False) for text in order])
    kept = rows_ST[~begins]
    np.testing.assert_array_equal(kept, joined[: len(kept)])
    assert len(joined) - len(kept) < length
    ends = {0, *np.cumsum([len(tokenizer.encode(text, bos=False)) for text in order]).tolist()}
    before = np.cumsum(~begins.reshape(-1))[np.flatnonzero(begins.reshape(-1))].tolist()
    at_row = np.flatnonzero(begins.reshape(-1)) % length == 0
    assert all(first or place in ends for place, first in zip(before, at_row, strict=True))


def test_every_second_row_does_without_a_bos_that_the_tokenizer_does_not_add(
    tiny_llama: Callable[[str], Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Taken apart, both kinds of rows hold the documents; a border is marked on whatever begins there."""
    document = json.loads((tiny_llama("llama2") / "tokenizer.json").read_text())
    document["post_processor"] = None
    config = json.loads((tiny_llama("llama2") / "tokenizer_config.json").read_text())
    bare = Tokenizer(json.dumps(document).encode(), {**config, "add_bos_token": False})
    assert tokenizer.adds_bos and not bare.adds_bos
    texts = [f"{n} times {n} is {n * n}.\n" * 3 for n in range(40)]
    rows_ST = packed(texts, bare, tmp_path, 16)
    bos = bare.required_bos()
    unmarked_ST = np.where(rows_ST < 0, ~rows_ST, rows_ST)
    begins = rows_ST < 0
    assert begins[:, 0].all()
    assert (unmarked_ST[::2][begins[::2]] == bos).all() and (unmarked_ST[1::2] != bos).all()
    order = [piece.text for piece in Mixture([str(tmp_path / "a.jsonl")], 0, piece_characters=10**6)]
    joined = np.concatenate([bare.encode(text, bos=False) for text in order])
    kept = unmarked_ST[unmarked_ST != bos]
    np.testing.assert_array_equal(kept, joined[: len(kept)])
    assert len(joined) - len(kept) < 16


def test_training_reads_borders_as_new_sequences() -> None:
    """Positions restart, and nothing predicts the first token; a row of one document has no positions."""
    rows = Rows(np.array([[~1, 5, 6, ~1, 7], [~1, 8, 9, 10, 11]], np.int32))
    batch = {name: tensor.tolist() for name, tensor in rows.collate([0, 1]).items()}
    assert batch == {
        "input_ids": [[1, 5, 6, 1, 7], [1, 8, 9, 10, 11]],
        "labels": [[-100, 5, 6, -100, 7], [-100, 8, 9, 10, 11]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]],
        "rows": [0, 1],
    }
    assert "position_ids" not in rows.collate([1])


def test_truncated_documents_take_a_row_at_most(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [f"{i}" + " word" * 40 for i in range(12)]
    source = write(tmp_path / "a.jsonl", texts)
    mixture = Mixture([source], 0, piece_characters=64, truncate=True)
    found = pack(mixture, tokenizer, 16, 10**6, tmp_path / ROWS)
    assert found.num_truncated == 12 and found.num_rows == 12 and found.num_tokens == [12 * 15]
    rows_ST = read_rows(tmp_path, found)
    expected = sorted(tokenizer.encode(text, bos=False)[:15] for text in texts)
    assert sorted(row[1:].tolist() for row in rows_ST) == expected


def test_what_was_packed_is_taken_again_unless_it_differs(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [f"some text {i} and more of it" for i in range(60)])

    def once(**decided: object) -> PackedText:
        return pack_once(Mixture([source], 0), tokenizer, 16, 20, tmp_path / "runs", decided)

    first = once(seed=0)
    written = (tmp_path / "runs" / ROWS).stat().st_mtime_ns
    assert once(seed=0) == first and (tmp_path / "runs" / ROWS).stat().st_mtime_ns == written
    assert first.num_rows == 20 and first.used_up is None
    assert once(seed=1) == first and (tmp_path / "runs" / ROWS).stat().st_mtime_ns != written
    for record in ("{", "[]", '{"packed": {"num_rows": 20, "new": 1}}'):  # torn, or another version's
        (tmp_path / "runs" / RECORD).write_text(record)
        assert once(seed=1) == first
    (tmp_path / "runs" / ROWS).write_bytes(b"cut")
    assert once(seed=1) == first and (tmp_path / "runs" / ROWS).stat().st_size == first.num_bytes


def test_rows_with_a_flipped_byte_are_said_and_packed_anew(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [f"some text {i} and more of it" for i in range(60)])
    notes: list[str] = []

    def once() -> PackedText:
        mixture = Mixture([source], 0)
        return pack_once(mixture, tokenizer, 16, 20, tmp_path / "runs", {}, note=notes.append)

    first, file = once(), tmp_path / "runs" / ROWS
    written = file.read_bytes()
    assert once() == first and not notes
    file.write_bytes(written[:99] + bytes([written[99] ^ 1]) + written[100:])
    assert once() == first and file.read_bytes() == written
    [note] = notes
    assert (
        "rows.i32: found sha256 " in note and f"expected {first.sha256[:12]}): they are packed anew" in note
    )


def test_a_text_that_ends_says_so_and_one_too_short_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["short"])
    with pytest.raises(ConfigError, match="do not fill a row of 64; give more text, --repeat"):
        pack(Mixture([source], 0), tokenizer, 64, 5, tmp_path / ROWS)
    long = write(tmp_path / "long.jsonl", ["some text " * 9] * 100)
    with pytest.raises(
        ConfigError, match=r"a\.jsonl is used up and ends the mixture: the dataset holds \d+ to"
    ):
        pack(Mixture([f"{source}@0.1", f"{long}@0.9"], 0), tokenizer, 512, 5, tmp_path / ROWS)
    found = pack(Mixture([source], 0, repeat=True), tokenizer, 64, 5, tmp_path / ROWS)
    assert found.num_rows == 5 and found.used_up is None
    longer = write(tmp_path / "b.jsonl", ["some text " * 20] * 3)
    found = pack(Mixture([longer], 0), tokenizer, 16, 10**6, tmp_path / ROWS)
    assert found.used_up == longer and found.num_documents == [3]
