"""LoRA (Hu et al., arXiv 2106.09685) under a mask: what is trained are low-rank adapters of the linears.

Embeddings, norms and head are frozen, and so is the weight W [N, K] of every linear of the decoder, which
computes with

    W' = W + M o (2 B A),    M = 1 where W is not zero;    A [R, K] random, B [N, R] 0 at first

so that what is trained is what is merged in the end, and every zero of W is one of W'. (The 2 is alpha / R of
the paper, with alpha = 2 R.) Ordinary LoRA multiplies x by A and B instead of making W', and its merge would
fill the zeros. Of a dense model W' is the same either way.

W' is made anew in the forward and in the backward pass and not kept between them: beside the frozen weights,
a run holds gradients and moments of the adapters alone.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import ConfigError
from gossamer.training.masks import decoder_linears

SCALE = 2.0


class LowRankLinear(nn.Linear):
    """Takes the place of an `nn.Linear`, whose weight and bias it keeps, frozen."""

    def __init__(self, dense: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__(dense.in_features, dense.out_features, bias=False, device="meta")
        dense.requires_grad_(False)
        self.weight = dense.weight
        self.register_parameter("bias", dense.bias)
        a_RK = torch.empty(rank, self.in_features).uniform_(-1, 1, generator=generator)
        self.lora_A = nn.Parameter((a_RK / self.in_features**0.5).to(self.weight.device))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] of x [..., K]; under autocast products and y have autocast's type."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        y: Any = _Product.apply(x, self.weight, self.lora_A, self.lora_B, dtype)
        return y if self.bias is None else y + self.bias.to(dtype)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """An `nn.Linear` with the merged weight, which takes the place of W in memory."""
        with torch.device("meta"):
            dense = nn.Linear(self.in_features, self.out_features, bias=False)
        dense.weight = nn.Parameter(self.weight.copy_(merged(self.weight, self.lora_A, self.lora_B)))
        dense.register_parameter("bias", self.bias)
        return dense


def merged(w_NK: Tensor, a_RK: Tensor, b_NR: Tensor) -> Tensor:
    """W + M o (2 B A), the weight that the linear computes with."""
    return torch.addmm(w_NK, b_NR, a_RK, alpha=SCALE).masked_fill_(w_NK == 0, 0)


class _Product(torch.autograd.Function):
    """x W'^T, with the gradients of x, A and B.

    Of W' it would be G = M o (dy^T x); those of the adapters are dA = 2 B^T G and dB = 2 G A^T.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_NK: Tensor, a_RK: Tensor, b_NR: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x_of_type = x.to(dtype)
            ctx.save_for_backward(x_of_type, w_NK, a_RK, b_NR)
            ctx.type_of_x = x.dtype
            return linear(x_of_type, merged(w_NK, a_RK, b_NR).to(dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w_NK, a_RK, b_NR = ctx.saved_tensors
        dx = da_RK = db_NR = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = (dy @ merged(w_NK, a_RK, b_NR).to(dy.dtype)).to(ctx.type_of_x)
            dy_TN, x_TK = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
            g_NK = (dy_TN.T @ x_TK).to(w_NK.dtype).masked_fill_(w_NK == 0, 0)
            da_RK, db_NR = SCALE * (b_NR.T @ g_NK), SCALE * (g_NK @ a_RK.T)
        return dx, None, da_RK, db_NR, None


def check_rank(rank: int | None, source: Checkpoint) -> None:
    """Raise ConfigError for a rank that is no rank, or is that of a whole matrix."""
    if rank is None:
        return
    if rank < 1:
        raise ConfigError(f"--lora {rank}: expected a rank of at least 1")
    shapes = source.architecture.tensor_shapes
    for name in source.linears:
        rows, columns = shapes[f"{name}.weight"]
        if rank >= min(rows, columns):
            raise ConfigError(
                f"--lora {rank}: {name} is {rows} x {columns}; expected a rank below {min(rows, columns)}; "
                "or leave --lora out, to train all weights"
            )


def adapt(model: nn.Module, rank: int, seed: int) -> None:
    """Freeze the model, and give every linear of the decoder an adapter.

    Do this before an optimizer is made: adapters are new parameters.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, dense in list(decoder_linears(model)):
        assert isinstance(dense, nn.Linear), name
        model.set_submodule(name, LowRankLinear(dense, rank, generator))


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """name -> A or B, for all adapters of the model; empty if it has none."""
    named = ((name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear))
    return {
        f"{name}.{part}": getattr(module, part) for name, module in named for part in ("lora_A", "lora_B")
    }


def merge(model: nn.Module) -> None:
    """Undo `adapt`: what the adapters learned becomes a part of the weights."""
    for name in [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]:
        adapted: Any = model.get_submodule(name)
        model.set_submodule(name, adapted.to_linear())
