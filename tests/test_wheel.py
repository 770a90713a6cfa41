"""The small runtime: a wheel built from this tree, in an environment without torch, runs a packed model."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gossamer.engine import LLM, SamplingParams
from gossamer.stages.pack import Pack, pack

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import json, sys, time
start = time.perf_counter()
from gossamer import LLM, SamplingParams
seconds = time.perf_counter() - start
[answer] = LLM(sys.argv[1]).generate("Once upon", SamplingParams(max_tokens=12))
heavy = sorted({"torch", "transformers", "datasets", "matplotlib"} & set(sys.modules))
print(json.dumps({"ids": list(answer.token_ids), "heavy": heavy, "seconds": seconds}))
"""


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of a fresh environment that holds the wheel and what it requires, nothing else."""
    directory = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = ["--config-settings", f"build-dir={ROOT / 'build' / 'test-wheel'}"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(directory), *build, str(ROOT)])
    [wheel] = directory.glob("gossamer-*.whl")
    run([sys.executable, "-m", "venv", str(directory / "venv")])
    python = str(directory / "venv" / "bin" / "python")
    run([python, *pip[1:], "install", "-c", str(ROOT / "constraints.txt"), str(wheel)])
    return directory / "venv" / "bin"


def run(command: list[str], **options: str) -> str:
    completed = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | options, timeout=600, check=False
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def test_a_wheel_without_torch_runs_a_packed_model(
    runtime: Path, tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    pack(Pack(str(tiny_llama("llama3")), str(tmp_path / "model.goss")))
    [expected] = LLM(tmp_path / "model.goss").generate("Once upon", SamplingParams(max_tokens=12))
    clean = {"PYTHONPATH": "", "GOSSAMER_CACHE": str(tmp_path / "cache")}
    found = json.loads(run([str(runtime / "python"), "-c", PROGRAM, str(tmp_path / "model.goss")], **clean))
    assert found["ids"] == list(expected.token_ids)
    assert found["heavy"] == []
    text = run(
        [str(runtime / "gossamer"), "run", str(tmp_path / "model.goss"), "Once upon", "--max-tokens", "4"],
        **clean,
    )
    assert text.strip()


def test_the_runtime_packs_a_directory_itself(
    runtime: Path, tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    clean = {"PYTHONPATH": "", "GOSSAMER_CACHE": str(tmp_path / "cache")}
    command = [str(runtime / "gossamer"), "run", str(tiny_llama("bf16")), "Once upon", "--max-tokens", "4"]
    assert run(command, **clean) == run(command, **clean)
    assert len(list((tmp_path / "cache").glob("*.goss"))) == 1


def test_a_verb_that_needs_torch_says_what_to_install(runtime: Path, tmp_path: Path) -> None:
    completed = subprocess.run(
        [
            str(runtime / "gossamer"),
            "prune",
            "model",
            "-o",
            str(tmp_path / "out"),
            "--dataset",
            "python:stdlib",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ""},
        check=False,
    )
    assert completed.returncode == 1
    assert "pip install 'gossamer[compress]'" in completed.stderr
