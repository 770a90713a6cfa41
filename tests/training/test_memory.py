"""What training needs of memory: the estimate against what autograd keeps, and what comes of too little."""

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gossamer.errors import ConfigError
from gossamer.training import memory
from gossamer.training.adamw import AdamW
from gossamer.training.attention import SHORT_ROWS
from gossamer.training.kernel_choice import masked_linears
from gossamer.training.lora import adapt, adapters
from gossamer.training.memory import (
    MemoryEstimate,
    check_memory,
    estimate_elsewhere,
    estimate_memory,
    largest_fitting,
    optimizer_gradient_bytes,
)
from gossamer.training.sparse_linear import sparsify

GB = 10**9


def llama(kernel: Any = "dense", attention: str = "sdpa", **shape: int) -> LlamaForCausalLM:
    """12 layers x 768, FFN 2048, vocabulary 8192, pruned to 70%, all an eighth as large."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 1024,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **shape}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight[torch.rand(weight.shape) < 0.7] = 0
    if kernel == "sparse":
        sparsify(model, masked_linears(model))
    if kernel == "lora":
        adapt(model, 8, seed=0)
    model.set_attn_implementation(attention)
    return model.train()


def kept_bytes(
    model: PreTrainedModel, num_rows: int, row_length: int, precision: str, **inputs: Tensor
) -> int:
    """Memory that autograd keeps of one forward pass through the layers, weights aside."""
    given: dict[str, Any] = inputs or {"logits_to_keep": 1, "use_cache": False}
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids_BT = torch.randint(0, 1024, (num_rows, row_length))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        hidden = model(ids_BT, output_hidden_states=True, **given)
    assert hidden is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


PEAKS_AT_THE_HEAD = """
import torch
from gossamer.training.head_loss import TeacherLogits, TopTokens, head_loss
N, V, D = 640, 16384, 96

def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

hidden, w = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
targets = torch.zeros(N).long()
top = TopTokens(torch.arange(8).repeat(N, 1), torch.full((N, 8), -3.0), 2.0)
live = TeacherLogits(lambda begin, end: (hidden[begin:end] @ w.T).detach().float(), 2.0)
for rounds in (False, True):
    for teacher in (None, top, live):
        with torch.autocast("cpu", torch.bfloat16, enabled=rounds):
            head_loss(hidden, w, targets, teacher)  # what a process needs once, such as code for its shapes
            open("/proc/self/clear_refs", "w").write("5")
            before = kilobytes("VmRSS")
            head_loss(hidden, w, targets, teacher)
        print((kilobytes("VmHWM") - before) * 1024 - (2 * V * D if rounds else 0))
