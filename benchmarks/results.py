"""Rows of docs/results/*.jsonl: one measured run each, with when and where."""

import json
import time
from pathlib import Path
from typing import Any

from gossamer import _native
from gossamer.machine import cpu_model

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def write_row(benchmark: str, row: dict[str, Any]) -> None:
    """Append a row to docs/results/BENCHMARK.jsonl, and print it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    where = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "cpu": cpu_model(), "isa": _native.isa()}
    line = json.dumps(where | row)
    with (RESULTS / f"{benchmark}.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line)
