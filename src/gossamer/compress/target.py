"""What pruned weights aim at: the parent's outputs, as far as rows held out from calibration bear that out.

When a linear y = W x is pruned, its input x is no longer the parent's x': earlier layers have changed. Let e
be what the output lacks. The weights V that make up for it best are

    V = argmin mean |e - (V - W) x|^2 + l |V - W|^2 = W + M
    M = P (H + l I)^-1        P = 2/n sum e x^T        H = 2/n sum x x^T        l: the dampening

For a linear whose output other modules read, e = W x' - W x. One whose output is added to hidden states h
makes up for what they lack as well: e = h' - (h + W x), where h' has the parent's W x' in it already. There
each token counts by 1 / |h'|^2, because one token, the attention sink, may hold nearly all of the hidden
states' squared norm. (The inputs of the other linears come out of a norm, so that tokens count alike.) Their
P is 2/n sum (h' - h) x^T - W H: no token is multiplied by W for it.

M fits the text of calibration better than any other. How much of it holds elsewhere is told by rows held out,
with their moments P~ and H~: of the weights W + s M those are best with

    s = <P~, M> / <M H~, M>        (between 0 and 1)

Aiming at what the parent gives on its own input is GPTAQ's asymmetric calibration (Li et al., arXiv
2504.02692). That e has the hidden states' share, and s from rows held out, are ours.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.compress.hessian import InverseFactor, moments

Pieces = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Evidence:
    """H [K, K] and P of a group of linears; P is [N, K], or such that W P is theirs where `shared`."""

    h_KK: Tensor
    p_NK: Tensor
    shared: bool

    def pull(self, w_NK: Tensor) -> Tensor:
        """P [N, K] of the linear with these weights."""
        return w_NK @ self.p_NK if self.shared else self.p_NK


def read_by_others(inputs: Pieces) -> Evidence:
    """For linears with the same inputs, from pieces (x, x') [rows, T, K]."""
    return Evidence(*moments((x_BTK, other_BTK - x_BTK) for x_BTK, other_BTK in inputs), shared=True)


def added_to_hidden(linear: nn.Linear, inputs: Iterable[Tensor], hidden: Pieces) -> Evidence:
    """From pieces of x [rows, T, K] and (h, h') [rows, T, N]: h before the linear, h' after the parent's."""
    bias_N = 0.0 if linear.bias is None else linear.bias

    def what_it_adds() -> Iterator[tuple[Tensor, Tensor]]:  # x and e + W x, each token divided by |h'|
        for x_BTK, (h_BTN, parent_BTN) in zip(inputs, hidden, strict=True):
            least = torch.finfo(h_BTN.dtype).tiny
            scale_BT1 = parent_BTN.norm(dim=-1, keepdim=True).clamp_min(least).reciprocal()
            yield x_BTK * scale_BT1, (parent_BTN - h_BTN - bias_N) * scale_BT1

    h_KK, p_NK = moments(what_it_adds())
    return Evidence(h_KK, p_NK - linear.weight.detach() @ h_KK, shared=False)


def target(w_NK: Tensor, factor: InverseFactor, rows: Evidence, held_out: Evidence) -> Tensor:
    """W + s M [N, K]; `factor` is of the dampened H of `rows`."""
    move_NK = rows.pull(w_NK) @ factor.u_KK.T @ factor.u_KK
    square = ((move_NK @ held_out.h_KK) * move_NK).sum()
    gain = (held_out.pull(w_NK) * move_NK).sum()
    strength = (gain / square.clamp_min(torch.finfo(square.dtype).tiny)).clamp(0, 1)
    return w_NK + strength * move_NK


def token_error(
    ours_BTD: Tensor, parent_BTD: Tensor, kept_BT: Tensor | None = None, read_DD: Tensor | None = None
) -> Tensor:
    """Mean over the kept tokens of |d R|^2 / |parent|^2, d = ours - parent: no attention sink dominates it.

    Other tokens, whatever is in them, add neither to the error nor to a gradient. R is I by default.
    """
    if kept_BT is not None:
        parent_BTD = torch.where(kept_BT.unsqueeze(-1), parent_BTD, ours_BTD.detach())
    square_BT = parent_BTD.square().sum(-1).clamp_min(torch.finfo(parent_BTD.dtype).tiny)
    lacking_BTD = ours_BTD - parent_BTD if read_DD is None else (ours_BTD - parent_BTD) @ read_DD
    error_BT = lacking_BTD.square().sum(-1) / square_BT
    return error_BT.mean() if kept_BT is None else error_BT.sum() / kept_BT.sum()
