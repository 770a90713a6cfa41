"""The versions of transformers that are allowed: what is checked in each, and a run with the oldest."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from gossamer.errors import UnsupportedError
from gossamer.job.options import record
from gossamer.stages.pretrain import Pretrain, pretrain
from gossamer.training.row_trainer import RowTrainer
from gossamer.training.trainer_contract import NEWEST_TESTED, OLDEST_TESTED, SIGNATURES, check_trainer
from pruned import copy_with_zeros

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests" / "interrupted_run.py"
TORTURE = bool(os.environ.get("GOSSAMER_TORTURE"))


def job(folder: Path, name: str, **changes: Any) -> Pretrain:
    """Six steps, two of them before each checkpoint, with a teacher."""
    settings: dict[str, Any] = {
        "dataset": (str(folder / "text.txt"),),
        "teacher": str(folder / "dense"),
        "num_tokens": 6 * 256,
        "max_length": 32,
        "batch_tokens": 256,
        "learning_rate": 3e-3,
        "precision": "f32",
        "kernel": "dense",
        "save_steps": 2,
        "report_to": "none",
    }
    return Pretrain(str(folder / "sparse"), str(folder / name), **(settings | changes))


@pytest.fixture
def folder(tiny_llama: Any, tmp_path: Path) -> Path:
    """A dense model, the same with half of its decoder zero, and a text."""
    (tmp_path / "dense").symlink_to(tiny_llama("llama3"))
    copy_with_zeros(tmp_path / "dense", tmp_path / "sparse", 0.5)
    (tmp_path / "text.txt").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


def test_the_installed_trainer_is_as_expected() -> None:
    check_trainer()


def test_every_method_that_is_overridden_or_wrapped_is_checked() -> None:
    overridden = {name for name in vars(RowTrainer) if name in dir(Trainer) and not name.startswith("__")}
    wrapped = {"compute_loss", "get_batch_samples"}  # by SquareHead.attach
    assert overridden | wrapped == set(SIGNATURES)


@pytest.mark.parametrize("name", ["_get_grad_norm", "_save_checkpoint", "get_batch_samples"])
def test_a_trainer_without_the_method_is_refused(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step, with the method, what was found, the installed version and those that work."""
    monkeypatch.delattr(Trainer, name)
    expected = (
        rf"Trainer\.{name}: found no such method, expected \(self, .*{OLDEST_TESTED} to {NEWEST_TESTED}"
    )
    with pytest.raises(UnsupportedError, match=rf"transformers \d+\.\d+.*{expected}"):
        pretrain(job(folder, "out"))
    assert not (folder / "out").exists() and not (folder / "out.partial").exists()


def test_a_trainer_whose_method_has_another_signature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def saves_elsewhere(self: Trainer, output_dir: str, executor: object = None) -> None: ...

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", saves_elsewhere)
    found = r"found \(self, output_dir, executor=None\), expected \(self, output_dir\)"
    with pytest.raises(UnsupportedError, match=rf"Trainer\._save_optimizer_and_scheduler: {found}"):
        check_trainer()


def test_the_tested_versions_are_the_allowed_and_the_pinned_one() -> None:
    allowed = re.search(r'"transformers>=([\d.]+),<6"', (ROOT / "pyproject.toml").read_text())
    pinned = re.search(r"^transformers==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert allowed is not None and OLDEST_TESTED.startswith(allowed[1] + ".")
    assert pinned is not None and pinned[1] == NEWEST_TESTED


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds the oldest transformers before the installed one."""
    target = tmp_path_factory.mktemp("oldest")
    options = ["--quiet", "--no-deps", "--no-compile", "--retries", "0", "--target", str(target)]
    command = [sys.executable, "-m", "pip", "install", *options, f"transformers=={OLDEST_TESTED}"]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        pytest.skip(f"pip cannot get transformers {OLDEST_TESTED}: {ran.stderr.strip()[-200:]}")
    return os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize(
    "parallel",
    ["ddp", pytest.param("fsdp", marks=pytest.mark.skipif(not TORTURE, reason="GOSSAMER_TORTURE=1 runs it"))],
)
def test_the_oldest_version_trains_and_resumes_as_the_newest(
    folder: Path, oldest: dict[str, str], parallel: Any
) -> None:
    """One process without FSDP, two with it; stopped after the fourth step, the run ends in the same bits."""
    newest = pretrain(job(folder, "newest"))
    (folder / "job.json").write_text(json.dumps(record(job(folder, "out", parallel=parallel))))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    start = [sys.executable, *(torchrun if parallel == "fsdp" else [])]
    ran = subprocess.run([*start, str(WORKER), str(folder)], env=oldest, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = json.loads((folder / "found.json").read_text())
    assert found["version"] == OLDEST_TESTED
    # Two processes add the gradients in another order than one, which AdamW passes on.
    assert found["losses"] == pytest.approx(newest.losses, rel=1e-4 if parallel == "fsdp" else 1e-5)
    files = [folder / name / "model.safetensors" for name in ("whole", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    before, after = load_file(folder / "sparse" / "model.safetensors"), load_file(files[1])
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before if "_proj" in name)
