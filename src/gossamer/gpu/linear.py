"""The operator `gossamer::sparse_linear` of torch, and the module that calls it.

Of INT8 weights y = (q_x . q_w) x (scale_x scale_w), as docs/format.md has it: tokens are rounded to INT8 with
a scale each, sums are exact, so that every device gives the same bits in float32. INT4 weights are INT8 ones
that are written as products, of 4 bits and the multiplier of 128 inputs. Of bfloat16 weights sums are
float32. On a CPU it is computed by its definition, which is slow and is there for tests: what runs models on
CPUs is gossamer's engine.

Shapes: T tokens, N outputs, K inputs, P panels of 16 outputs, S steps of 128 inputs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor, nn

from gossamer.checkpoint.schemes import MAX_MULTIPLIER
from gossamer.compress.int8 import quantize_tokens
from gossamer.errors import UnsupportedError
from gossamer.gpu import products
from gossamer.gpu.driver import gpu
from gossamer.gpu.layout import STEP_INPUTS
from gossamer.gpu.memory import memory_for
from gossamer.gpu.packing import (
    PackedWeights,
    count_nonzero,
    pack,
    packing_bytes,
    padded,
    padded_bytes,
    unpacked,
)

LEAST_ZEROS = 0.45  # below which the masks' bits and the expanding cost what the zeros save
LEAST_INT4, MOST_INT4 = -8, 7


@torch.library.custom_op("gossamer::sparse_linear", mutates_args=())
def sparse_linear(
    x: Tensor,
    masks: Tensor,
    values: Tensor,
    starts: Tensor,
    multipliers: Tensor | None,
    scales: Tensor | None,
    dense: Tensor | None,
    rows: int,
    columns: int,
) -> Tensor:
    """y [..., N] of x [..., K], both bfloat16 or, of integer weights, both float32.

    masks, values, starts, multipliers: as `PackedWeights`, or all empty. dense: weights [P x 16, S x 128],
    for many tokens, or for all where they are not packed. scales: float32 [N], of integer weights.
    """
    x_TK = x.reshape(-1, columns).contiguous()
    packed = PackedWeights(rows, columns, masks, values, starts, multipliers) if masks.numel() else None
    if x.is_cuda:
        y_TN = products.product(gpu(x.get_device()), x_TK, packed, dense, scales, rows)
    else:
        y_TN = _by_definition(x_TK, packed, dense, scales, rows)
    return y_TN.view(*x.shape[:-1], rows)


@sparse_linear.register_fake
def _(x: Tensor, *held: Any) -> Tensor:
    *_, rows, _columns = held
    return x.new_empty(*x.shape[:-1], rows)


def _by_definition(
    x_TK: Tensor, packed: PackedWeights | None, dense: Tensor | None, scales_N: Tensor | None, rows: int
) -> Tensor:
    """y [T, N], of packed weights where they are, else of dense ones."""
    if packed is not None:
        w_NK = unpacked(packed)
    else:
        assert dense is not None
        w_NK = dense[:rows, : x_TK.shape[1]]
    if scales_N is None:
        return (x_TK.float() @ w_NK.float().T).to(x_TK.dtype)
    q_TK, scale_T1 = quantize_tokens(x_TK)
    exact_TN = q_TK.double() @ w_NK.double().T  # whole numbers below 2^53
    return (exact_TN.float() * (scale_T1 * scales_N)).to(x_TK.dtype)


def while_packing(
    name: str, w_NK: Tensor, *, is_int4: bool = False, keep_dense: bool = False
) -> AbstractContextManager[None]:
    """MemoryError that says what a linear takes where the device's memory ends while it is packed."""
    rows, columns = w_NK.shape
    most = packing_bytes(rows, columns, w_NK.dtype, is_int4=is_int4)
    if keep_dense:
        most += (3 if is_int4 else 1) * padded_bytes(rows, columns, w_NK.dtype)  # INT4: multiplied, padded
    return memory_for(
        f"{name} was packed, beside the weights that it is packed from; this linear takes at most "
        f"{most / 1e9:.2f} GB more while it is"
    )


def nothing_gained(num_dense: int, num_linears: int) -> str:
    """What logs say of a model's linears that stay dense."""
    return (
        f"{num_dense} of {num_linears} linears have fewer than {LEAST_ZEROS:.0%} zeros and stay dense: "
        "nothing is gained there"
    )


