"""Training on "cuda", which the tests make up: no tensor is left on the CPU, and it learns the same."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import another_device
from gossamer.stages.finetune import Finetune, finetune
from gossamer.stages.pretrain import Pretrain, pretrain
from gossamer.stages.prune import Prune, prune


@pytest.fixture(scope="module")
def sparse(
    tiny_llama: Callable[[str], Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    place = tmp_path_factory.mktemp("sparse") / "model"
    options: dict[str, Any] = {"num_calibration_samples": 8, "max_seq_length": 48, "method": "magnitude"}
    prune(Prune(str(tiny_llama("llama2")), str(place), dataset=(str(text_file),), **options))
    return place


def weights(path: str) -> dict[str, torch.Tensor]:
    return load_file(Path(path) / "model.safetensors")


@pytest.mark.parametrize(
    "kind", ["pretrain", "squarehead", "both", "teacher on the CPU", "checkpointing", "schedule"]
)
def test_what_is_learned_is_what_a_cpu_learns(
    kind: str, sparse: Path, tiny_llama: Callable[[str], Path], text_file: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    stage: Any
    options: dict[str, Any] = {"num_tokens": 1024, "max_length": 64, "batch_tokens": 256, "precision": "f32"}
    options |= {"kernel": "dense", "threads": 1, "dataset": (str(text_file),)}
    if kind in ("squarehead", "both", "teacher on the CPU"):
        rows = [{"prompt": f"{n} and one", "completion": f" {n + 1}"} for n in range(64)]
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        options |= {"dataset": (str(data),), "teacher": str(tiny_llama("llama2"))}
        options |= {"distill": kind if kind == "both" else "squarehead", "num_train_epochs": 1}
        del options["num_tokens"]
        stage, here = finetune, Finetune(str(sparse), str(tmp_path / "here"), **options)
    else:
        options |= {"activation_checkpointing": kind == "checkpointing"}
        options |= {"prune_schedule": "cubic:0.7"} if kind == "schedule" else {}
        stage, here = pretrain, Pretrain(str(sparse), str(tmp_path / "here"), **options)
    there = replace(here, output_dir=str(tmp_path / "there"))
    if kind == "teacher on the CPU":
        there = replace(there, teacher_device="cpu")
    with sdpa_kernel(SDPBackend.MATH):
        expected = stage(here)
    with another_device.another_device(), another_device.most_bytes() as most:
        found = stage(there)
    assert most() > 100_000
    assert found.losses == pytest.approx(expected.losses, rel=1e-5) and found.sparsity == expected.sparsity
    ours, theirs = weights(there.output_dir), weights(here.output_dir)
    for name, weight in ours.items():
        assert torch.equal(weight == 0, theirs[name] == 0)
        torch.testing.assert_close(weight, theirs[name], atol=1e-5, rtol=1e-4)
