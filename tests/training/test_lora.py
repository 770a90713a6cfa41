"""Masked LoRA: the arithmetic of one linear, and whole runs, whose output is an ordinary directory."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from gossamer.checkpoint.directory import Checkpoint
from gossamer.job.report import Event
from gossamer.stages.finetune import Finetune, finetune
from gossamer.stages.pretrain import Pretrain, pretrain
from gossamer.training import trainer
from gossamer.training.lora import LowRankLinear, adapt, adapters, merge
from pruned import copy_with_zeros
from short_run import NUM_STEPS, model_and_text, short_run, weights

Llamas = Callable[[str], Path]
RANK = 4
IDS_BT = torch.arange(2, 50).view(2, 24)


def half_zero(bias: bool = True) -> LowRankLinear:
    """8 x 12, float64, half of the weights zero, with an adapter of rank 3 that has learned something."""
    torch.manual_seed(0)
    dense = nn.Linear(12, 8, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.mul_(torch.rand(8, 12) < 0.5)
    adapted = LowRankLinear(dense, 3, torch.Generator().manual_seed(1))
    adapted.lora_A = nn.Parameter(torch.randn(3, 12, dtype=torch.float64))
    adapted.lora_B = nn.Parameter(torch.randn(8, 3, dtype=torch.float64))
    return adapted


def test_it_computes_with_the_masked_sum_of_weight_and_adapter() -> None:
    """y = x (W + M o 2 B A)^T + b, and the gradients that autograd finds of that."""
    adapted = half_zero()
    w_NK, a_RK, b_NR = adapted.weight, adapted.lora_A, adapted.lora_B
    assert 0.3 < float((w_NK == 0).double().mean()) < 0.7
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    inputs = (x, a_RK, b_NR)
    expected = linear(x, w_NK + (w_NK != 0) * (2 * b_NR @ a_RK), adapted.bias)
    dy = torch.randn_like(expected)
    torch.testing.assert_close(adapted(x), expected)
    for ours, theirs in zip(
        torch.autograd.grad(adapted(x), inputs, dy),
        torch.autograd.grad(expected, inputs, dy),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_under_autocast_products_are_of_its_type_and_adapters_are_not() -> None:
    adapted = half_zero().float()
    x = torch.randn(2, 5, 12, requires_grad=True)
    exact = torch.autograd.grad(adapted(x).sum(), (x, adapted.lora_A, adapted.lora_B))
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted(x)
    found = torch.autograd.grad(y.float().sum(), (x, adapted.lora_A, adapted.lora_B))
    assert y.dtype == torch.bfloat16 and {gradient.dtype for gradient in found} == {torch.float32}
    torch.testing.assert_close(y.float(), adapted(x), rtol=2e-2, atol=1e-1)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_a_merged_model_has_the_same_logits_and_zeros(
    tiny_llama: Llamas, tmp_path: Path, density: float
) -> None:
    """To the bit, zeros and dense alike; at first an adapter changes nothing."""
    path = copy_with_zeros(tiny_llama("llama3"), tmp_path / "model", density)
    model = AutoModelForCausalLM.from_pretrained(path)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    logits = model(IDS_BT).logits
    adapt(model, RANK, seed=0)
    assert torch.equal(model(IDS_BT).logits, logits)
    with torch.no_grad():
        for part in adapters(model).values():
            part.normal_(0, 0.1)
    trained = model(IDS_BT).logits
    assert (trained - logits).abs().max() > 0.1
    merge(model)
    assert torch.equal(model(IDS_BT).logits, trained)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and not adapters(model)
    for name, weight in after.items():
        assert torch.equal(weight == 0, before[name] == 0)
        assert torch.equal(weight, before[name]) == ("_proj" not in name)


@pytest.fixture(scope="module")
def place(tiny_llama: Llamas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A half sparse model and a text."""
    place = tmp_path_factory.mktemp("lora")
    return model_and_text(place, tiny_llama("llama3"), 0.5, Path(__file__))


def twelve_steps(place: Path, output: Path, **changes: object) -> Pretrain:
    settings = {"learning_rate": 1e-2, "report_to": "none", "lora": RANK}
    return short_run(place, output, **(settings | changes))


@pytest.mark.parametrize("taught", [False, True])
def test_a_run_learns_keeps_zeros_and_leaves_the_rest_alone(
    place: Path, tiny_llama: Llamas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taught: bool
) -> None:
    """The loss falls; the directory computes what the model did that was trained; moments are of adapters."""
    trained: list[Tensor] = []

    def before_the_merge(model: Any) -> None:
        trained.append(model(IDS_BT).logits)
        merge(model)

    monkeypatch.setattr(trainer, "merge", before_the_merge)
    events: list[Event] = []
    changes = {"teacher": str(tiny_llama("llama3")), "distill": "both"} if taught else {}
    result = pretrain(job := twelve_steps(place, tmp_path / "out", **changes), events.append)
    assert result.loss_last < result.loss_first - 0.2

    said = next(event.message for event in events if event.message.startswith("kernel "))
    assert said.startswith("kernel dense: --lora 4 trains adapters of whole matrices; ")
    model = AutoModelForCausalLM.from_pretrained(job.output_dir)
    torch.testing.assert_close(model(IDS_BT).logits, trained[0], rtol=0, atol=1e-6)
    parent, child = Checkpoint.open(job.model), Checkpoint.open(job.output_dir)
    for name in parent.names:
        np.testing.assert_array_equal(child.zeros(name), parent.zeros(name))
        changed = not np.array_equal(child.raw(name), parent.raw(name))
        assert changed == (name.removesuffix(".weight") in parent.linears)
    shapes = (parent.entries[f"{name}.weight"].shape for name in parent.linears)
    num_trained = sum(RANK * (rows + columns) for rows, columns in shapes)
    manifest = json.loads((tmp_path / "out" / "gossamer.json").read_text())
    assert manifest["metrics"]["optimizer_gradient_bytes"] == 12 * num_trained
    assert manifest["job"]["lora"] == RANK


class Stop(Exception):
    """Ends a run from outside, as if the machine had failed."""


def test_killed_and_resumed_it_ends_in_the_same_bits(place: Path, tmp_path: Path) -> None:
    """A checkpoint has the adapters, and no weights of the model."""

    def progress(event: Event) -> None:
        if event.done == 7:
            raise Stop

    whole, job = (twelve_steps(place, tmp_path / name) for name in ("whole", "out"))
    pretrain(whole)
    with pytest.raises(Stop):
        pretrain(job, progress)
    folder = tmp_path / "out.partial" / "checkpoints" / "checkpoint-6"
    assert [file.name for file in folder.glob("*.safetensors")] == ["adapters.safetensors"]
    saved = load_file(folder / "adapters.safetensors")
    assert len(saved) == 2 * len(Checkpoint.open(job.model).linears) and all(map(torch.any, saved.values()))
    result = pretrain(replace(job, resume=True))
    assert weights(job) == weights(whole) and result.num_steps == NUM_STEPS


def test_finetuning_by_adapters(place: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"{a} + 1 = ", "completion": f"{a + 1}"} for a in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    job = Finetune(
        str(place / "model"),
        str(tmp_path / "out"),
        dataset=(str(tmp_path / "pairs.jsonl"),),
        batch_tokens=256,
        num_train_epochs=4,
        learning_rate=1e-2,
        distill="none",
        lora=RANK,
    )
    result = finetune(job)
    assert result.loss_last < result.loss_first - 0.2
    assert result.sparsity == Checkpoint.open(place / "model").sparsity()
