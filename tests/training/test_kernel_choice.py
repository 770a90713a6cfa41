"""`--kernel auto|dense|sparse`: what is taken, why, and what cannot run."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.errors import ConfigError, UnsupportedError
from gossamer.training import kernel_choice
from gossamer.training.kernel_choice import choose_kernel, masked_linears
from gossamer.training.sparse_linear import SparseLinear, densify, sparsify


def llama(sparsity: float, width: int = 32) -> LlamaForCausalLM:
    """Two layers whose linears are pruned; the head and the embeddings have a zero too."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 0
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight[torch.rand(weight.shape) < sparsity] = 0
    return model


def test_what_was_asked_for_is_taken() -> None:
    for wanted in ("dense", "sparse"):
        choice = choose_kernel(wanted, llama(0.5), "cpu", "f32", 16)
        assert choice.metrics() == {"kernel": wanted, "kernel_ratio": None}


def test_auto_is_dense_where_sparse_cannot_gain() -> None:
    for model, device, sharded, reason in [
        (llama(0.0), "cpu", False, "no zeros"),
        (llama(0.5), "cuda", False, "GPU"),
        (llama(0.5), "cpu", True, "FSDP"),
    ]:
        choice = choose_kernel("auto", model, device, "f32", 16, sharded=sharded)
        assert choice.kernel == "dense" and choice.ratio is None and reason in choice.reason


def test_sparse_where_it_cannot_run_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no zeros .* `gossamer prune"):
        choose_kernel("sparse", llama(0.0), "cpu", "f32", 16)
    with pytest.raises(UnsupportedError, match="FSDP; expected one process or --parallel ddp"):
        choose_kernel("sparse", llama(0.5), "cpu", "f32", 16, sharded=True)


@pytest.mark.parametrize(("dense_s", "sparse_s", "taken"), [(0.3, 0.1, "sparse"), (0.1, 0.3, "dense")])
def test_auto_takes_what_is_faster_and_says_by_how_much(
    dense_s: float, sparse_s: float, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[int, ...]] = []

    def seconds(layer: nn.Linear, precision: str, num_tokens: int) -> tuple[float, float]:
        assert (precision, num_tokens) == ("bf16", 2048)
        measured.append(tuple(layer.weight.shape))
        return dense_s, sparse_s

    monkeypatch.setattr(kernel_choice, "_seconds", seconds)
    choice = choose_kernel("auto", llama(0.7), "cpu", "bf16", 2048)
    assert sorted(measured) == [(16, 32), (32, 32), (32, 64), (64, 32)]  # k v | q o | down | gate up
    assert choice.kernel == taken and choice.ratio == pytest.approx(dense_s / sparse_s)
    assert "3.00 times as fast" in choice.reason and "70% sparsity, 2,048 tokens" in choice.reason


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_measuring_finds_the_gain_and_leaves_the_model_alone(precision: Any) -> None:
    """In float32 there is no doubt at 99%, in bfloat16 with AMX there is.

    Neither gradients nor random numbers are touched.
    """
    model = llama(0.99, width=512)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    random = torch.get_rng_state()
    choice = choose_kernel("auto", model, "cpu", precision, 512)
    assert choice.ratio is not None and (choice.kernel == "sparse") == (choice.ratio > 1)
    assert precision == "bf16" or choice.ratio > 1.5
    assert torch.equal(torch.get_rng_state(), random)
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_applied_to_the_decoders_linears_and_undone() -> None:
    model = llama(0.5)
    random = torch.get_rng_state()
    sparsify(model, masked_linears(model))
    sparse = [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]
    assert len(sparse) == 14 and all("_proj" in name for name in sparse)
    densify(model)
    assert isinstance(model.model.layers[1].mlp.down_proj, nn.Linear)
    assert torch.equal(torch.get_rng_state(), random)
