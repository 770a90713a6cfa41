"""Examples in columns, as they are published: labelled texts, labelled words, pairs of texts with a score.

classification  .tsv, .csv            a header with text (or sentence), label (or category) and perhaps text2;
                                      without one: text and label, or text, text2 and label
tokens          .conll, .iob, .tsv    a word and its label a line (NER's IOB), empty lines between sentences;
                                      more columns may stand between the two, in all lines alike
sts             .tsv, .csv            a score and two texts between tabs, or STS Benchmark's seven columns
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gossamer.data.tables import TABLES, BadRows, table_rows
from gossamer.errors import ConfigError

ENDINGS: dict[str, tuple[str, ...]] = {
    "classification": (".tsv", ".csv"),
    "tokens": (".conll", ".iob", ".tsv"),
    "sts": (".tsv", ".csv"),
}
_NAMES = {"text": "text", "sentence": "text", "text2": "text2", "label": "label", "category": "label"}
Row = tuple[str, dict[str, Any]]


def example_rows(path: Path, format: str, bad: BadRows | None = None) -> Iterator[Row]:
    """Rows of a file of examples, each with `file:line` for messages, as `table_rows` has those of a table.

    ConfigError for a line that is no row, unless `bad` lets it pass.
    """
    if path.name.endswith(TABLES):
        yield from table_rows(path, bad)
        return
    read = {"classification": _texts, "tokens": _sentences, "sts": _pairs}[format]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error}); convert the file to UTF-8") from error
    for where, row in read(text, path):
        if not isinstance(row, ConfigError):
            yield where, row
        elif bad is None:
            raise row
        else:
            bad.leave_out(row)


def endings(format: str) -> tuple[str, ...]:
    """What the names of such files end in."""
    return (*TABLES, *ENDINGS.get(format, ()))


def _texts(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any] | ConfigError]]:
    lines = text.split("\n")
    if path.name.endswith(".csv") and "\t" not in lines[0]:
        found = _csv_rows(text, path)
    else:
        found = ((number, line.rstrip("\r").split("\t")) for number, line in enumerate(lines, 1))
    names: list[str] = []
    for number, columns in found:
        where = f"{path}:{number}"
        if not any(column.strip() for column in columns):
            continue
        if not names:
            header = [_NAMES.get(column.strip().lower(), "") for column in columns]
            if {"text", "label"} <= {*header}:
                names = header
                continue
            names = ["text", "text2", "label"] if len(columns) == 3 else ["text", "label"]
        if len(columns) != len(names):
            wanted = ", ".join(name or "another" for name in names)
            yield (
                where,
                ConfigError(
                    f"{where}: found {len(columns)} columns; expected {len(names)}, as line 1 has: {wanted}"
                ),
            )
            continue
        row = {name: column for name, column in zip(names, columns, strict=True) if name}
        yield where, {**row, "label": int(row["label"]) if row["label"].isdecimal() else row["label"]}


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows, which may have line ends between quotes, each with the number of its last line.

    ConfigError for one that is too long, as where a quote is not closed: the rest is then no rows.
    """
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ConfigError(
            f"{path}:{reader.line_num}: not a row of CSV ({error}); expected fields between commas, and a "
            'quote, ", at both ends of a field that has commas, quotes or line ends'
        ) from error


def _sentences(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any] | ConfigError]]:
    words: list[str] = []
    labels: list[str] = []
    begin, width, bad = 1, 0, None
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.startswith("-DOCSTART-"):
            continue
        if not line.strip():
            if bad is not None:
                yield f"{path}:{begin}", bad
            elif words:
                yield f"{path}:{begin}", {"tokens": words, "labels": labels}
            words, labels, begin, bad = [], [], number + 1, None
            continue
        columns = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
        width = width or max(2, len(columns))
        if len(columns) != width or not all(column.strip() for column in columns):
            bad = bad or ConfigError(
                f"{path}:{number}: found {len(columns)} columns, {line.strip()[:60]!r}; expected {width}, "
                "the word first and its label last"
            )
            continue
        words.append(columns[0].strip())
        labels.append(columns[-1].strip())


def _pairs(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any] | ConfigError]]:
    for number, line in enumerate(text.split("\n"), 1):
        where, columns = f"{path}:{number}", line.split("\t")
        if not line.strip():
            continue
        columns = columns[4:] if len(columns) >= 7 else columns
        try:
            yield (
                where,
                {"sentence1": columns[1], "sentence2": columns[2], "score": float(columns[0])},
            )
        except (IndexError, ValueError):
            yield (
                where,
                ConfigError(
                    f"{where}: found {line[:60]!r}; expected a score and two texts between tabs, or the "
                    "seven columns of STS Benchmark"
                ),
            )
