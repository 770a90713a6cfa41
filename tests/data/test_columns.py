"""Files of columns: as the sets of the field are published, and lines that are none."""

from pathlib import Path
from typing import Any

import pytest

from gossamer.data.columns import example_rows
from gossamer.data.tables import BadRows
from gossamer.errors import ConfigError


def read(folder: Path, name: str, format: str, content: str) -> list[dict[str, Any]]:
    (folder / name).write_text(content, encoding="utf-8")
    return [row for _, row in example_rows(folder / name, format)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("it.csv", 'category,text\nyes,"a, ""b"""\n0,c\n'),
        ("it.tsv", 'sentence\tlabel\r\na, "b"\tyes\r\nc\t0\r\n'),
        ("it.csv", 'text\tidx\tlabel\na, "b"\t7\tyes\nc\t8\t0\n'),
        ("it.tsv", '\ufeffa, "b"\tyes\nc\t0\n'),
    ],
)
def test_texts_with_and_without_a_header(tmp_path: Path, name: str, content: str) -> None:
    wanted = [{"text": 'a, "b"', "label": "yes"}, {"text": "c", "label": 0}]
    assert read(tmp_path, name, "classification", content) == wanted


def test_two_texts(tmp_path: Path) -> None:
    wanted = [{"text": "a", "text2": "b", "label": 1}]
    assert read(tmp_path, "it.tsv", "classification", "a\tb\t1\n") == wanted
    assert read(tmp_path, "it.tsv", "classification", "label\ttext2\ttext\n1\tb\ta\n") == wanted


@pytest.mark.parametrize("between", ["\t", " "])
def test_sentences_of_words(tmp_path: Path, between: str) -> None:
    """As CoNLL 2003 has them, with a line before each document, and WNUT 17, whose empty lines have a tab."""
    lines = ["-DOCSTART- -X- O", "", "Rome NN B-loc", "is VB O", "\t", "", "here RB O"]
    content = "\n".join(line.replace(" ", between) for line in lines)
    first, second = read(tmp_path, "it.conll", "tokens", content)
    assert first == {"tokens": ["Rome", "is"], "labels": ["B-loc", "O"]}
    assert second == {"tokens": ["here"], "labels": ["O"]}


def test_a_line_of_other_columns_costs_its_sentence(tmp_path: Path) -> None:
    file = tmp_path / "it.iob.tsv"
    file.write_text("a\tO\nb\nc\tO\n\nd\tO\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"it.iob.tsv:2: found 1 columns, 'b'; expected 2, the word first"):
        list(example_rows(file, "tokens"))
    bad = BadRows(1)
    assert [row for _, row in example_rows(file, "tokens", bad)] == [{"tokens": ["d"], "labels": ["O"]}]
    assert len(bad.found) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"text\tlabel\na\t1\nb\n", r"it.tsv:3: found 1 columns; expected 2"),
        (b"a\t1\tb\t2\n", r"it.tsv:1: found 4 columns; expected 2"),
        (b"text\tidx\tlabel\na\t1\n", r"it.tsv:2: found 2 columns; expected 3.*has: text, another, label"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_lines_that_are_no_labelled_texts(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "it.tsv").write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        list(example_rows(tmp_path / "it.tsv", "classification"))


def test_only_line_feeds_end_rows(tmp_path: Path) -> None:
    """Texts may have what Python takes for line ends as well, and a quoted field a line end."""
    wanted = [{"text": "a\x85b\u2028c", "label": "x"}, {"text": "d\ne", "label": "y"}]
    assert read(tmp_path, "it.csv", "classification", 'text,label\na\x85b\u2028c,x\n"d\ne",y\n') == wanted
    pairs = [{"sentence1": "a\x85b", "sentence2": "c", "score": 1.0}]
    assert read(tmp_path, "it.tsv", "sts", "1\ta\x85b\tc\n\n") == pairs


def test_a_quote_that_is_not_closed_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it.csv:\d+: not a row of CSV .*expected fields between commas"):
        read(tmp_path, "it.csv", "classification", 'text,label\n"' + "a\n" * 70_000)
