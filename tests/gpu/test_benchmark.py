"""The program that a session with a GPU runs first, on a CPU, by the operator's definition."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("run", "rows"), [("correct", 24), ("kernels", 8), ("whole", 9)])
def test_it_runs_through(run: str, rows: int, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), run, "--device", "cpu", "--tiny"]
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True, timeout=240)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(found) == rows and all(it["run"] == run and it["card"] == "CPU" for it in found)
    assert all(it.get("right", True) for it in found)
