"""The loss at the head, in pieces, against torch's own losses over all logits."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from gossamer.training import head_loss as module
from gossamer.training.head_loss import TeacherLogits, TopTokens, head_loss

N, D, V = 37, 16, 50


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", {"cpu": 10})
    monkeypatch.setattr(module, "PRODUCT_TOKENS", 20)


def made_up() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, W, targets, and a teacher's logits."""
    torch.manual_seed(0)
    hidden_ND, w_VD = torch.randn(N, D), torch.randn(V, D)
    return hidden_ND.requires_grad_(), w_VD.requires_grad_(), torch.randint(V, (N,)), torch.randn(N, V) * 2


def written_out(
    hidden_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    z_NV: Tensor | None,
    t: float,
    weight: float = 1.0,
) -> Tensor:
    logits_NV = hidden_ND @ w_VD.T
    total = weight * cross_entropy(logits_NV, targets_N, reduction="sum")
    if z_NV is None:
        return total
    log_q_NV, log_p_NV = ((x.to(logits_NV) / t).log_softmax(-1) for x in (logits_NV, z_NV))
    return total + t**2 * kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [None, 1.0, 2.0])
def test_equals_torchs_losses_and_their_gradients(temperature: float | None, weight: float) -> None:
    hidden_ND, w_VD, targets_N, z_NV = made_up()
    teacher = None
    if temperature is not None:
        teacher = TeacherLogits(lambda begin, end: z_NV[begin:end], temperature)
    found, found_cross_entropy = head_loss(hidden_ND, w_VD, targets_N, teacher, weight)
    (found * 0.5).backward()
    gradients: list[Any] = [hidden_ND.grad, w_VD.grad]
    wide = [x.detach().double().requires_grad_() for x in (hidden_ND, w_VD)]
    expected = written_out(*wide, targets_N, None if teacher is None else z_NV, temperature or 1.0, weight)
    (expected * 0.5).backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    alone = written_out(*wide, targets_N, None, 1.0)
    torch.testing.assert_close(found_cross_entropy.double(), alone, rtol=1e-5, atol=0)
    assert not found_cross_entropy.requires_grad
    for gradient, tensor in zip(gradients, wide, strict=True):
        torch.testing.assert_close(gradient.double(), tensor.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_top_tokens_alone_and_the_others_as_one(temperature: float) -> None:
    """Against autograd of the sum written out; with all tokens among the top it is the whole divergence."""
    hidden_ND, w_VD, targets_N, z_NV = made_up()
    log_p_NV = (z_NV / temperature).log_softmax(-1)
    log_p_NK, ids_NK = log_p_NV.topk(7)
    total, alone = head_loss(hidden_ND, w_VD, targets_N, TopTokens(ids_NK, log_p_NK, temperature))
    total.backward()
    wide = [x.detach().double().requires_grad_() for x in (hidden_ND, w_VD)]
    logits_NV = wide[0] @ wide[1].T
    log_q_NV = (logits_NV / temperature).log_softmax(-1)
    p_NK, q_NK = log_p_NK.exp().double(), log_q_NV.exp().gather(1, ids_NK)
    p_rest_N, q_rest_N = 1 - p_NK.sum(1), 1 - q_NK.sum(1)
    expected = (p_NK * (p_NK.log() - q_NK.log())).sum() + (p_rest_N * (p_rest_N / q_rest_N).log()).sum()
    (expected * temperature**2 + cross_entropy(logits_NV, targets_N, reduction="sum")).backward()
    assert (total - alone).item() == pytest.approx(expected.item() * temperature**2, rel=1e-4)
    for tensor, exact in zip((hidden_ND, w_VD), wide, strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    order_NV = log_p_NV.argsort(-1)
    every = TopTokens(order_NV, log_p_NV.gather(1, order_NV), temperature)
    whole = TeacherLogits(lambda begin, end: z_NV[begin:end], temperature)
    logits_NV = (hidden_ND @ w_VD.T).detach()
    torch.testing.assert_close(
        every.divergence(logits_NV, 0), whole.divergence(logits_NV, 0), rtol=1e-4, atol=1e-5
    )


def test_a_frozen_head_and_no_tokens() -> None:
    hidden_ND, w_VD, targets_N, _ = made_up()
    head_loss(hidden_ND, w_VD.detach(), targets_N)[0].backward()
    assert hidden_ND.grad is not None and hidden_ND.grad.abs().sum() > 0
    total, _ = head_loss(hidden_ND[:0], w_VD, targets_N[:0])
    total.backward()
    assert total.item() == 0 and w_VD.grad is not None and not w_VD.grad.any()


def test_under_autocast_products_are_bfloat16_and_gradients_float32() -> None:
    hidden_ND, w_VD, targets_N, _ = made_up()
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = head_loss(hidden_ND, w_VD, targets_N)
    found.backward()
    exact = written_out(hidden_ND.detach(), w_VD.detach(), targets_N, None, 1.0)
    assert found.dtype == torch.float32 and 0 < abs(found.item() / exact.item() - 1) < 0.01
    assert w_VD.grad is not None and w_VD.grad.dtype == torch.float32


def test_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    """What autograd keeps is the two gradients, and no logits."""
    hidden_ND, w_VD, targets_N, _ = made_up()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        head_loss(hidden_ND, w_VD, targets_N)
    assert sorted(kept) == sorted([N * D, V * D])