class SparseLinear(nn.Module):
    """A linear without its zeros: at 70% of them 2.3 bits a weight of INT4, 3.4 of INT8, 5.8 of bfloat16.

    Fewer zeros than `LEAST_ZEROS` are not worth it: such weights stay dense (`is_dense`). INT4 never does: it
    would be INT8. `keep_dense` holds weights twice, for prompts at a dense product's speed.
    """

    masks: Tensor
    values: Tensor
    starts: Tensor
    multipliers: Tensor | None
    dense: Tensor | None
    scales: Tensor | None

    def __init__(
        self,
        packed: PackedWeights | None,
        dense: Tensor | None,
        shape: tuple[int, int],
        scales_N: Tensor | None = None,
        bias_N: Tensor | None = None,
    ) -> None:
        """Of weights packed, dense ([P x 16, S x 128]) or both; UnsupportedError for other scales than N."""
        super().__init__()
        self.out_features, self.in_features = shape
        if scales_N is not None and scales_N.shape != shape[:1]:
            raise UnsupportedError(
                f"found scales {tuple(scales_N.shape)}; supported: one for each of {shape[0]} outputs"
            )
        for name in ("masks", "values", "starts"):
            nothing = torch.empty(0, dtype=torch.int64, device=None if dense is None else dense.device)
            self.register_buffer(name, nothing if packed is None else getattr(packed, name))
        self.register_buffer("multipliers", None if packed is None else packed.multipliers)
        self.register_buffer("dense", dense)
        self.register_buffer("scales", None if scales_N is None else scales_N.float())
        self.bias = None if bias_N is None else nn.Parameter(bias_N, requires_grad=False)

    @classmethod
    def from_weight(
        cls,
        w_NK: Tensor,
        scales_N: Tensor | None = None,
        bias_N: Tensor | None = None,
        *,
        multiplier_NS: Tensor | None = None,
        keep_dense: bool = False,
    ) -> "SparseLinear":
        """Of weights int8 [N, K] with scales, or bfloat16 without, packed on the device where they lie.

        With multipliers uint8 [N, S], 1 to 16, weights are INT4, each times its multiplier and scale.
        """
        is_float = scales_N is None and multiplier_NS is None
        if w_NK.dtype != (torch.bfloat16 if is_float else torch.int8) or (scales_N is None and not is_float):
            raise UnsupportedError(
                f"found weights of {w_NK.dtype} {'without' if scales_N is None else 'with'} scales; "
                "supported: int8 with a scale for each output, bfloat16 without"
            )
        rows, columns = w_NK.shape
        if multiplier_NS is not None:
            _check_int4(w_NK, multiplier_NS)
            packed = pack(w_NK, multiplier_NS)
            dense = padded(_int8_weights(w_NK, multiplier_NS)) if keep_dense else None
            return cls(packed, dense, (rows, columns), scales_N, bias_N)
        is_sparse = count_nonzero(w_NK) <= (1 - LEAST_ZEROS) * w_NK.numel()
        packed = pack(w_NK) if is_sparse else None
        dense = padded(w_NK) if keep_dense or not is_sparse else None
        return cls(packed, dense, (rows, columns), scales_N, bias_N)

    @property
    def is_dense(self) -> bool:
        """Whether its weights had too few zeros to leave them out."""
        return self.masks.numel() == 0

    @property
    def num_bytes(self) -> int:
        """What its weights take on the device, without scales and bias."""
        held = (self.masks, self.values, self.starts, self.multipliers, self.dense)
        return sum(it.nbytes for it in held if it is not None)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] of x [..., K], bfloat16 or (INT8, INT4) float32; UnsupportedError for others."""
        takes = (torch.bfloat16,) if self.scales is None else (torch.bfloat16, torch.float32)
        if x.dtype not in takes:
            names = " and ".join(str(it).removeprefix("torch.") for it in takes)
            raise UnsupportedError(f"found inputs of {x.dtype}; supported: {names}")
        if x.shape[-1] != self.in_features:
            raise UnsupportedError(f"found {x.shape[-1]} inputs; supported: {self.in_features}")
        if x.device != self.starts.device:
            raise UnsupportedError(
                f"found inputs on {x.device}; supported: {self.starts.device}, as the weights"
            )
        held = (self.masks, self.values, self.starts, self.multipliers, self.scales, self.dense)
        y = torch.ops.gossamer.sparse_linear(x, *held, self.out_features, self.in_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves what is held, which keeps its types: `model.to(dtype)` is for what is around it."""

        def moved(held: Tensor) -> Tensor:
            bits = fn(held.detach().view(torch.uint8))
            if bits.dtype != torch.uint8:
                raise UnsupportedError(
                    f"found a sparse linear to become {bits.dtype}; supported: other devices"
                )
            return bits.view(held.dtype)

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        """As other linears say it."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, dense={self.is_dense}"


def _int8_weights(w_NK: Tensor, multiplier_NS: Tensor) -> Tensor:
    """What INT4 weights stand for, before the scales of rows."""
    in_rows_NK = multiplier_NS.view(torch.int8).repeat_interleave(STEP_INPUTS, 1)
    return w_NK * in_rows_NK[:, : w_NK.shape[1]]


def _check_int4(w_NK: Tensor, multiplier_NS: Tensor) -> None:
    """UnsupportedError for weights that are no INT4, or other multipliers than one for each 128 inputs."""
    groups = (len(w_NK), -(-w_NK.shape[1] // STEP_INPUTS))
    if multiplier_NS.shape != groups or multiplier_NS.dtype != torch.uint8:
        raise UnsupportedError(
            f"found multipliers {tuple(multiplier_NS.shape)} of {multiplier_NS.dtype}; supported: uint8 "
            f"{groups}, one for each {STEP_INPUTS} inputs of an output"
        )
    for what, found, least, most in (
        ("INT4 weights", w_NK, LEAST_INT4, MOST_INT4),
        ("multipliers", multiplier_NS, 1, MAX_MULTIPLIER),
    ):
        smallest, largest = (int(it) for it in found.aminmax())
        if smallest < least or largest > most:
            raise UnsupportedError(f"found {what} from {smallest} to {largest}; supported: {least} to {most}")
