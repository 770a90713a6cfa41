"""Rows of docs/results/*.jsonl: one measured run each, with when and where."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gossamer import _native
from gossamer.machine import cpu_model

Row = dict[str, Any]
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def write_row(benchmark: str, row: dict[str, Any]) -> None:
    """Append a row to docs/results/BENCHMARK.jsonl, and print it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    where = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "cpu": cpu_model(), "isa": _native.isa()}
    line = json.dumps(where | row)
    with (RESULTS / f"{benchmark}.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line)


def all_rows(benchmark: str, folder: Path) -> list[Row]:
    file = folder / f"{benchmark}.jsonl"
    return list(map(json.loads, file.read_text(encoding="utf-8").splitlines())) if file.is_file() else []


def newest(rows: Iterable[Row], keys: Iterable[str]) -> list[Row]:
    """The last row of each measurement, told apart by `keys`, in the order first measured."""
    found = {tuple(row[key] for key in keys): row for row in rows}
    return list(found.values())