"""
ATTENTIONS = [("f32", "sdpa"), ("bf16", "sdpa"), ("bf16", SHORT_ROWS)]


@pytest.mark.parametrize(("precision", "attention"), ATTENTIONS)
@pytest.mark.parametrize("kernel", ["dense", "sparse", "lora"])
@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 3}, {"intermediate_size": 768}], ids=str)
def test_activations_are_what_autograd_keeps(
    precision: str, attention: str, kernel: str, shape: dict[str, int]
) -> None:
    """Within a fifth, for both kernels and adapters, both precisions and attentions.

    What a weight with its adapter takes is not kept: it is made in passing, twice.
    """
    model = llama(kernel, attention, **{"num_hidden_layers": 2, "hidden_size": 192, **shape})
    estimate = estimate_memory(model, 4, 128, precision)
    in_passing = 12 * 192 * shape.get("intermediate_size", 256) if kernel == "lora" else 0
    kept = kept_bytes(model, 4, 128, precision)
    assert estimate.activations - in_passing == pytest.approx(kept, rel=0.2)


@pytest.mark.parametrize(("precision", "attention"), ATTENTIONS)
@pytest.mark.parametrize(
    ("family", "head_dim"),
    [
        ((LlamaConfig, LlamaForCausalLM), 32),
        ((Qwen3Config, Qwen3ForCausalLM), 32),
    ],
    ids=["llama", "qwen3"],
)
def test_activations_of_other_decoders(family: Any, head_dim: int, attention: str, precision: str) -> None:
    """Within a fifth too: heads whose width is not hidden / heads, norms of queries and keys."""
    config = family[0](
        vocab_size=1024,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=12,
        num_key_value_heads=3,
        head_dim=head_dim,
    )
    model = family[1](config).train()
    model.set_attn_implementation(attention)
    estimate = estimate_memory(model, 4, 128, precision)
    assert estimate.activations == pytest.approx(kept_bytes(model, 4, 128, precision), rel=0.2)


@pytest.mark.parametrize(("precision", "attention"), ATTENTIONS)
@pytest.mark.parametrize("shape", [{}, {"intermediate_size": 384}, {"hidden_size": 96}], ids=str)
def test_activations_of_encoders(attention: str, precision: str, shape: dict[str, int]) -> None:
    """Within a fifth too, where texts share a row; what tokens are embedded by is left out."""
    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6} | shape
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # as runs are
    config = BertConfig(vocab_size=1024, num_attention_heads=12, **sizes, **without)  # pyright: ignore
    model = BertModel(config).train()
    model.set_attn_implementation(attention)
    seen = torch.arange(128) // 32
    mask = (seen[:, None] == seen).expand(4, 1, 128, 128)
    estimate = estimate_memory(model, 4, 128, precision)
    kept = kept_bytes(model, 4, 128, precision, attention_mask=mask)
    assert estimate.activations == pytest.approx(kept, rel=0.2)
    assert estimate.logits == 0


def step(model: LlamaForCausalLM) -> int:
    """One step of training; bytes of gradients and moments after it."""
    optimizer = AdamW([weight for weight in model.parameters() if weight.requires_grad])
    ids_BT = torch.randint(0, 1024, (2, 16))
    model(ids_BT, labels=ids_BT).loss.backward()
    optimizer.step()
    return optimizer_gradient_bytes(model, optimizer)


def test_gradients_and_moments_at_70_percent() -> None:
    """At most 0.45 of the dense ones, embeddings and head included; both as estimated."""
    found = {}
    for kernel in ("dense", "sparse"):
        model = llama(kernel)
        estimate = estimate_memory(model, 1, 16, "f32")
        found[kernel] = step(model)
        assert found[kernel] == estimate.gradients + estimate.moments
    assert found["sparse"] <= 0.45 * found["dense"]


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_adapters_need_less(precision: str) -> None:
    """Gradients and moments of the adapters alone, as estimated, and less of everything that is estimated."""
    dense, adapted = llama(), llama("lora")
    before, after = (estimate_memory(model, 4, 128, precision) for model in (dense, adapted))
    held = step(adapted)
    assert held == 12 * sum(part.numel() for part in adapters(adapted).values())
    assert held == after.gradients + after.moments < 0.2 * (before.gradients + before.moments)
    assert after.activations < before.activations and after.logits < before.logits


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_layers_that_are_computed_again_keep_what_goes_in(precision: str) -> None:
    """The estimate, against what autograd keeps of the layers' inputs and of one layer."""
    whole, recomputed = (estimate_memory(llama(), 4, 128, precision, recompute=r) for r in (False, True))
    one, two = (kept_bytes(llama(num_hidden_layers=n), 4, 128, precision) for n in (1, 2))
    inputs = 4 * 4 * 128 * 96 * 12
    copies = 0 if precision == "f32" else 12 * 2 * (4 * 96**2 + 3 * 96 * 256)
    assert recomputed.activations == pytest.approx(inputs + (two - one) + copies, rel=0.2)
    assert recomputed.activations < whole.activations / 3


def test_where_products_are_not_native_sparse_weights_are_written_out() -> None:
    model = llama("sparse")
    here = estimate_memory(model, 1, 16, "bf16")
    there = estimate_memory(model, 1, 16, "bf16", device="cuda")
    assert there.activations - here.activations == 2 * 12 * (4 * 96 * 96 + 3 * 96 * 256)


def test_a_save_that_takes_more_than_a_step_counts() -> None:
    """The dense weights of sparse layers, where they exceed a step's gradients and activations."""
    model = llama("sparse", num_key_value_heads=3)
    model.requires_grad_(False)
    small, large = (estimate_memory(model, 1, length, "f32") for length in (1, 512))
    dense = 12 * 4 * (2 * 96 * 96 + 2 * 96 * 24 + 3 * 96 * 256)
    assert small.saving == dense - small.micro_batch - small.logits > 0
    assert large.saving == 0 and large.micro_batch > dense
    assert estimate_memory(llama(), 1, 1, "f32").saving == 0


def test_frozen_weights_need_neither() -> None:
    model = llama()
    before = estimate_memory(model, 1, 16, "f32")
    model.model.embed_tokens.requires_grad_(False)
    after = estimate_memory(model, 1, 16, "f32")
    assert before.gradients + before.moments - after.gradients - after.moments == 12 * 1024 * 96


