"""The loss at a language model's head: logits, one for each token of the vocabulary, some tokens at a time.

For tokens n with last hidden states h_n and the head's weights W:

    cross-entropy   sum over n of  -log softmax(W h_n)[target_n]
    divergence      sum over n of  t^2 KL(softmax(z_n / t) || softmax(W h_n / t)),   z_n the teacher's logits

(t: a temperature; t^2 keeps the gradient's size, as in Hinton et al., arXiv 1503.02531; the loss has a weight
for cross-entropy). Both are computed
from the same logits, and their gradients at once, in the forward pass: so no logits [N, V] are ever held, and
none is computed twice. That a loss and its gradient can be had together, a piece at a time, is known from
fused kernels such as Liger's (Hsu et al., arXiv 2410.10989).

On a CPU, native code (native/training/head_loss.hpp) makes the gradient of a product where that lies, one row
after another. Torch does the rest: other devices and types, and a teacher whose logits are all there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gossamer import _native
from gossamer.training.compiled import fused

CHUNK_TOKENS = {"cpu": 256, "cuda": 2048}  # more where a product's start costs more than memory
PRODUCT_TOKENS = 2048  # whose gradients are multiplied at once, where the sum is of another type
SMALLEST = 1e-9


class HeadTeacher(Protocol):
    """What is to be learned at the head."""

    def divergence(self, logits_NV: Tensor, begin: int) -> tuple[Tensor, Tensor]:
        """Of tokens from `begin` on: how far their logits are from it, and the logits' gradient [N, V]."""
        ...


@dataclass(frozen=True)
class TeacherLogits:
    """Logits to learn from: `logits(begin, end)` are [end - begin, V] of those tokens, in any type."""

    logits: Callable[[int, int], Tensor]
    temperature: float = 1.0

    def divergence(self, logits_NV: Tensor, begin: int) -> tuple[Tensor, Tensor]:
        divergence = fused(_divergence, logits_NV.device.type)
        return divergence(self.logits(begin, begin + len(logits_NV)), logits_NV, self.temperature)


