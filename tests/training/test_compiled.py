"""What torch compiles for a GPU, compiled for the CPU here: the same losses, and models come back whole."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from gossamer.checkpoint.directory import Checkpoint, Derived
from gossamer.job.options import record
from gossamer.job.report import quiet
from gossamer.stages.pretrain import Pretrain
from gossamer.training import compiled, head_loss, masks
from gossamer.training.rows import packed_rows
from gossamer.training.teacher import Teacher
from gossamer.training.trainer import train

JOB = Pretrain(
    "model", "out", dataset=("text",), batch_tokens=96, learning_rate=1e-3, precision="f32", kernel="dense"
)


def test_a_compiled_run_learns_what_an_eager_one_does(
    tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Checkpoint.open(tiny_llama("llama3"))
    chance = torch.Generator().manual_seed(0)
    made = [torch.randint(2, 320, (9,), generator=chance).tolist() for _ in range(24)]
    rows = packed_rows([(ids, ids) for ids in made], 24, 1, seed=0)
    job = replace(JOB, distill="both", distill_temperature=2.0)
    graphs: list[str] = []
    compile_ = torch.compile

    def counted(function: Any) -> Any:
        graphs.append(function.__qualname__)
        return compile_(function)

    def run() -> tuple[Any, LlamaForCausalLM]:
        model = LlamaForCausalLM.from_pretrained(source.path)
        target = Derived(source, tmp_path / "out", tmp_path, record(JOB), "test")
        teacher = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "_proj" in name:
                    parameter.mul_((parameter.abs() > parameter.abs().median()) * 0.7)
        return train(job, model, rows, target, quiet, Teacher(teacher, "hash")), model

    eager, expected = run()
    monkeypatch.setattr(compiled, "compiles", lambda device: True)
    monkeypatch.setattr(head_loss, "_fits", lambda logits: False)
    monkeypatch.setattr(masks, "fits", lambda tensor: False)
    monkeypatch.setattr(torch, "compile", counted)
    compiled._compiled.cache_clear()
    history, model = run()
    assert {"_divergence", "_cross_entropy", "squarehead_loss", "_count_marked"} <= set(graphs)
    assert len(graphs) == 4 + 2 * source.architecture.num_layers
    assert history.losses == pytest.approx(eager.losses, rel=1e-4) and len(history.losses) > 2
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, dict(expected.named_parameters())[name], rtol=1e-3, atol=1e-4)
    assert all("forward" not in vars(module) for module in model.modules())
    copy.deepcopy(model)


def test_a_cpu_compiles_nothing() -> None:
    assert not compiled.compiles("cpu")
    assert compiled.fused(head_loss._divergence, "cpu") is head_loss._divergence