def test_logits_take_least_where_native_code_has_their_losses() -> None:
    """On the CPU, but for a teacher in memory; a product of bfloat16 is of more tokens."""
    model, gradient = llama(), 1024 * 96
    found = {
        (precision, device, has_teacher): estimate_memory(
            model, 32, 128, precision, device=device, teacher=model if has_teacher else None
        ).logits
        - (6 if precision == "bf16" else 4) * gradient
        for precision in ("f32", "bf16")
        for device in ("cpu", "cuda")
        for has_teacher in (False, True)
    }
    assert {key: num_bytes // (1024 * 256) for key, num_bytes in found.items()} == {
        ("f32", "cpu", False): 4,
        ("f32", "cpu", True): 24,
        ("f32", "cuda", False): 8 * 24,
        ("f32", "cuda", True): 8 * 48,
        ("bf16", "cpu", False): 8 * 2,
        ("bf16", "cpu", True): 8 * 2 + 24,
        ("bf16", "cuda", False): 8 * 2 + 8 * 24,
        ("bf16", "cuda", True): 8 * 2 + 8 * 48,
    }


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory from /proc")
def test_the_head_takes_what_is_estimated() -> None:
    """At most 10% more, at the peaks of a process of its own whose freed memory goes back at once.

    The copy of the head's weights that bfloat16 needs is estimated elsewhere.
    """
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAKS_AT_THE_HEAD]
    ran = subprocess.run(command, env=os.environ | at_once, capture_output=True, text=True, check=True)
    model = llama(vocab_size=16384, num_hidden_layers=1)
    cases = [(precision, teacher) for precision in ("f32", "bf16") for teacher in (None, None, model)]
    for taken, (precision, teacher) in zip(map(int, ran.stdout.split()), cases, strict=True):
        expected = estimate_memory(model, 5, 128, precision, teacher=teacher).logits
        assert 0.6 * expected < taken < 1.1 * expected, (precision, teacher is not None)


def test_a_gpu_must_hold_weights_and_teacher_too() -> None:
    model, teacher = llama(), llama()
    nn.Module.to(teacher, torch.bfloat16)
    weights = sum(weight.numel() for weight in model.parameters())
    here = estimate_memory(model, 1, 16, "bf16", teacher=teacher)
    there = estimate_memory(model, 1, 16, "bf16", device="cuda", teacher=teacher)
    assert there.total - there.logits - (here.total - here.logits) == there.weights == 6 * weights
    apart = estimate_memory(model, 1, 16, "bf16", device="cuda", teacher=teacher, teacher_elsewhere=True)
    assert apart.weights == 4 * weights and apart.teacher == there.teacher
    second, machine = (estimate_elsewhere(teacher, 1, 16, device) for device in ("cuda:1", "cpu"))
    assert (second.weights, machine.weights) == (2 * weights, 0)
    assert second.teacher == machine.teacher == 4 * 16 * 12 * 96
    assert second.gradients == second.moments == second.activations == 0
    assert here.teacher == 8 * 16 * 12 * 96


ESTIMATE = MemoryEstimate(weights=0, gradients=GB, moments=2 * GB, activations=3 * GB, logits=GB, teacher=0)


def test_too_little_memory_is_an_error_with_numbers_and_advice() -> None:
    check_memory(ESTIMATE, 7 * GB, 2048, ["buy more"])
    with pytest.raises(ConfigError) as raised:
        check_memory(ESTIMATE, 5 * GB, 2048, ["--kernel sparse", "--activation-checkpointing"])
    for part in (
        "about 7.0 GB",
        "(gradients 1.0 GB, moments 2.0 GB, activations 3.0 GB, logits 1.0 GB) for 2,048 tokens at a time",
        "found 5.0 GB",
        "available: --kernel sparse; --activation-checkpointing; free memory, or train a smaller model",
    ):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("available", "expected"),
    [(None, 12), (15 * GB, 12), (15 * GB - 1, 6), (10 * GB, 6), (10 * GB - 2, 4), (4 * GB, 1), (GB, 1)],
)
def test_the_largest_micro_batch_that_fits(available: int | None, expected: int) -> None:
    """A gigabyte a row beside 3 others; a smaller one than is usual leaves a tenth free, but for one row."""

    def estimate(num_rows: int) -> MemoryEstimate:
        return replace(ESTIMATE, activations=(num_rows - 1) * GB)

    assert largest_fitting([12, 6, 4, 1], estimate, available) == expected


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: 9 * GB)
    assert memory.available_bytes("cpu") == 9 * GB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.available_bytes("cpu") == 9 * GB // 2
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: None)
    assert memory.available_bytes("cpu") is None