def _divergence(theirs_NV: Tensor, ours_NV: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """t^2 KL, and its gradient: d/dz of t^2 KL is t (q - p)."""
    log_p_NV = theirs_NV.float() / t
    del theirs_NV  # before more is made of it
    log_p_NV = log_p_NV.log_softmax(-1)
    log_q_NV = (ours_NV / t).log_softmax(-1)
    p_NV = log_p_NV.exp()
    return t**2 * (p_NV * (log_p_NV - log_q_NV)).sum(), log_q_NV.exp_().sub_(p_NV).mul_(t)


@dataclass(frozen=True)
class TopTokens:
    """The K likeliest tokens of each, ids_NK, with log_p_NK; all the others count as one.

    log p is of logits divided by the temperature. The divergence of these K + 1 is at most that of all.
    """

    ids_NK: Tensor
    log_p_NK: Tensor
    temperature: float = 1.0

    def divergence(self, logits_NV: Tensor, begin: int) -> tuple[Tensor, Tensor]:
        """d/dz of t^2 KL is t (q - p), where the p of a token among the others is its share of theirs."""
        t, end = self.temperature, begin + len(logits_NV)
        ids_NK, log_p_NK = self.ids_NK[begin:end], self.log_p_NK[begin:end].float()
        p_NK, log_q_NV = log_p_NK.exp(), (logits_NV / t).log_softmax(-1)
        log_q_NK = log_q_NV.gather(1, ids_NK)
        others_NV = log_q_NV.exp_().scatter_(1, ids_NK, 0.0)
        p_rest_N1 = (1 - p_NK.sum(1, keepdim=True)).clamp_min(SMALLEST)
        q_rest_N1 = others_NV.sum(1, keepdim=True).clamp_min(SMALLEST)
        found = (p_NK * (log_p_NK - log_q_NK)).sum() + (p_rest_N1 * (p_rest_N1 / q_rest_N1).log()).sum()
        d_NV = others_NV.mul_(1 - p_rest_N1 / q_rest_N1).scatter_(1, ids_NK, log_q_NK.exp_() - p_NK)
        return t**2 * found, d_NV.mul_(t)


def head_loss(
    hidden_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    teacher: HeadTeacher | None = None,
    weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`weight` x cross-entropy + divergence over all tokens, with gradients; and cross-entropy alone.

    Under autocast products are of autocast's type; all else is float32.
    """
    device = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
    with torch.autocast(device, enabled=False):
        total, cross_entropy = _HeadLoss.apply(hidden_ND, w_VD, targets_N, teacher, weight, dtype)  # pyright: ignore[reportGeneralTypeIssues]
    return total, cross_entropy


class _HeadLoss(torch.autograd.Function):
    """The sums, and in the forward pass already their gradients, which the backward pass only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        w_VD: Tensor,
        targets_N: Tensor,
        teacher: HeadTeacher | None,
        weight: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weights = ctx.needs_input_grad[:2]
        x_ND, w_of_type_VD = hidden_ND.detach().to(dtype), w_VD.detach().to(dtype)
        total, cross_entropy = hidden_ND.new_zeros(2, dtype=torch.float32).unbind()
        dx_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        dw_VD: Tensor | None = None
        chunk = CHUNK_TOKENS[hidden_ND.device.type]
        group = chunk if dtype == w_VD.dtype else PRODUCT_TOKENS
        for start in range(0, len(x_ND), group):
            x_GD = x_ND[start : start + group]
            product_GV = x_GD @ w_of_type_VD.T
            targets_G = targets_N[start : start + group]
            found, both = _into_gradient(product_GV, targets_G, teacher, weight, start)
            cross_entropy, total = cross_entropy + found, total + both
            if dx_ND is not None:
                dx_ND[start : start + group] = product_GV @ w_of_type_VD
            if wants_weights:
                dw_VD = _plus_product(dw_VD, product_GV.T, x_GD, w_VD.dtype)
            del product_GV  # before the next one is made
        if wants_weights and dw_VD is None:
            dw_VD = torch.zeros_like(w_VD)  # there is no token
        ctx.save_for_backward(dx_ND, dw_VD)
        ctx.mark_non_differentiable(cross_entropy)
        return total, cross_entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, d_total: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        dx_ND, dw_VD = (None if saved is None else saved * d_total for saved in ctx.saved_tensors)
        return dx_ND, dw_VD, None, None, None, None


def _plus_product(sum_VD: Tensor | None, a_VN: Tensor, b_ND: Tensor, dtype: torch.dtype) -> Tensor:
    """sum + a b of `dtype`, in the place of the sum where there is one."""
    if sum_VD is None:
        return (a_VN @ b_ND).to(dtype)
    return sum_VD.addmm_(a_VN, b_ND) if a_VN.dtype == dtype else sum_VD.add_(a_VN @ b_ND)


def _into_gradient(
    product_GV: Tensor, targets_G: Tensor, teacher: HeadTeacher | None, weight: float, start: int
) -> tuple[Tensor | float, Tensor | float]:
    """Of tokens from `start` on: cross-entropy and the whole loss; their logits become their gradient."""
    if (teacher is None or isinstance(teacher, TopTokens)) and _fits(product_GV):
        return _native_losses(product_GV, targets_G, teacher, weight, start)
    cross_entropy, total = product_GV.new_zeros(2, dtype=torch.float32).unbind()
    chunk = CHUNK_TOKENS[product_GV.device.type]
    for begin in range(0, len(product_GV), chunk):
        logits_NV = product_GV[begin : begin + chunk].float()
        targets_N = targets_G[begin : begin + chunk]
        found, both, d_NV = _losses(logits_NV, targets_N, teacher, weight, start + begin)
        cross_entropy, total = cross_entropy + found, total + both
        product_GV[begin : begin + chunk] = d_NV
        del logits_NV, d_NV  # before the next are made
    return cross_entropy, total


def _fits(logits_NV: Tensor) -> bool:
    """Whether native code can overwrite such logits."""
    plain = type(logits_NV) is Tensor and logits_NV.device.type == "cpu" and logits_NV.is_contiguous()
    return plain and logits_NV.dtype in (torch.float32, torch.bfloat16)


def _native_losses(
    logits_NV: Tensor,
    targets_N: Tensor,
    teacher: TopTokens | None,
    weight: float,
    begin: int,
    isa: str | None = None,
) -> tuple[float, float]:
    """Cross-entropy and the whole loss, as `_losses`; the logits are overwritten by their gradient."""
    bits_NV = logits_NV.view(torch.uint16) if logits_NV.dtype == torch.bfloat16 else logits_NV
    top: dict[str, Any] = {"cross_entropy_weight": weight}
    if teacher is not None:
        rows = slice(begin, begin + len(logits_NV))
        top["ids_NK"] = teacher.ids_NK[rows].long().contiguous().numpy()
        top["log_p_NK"] = teacher.log_p_NK[rows].float().contiguous().numpy()
        top["temperature"] = teacher.temperature
    targets = targets_N.long().contiguous().numpy()
    return _native.head_loss(bits_NV.numpy(), targets, **top, num_threads=torch.get_num_threads(), isa=isa)


def _losses(
    logits_NV: Tensor, targets_N: Tensor, teacher: HeadTeacher | None, weight: float, begin: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of some tokens: cross-entropy, the whole loss, and the gradient [N, V] of the logits.

    The logits are overwritten.
    """
    learned = None if teacher is None else teacher.divergence(logits_NV, begin)
    cross_entropy, d_NV = fused(_cross_entropy, logits_NV.device.type)(logits_NV, targets_N, weight)
    if learned is None:
        return cross_entropy, weight * cross_entropy, d_NV
    divergence, towards_NV = learned
    return cross_entropy, weight * cross_entropy + divergence, d_NV.add_(towards_NV)


def _cross_entropy(logits_NV: Tensor, targets_N: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy, and the gradient of `weight` times it in the place of the logits."""
    rows_N = torch.arange(len(logits_NV), device=logits_NV.device)
    chosen_N, total_N = logits_NV[rows_N, targets_N], logits_NV.logsumexp(-1)
    cross_entropy = (total_N - chosen_N).sum()
    d_NV = logits_NV.sub_(total_N[:, None]).exp_()
    d_NV[rows_N, targets_N] -= 1
    return cross_entropy, d_NV if weight == 1 else d_NV.mul_(weight)
