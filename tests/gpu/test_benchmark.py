"""The program that a session with a GPU runs first, on a CPU, by the operator's definition."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("run", "rows"), [("correct", 24), ("kernels", 10), ("whole", 12)])
def test_it_runs_through(program: ModuleType, run: str, rows: int, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    getattr(program, run)(program.Measured("cpu", out, tiny=True))
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(found) == rows and all(it["run"] == run and it["card"] == "CPU" for it in found)
    assert all(it.get("right", True) for it in found)
