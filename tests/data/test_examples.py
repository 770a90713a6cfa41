"""The examples of several sources: all of them, or a mixture in proportion to weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gossamer.data.examples import Examples, read_examples
from gossamer.data.tables import BadRows
from gossamer.errors import ConfigError
from gossamer.tokens.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Callable[[str], Path]) -> Tokenizer:
    return Tokenizer.open(tiny_llama("llama2"))


def write(path: Path, num: int, answer: str) -> str:
    rows = [json.dumps({"prompt": f"{path.stem} {n} ", "completion": answer}) + "\n" for n in range(num)]
    path.write_text("".join(rows))
    return str(path)


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    return write(tmp_path / "a.jsonl", 10, "x"), write(tmp_path / "b.jsonl", 200, "yes or no")


def read(tokenizer: Tokenizer, *sources: str, **options: object) -> Examples:
    return read_examples(sources, "prompt-completion", tokenizer, 64, **options)  # pyright: ignore


def test_without_weights_all_examples_are_taken_in_their_order(
    tokenizer: Tokenizer, two: tuple[str, str]
) -> None:
    found = read(tokenizer, *two)
    assert (found.num_documents, found.used_up) == ([10, 200], None)
    texts = [tokenizer.decode(ids) for ids, _ in found.pairs]
    assert texts[0] == "a 0 x" and texts[10] == "b 0 yes or no" and len(texts) == 210
    assert sum(found.num_tokens) == sum(len(ids) for ids, _ in found.pairs)


def test_weights_are_shares_of_the_tokens_and_the_mixture_ends_with_a_source(
    tokenizer: Tokenizer, two: tuple[str, str]
) -> None:
    found = read(tokenizer, f"{two[0]}@1", f"{two[1]}@3")
    assert found.used_up == two[0] and found.num_documents[0] == 10
    assert found.num_tokens[1] / sum(found.num_tokens) == pytest.approx(0.75, abs=0.05)
    again = read(tokenizer, f"{two[0]}@1", f"{two[1]}@3")
    assert again == found


def test_sources_begin_again_up_to_a_number_or_until_all_are_used_up(
    tokenizer: Tokenizer, two: tuple[str, str]
) -> None:
    some = read(tokenizer, *two, num_examples=40, repeat=True)
    assert len(some.pairs) == 40 and some.used_up is None and some.num_documents[0] == 10
    assert some.num_tokens[0] / sum(some.num_tokens) == pytest.approx(0.5, abs=0.05)
    whole = read(tokenizer, f"{two[0]}@1", f"{two[1]}@1", repeat=True)
    texts = [tokenizer.decode(ids) for ids, _ in whole.pairs]
    assert whole.used_up is None and whole.num_documents == [10, 200]
    assert sum(text.startswith("b") for text in texts) == 200 and texts.count("a 0 x") > 20
    few = read(tokenizer, *two, num_examples=5)
    assert len(few.pairs) == 5 and few.used_up is None
    ended = read(tokenizer, *two, num_examples=500)
    assert ended.used_up == two[0] and len(ended.pairs) < 40


def test_bad_rows_count_once_where_a_source_begins_again(
    tokenizer: Tokenizer, two: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "completion": "b"}\n')
    bad = BadRows(1)
    assert len(read(tokenizer, *two, num_examples=30, repeat=True, bad=bad).pairs) == 30
    assert len(bad.found) == 1
    with pytest.raises(ConfigError, match=r"a\.jsonl:1: expected text in the field completion"):
        read(tokenizer, *two, num_examples=30, repeat=True)


def test_a_source_without_examples_ends_a_mixture(tokenizer: Tokenizer, two: tuple[str, str]) -> None:
    Path(two[0]).write_text("")
    found = read(tokenizer, *two, num_examples=30, repeat=True)
    assert found.used_up == two[0] and not found.num_documents[0]
