"""Attention over short rows, against PyTorch's own."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.training.attention import MOST_TOKENS, SHORT_ROWS, choose_attention


def llama(attention: str, dtype: torch.dtype, num_kv_heads: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=num_kv_heads,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.set_attn_implementation(attention)
    return model.train()


def gradients(model: LlamaForCausalLM, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    assert loss is not None
    loss.backward()
    found = {
        name: weight.grad.float() for name, weight in model.named_parameters() if weight.grad is not None
    }
    return {**found, "loss": loss.detach().float()}


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("documents", [1, 3])
def test_loss_and_gradients_are_those_of_pytorchs_attention(num_kv_heads: int, documents: int) -> None:
    """In float64, of rows of one document and of several."""
    ids_BT = torch.randint(0, 64, (3, 24), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids_BT, "position_ids": (torch.arange(24) % (24 // documents)).expand(3, 24)}
    ours, theirs = (
        gradients(llama(attention, torch.float64, num_kv_heads), inputs) for attention in (SHORT_ROWS, "sdpa")
    )
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-6, atol=1e-9)


def test_in_bfloat16_it_is_as_near_to_float32_as_transformers_eager_form() -> None:
    ids_BT = torch.randint(0, 64, (4, 64), generator=torch.Generator().manual_seed(1))
    exact = gradients(llama("sdpa", torch.float32, 2), {"input_ids": ids_BT})

    def error(attention: str) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(llama(attention, torch.float32, 2), {"input_ids": ids_BT})
        return sum(float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact)

    assert error(SHORT_ROWS) < 1.1 * error("eager")


@pytest.mark.parametrize(
    ("row_length", "device", "precision", "expected"),
    [
        (MOST_TOKENS, "cpu", "bf16", SHORT_ROWS),
        (MOST_TOKENS + 1, "cpu", "bf16", "sdpa"),
        (MOST_TOKENS, "cpu", "f32", "sdpa"),
        (MOST_TOKENS, "cuda", "bf16", "sdpa"),
    ],
)
def test_it_is_for_short_rows_in_bfloat16_on_a_cpu(
    row_length: int, device: str, precision: Any, expected: str
) -> None:
    models = [llama("eager", torch.float32, 2) for _ in range(2)]
    choose_attention(row_length, device, precision, models[0], None, models[1])
    assert [model.config._attn_implementation for model in models] == [expected] * 2
