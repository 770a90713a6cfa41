"""The operator `gossamer::sparse_linear` of torch, and the module that calls it.

y = (q_x . q_w) x (scale_x scale_w), as docs/format.md has it: tokens are rounded to INT8 with a scale each,
sums are exact, so that every device gives the same bits in float32. On a CPU it is computed by its
definition, which is slow and is there for tests: what runs models on CPUs is gossamer's engine.

Shapes: T tokens, N outputs, K inputs, P panels of 16 outputs, S steps of 128 inputs.
"""

import torch
from torch import Tensor, nn

from gossamer.errors import UnsupportedError
from gossamer.gpu.layout import STEP_INPUTS
from gossamer.gpu.packing import PackedWeights, pack
from gossamer.packed.values import PANEL_ROWS

SCALE_OF_ZEROS = 2.0**-23
FLOATS = (torch.float32, torch.bfloat16)


@torch.library.custom_op("gossamer::sparse_linear", mutates_args=(), device_types="cpu")
def sparse_linear(
    x: Tensor, masks: Tensor, values: Tensor, starts: Tensor, scales: Tensor, rows: int, columns: int
) -> Tensor:
    """y [..., N] of x [..., K], both bfloat16 or both float32.

    masks, values, starts: as `PackedWeights`. scales float32 [N].
    """
    w_NK = unpacked(PackedWeights(rows, columns, masks, values, starts))
    q_TK, scale_T1 = rounded(x.reshape(-1, columns).float())
    exact_TN = q_TK.double() @ w_NK.double().T  # whole numbers below 2^53
    y_TN = exact_TN.float() * (scale_T1 * scales)
    return y_TN.to(x.dtype).view(*x.shape[:-1], rows)


@sparse_linear.register_fake
def _(
    x: Tensor, masks: Tensor, values: Tensor, starts: Tensor, scales: Tensor, rows: int, columns: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def rounded(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -128 to 127 in float32, and the scale [T, 1] of each token."""
    largest_T1 = x_TK.abs().amax(dim=1, keepdim=True)
    scale_T1 = torch.where(largest_T1 == 0, SCALE_OF_ZEROS, largest_T1 / 127.5)
    return (x_TK / scale_T1).round().clamp(-128, 127), scale_T1


def unpacked(packed: PackedWeights) -> Tensor:
    """int8 [N, K]: what was packed."""
    panels, steps, lanes = packed.masks.shape
    places = torch.arange(8, device=packed.masks.device)
    bits = packed.masks.view(torch.uint8).unsqueeze(-1) >> places & 1
    vectors = torch.zeros(bits.numel(), dtype=torch.int8, device=bits.device)
    vectors[bits.flatten().bool()] = packed.values[: int(packed.starts[-1])].view(torch.int8)
    inputs = STEP_INPUTS // lanes
    whole = vectors.view(panels, steps * lanes, PANEL_ROWS, inputs).transpose(1, 2)
    return whole.reshape(panels * PANEL_ROWS, -1)[: packed.rows, : packed.columns].contiguous()


class SparseLinear(nn.Module):
    """A linear of INT8 weights without its zeros: on the device 3.4 bits a weight where 70% are zero."""

    def __init__(self, packed: PackedWeights, scales_N: Tensor, bias_N: Tensor | None = None) -> None:
        """UnsupportedError unless `scales_N` is one float32 for each output."""
        super().__init__()
        if scales_N.shape != (packed.rows,):
            raise UnsupportedError(
                f"found scales {tuple(scales_N.shape)}; supported: one for each of {packed.rows} outputs"
            )
        self.in_features, self.out_features = packed.columns, packed.rows
        self.register_buffer("masks", packed.masks)
        self.register_buffer("values", packed.values)
        self.register_buffer("starts", packed.starts)
        self.register_buffer("scales", scales_N.float())
        self.bias = None if bias_N is None else nn.Parameter(bias_N, requires_grad=False)

    @classmethod
    def from_weight(cls, w_NK: Tensor, scales_N: Tensor, bias_N: Tensor | None = None) -> "SparseLinear":
        """Of weights int8 [N, K], packed on the device where they lie."""
        return cls(pack(w_NK), scales_N, bias_N)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] of x [..., K], bfloat16 or float32; UnsupportedError for other types."""
        if x.dtype not in FLOATS:
            raise UnsupportedError(f"found inputs of {x.dtype}; supported: bfloat16 and float32")
        if x.shape[-1] != self.in_features:
            raise UnsupportedError(f"found {x.shape[-1]} inputs; supported: {self.in_features}")
        buffers = (self.masks, self.values, self.starts, self.scales)
        y = torch.ops.gossamer.sparse_linear(x, *buffers, self.out_features, self.in_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """As other linears say it."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"
