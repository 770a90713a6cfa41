"""Which kernels make y = W x, by the number of tokens.

Up to 256 tokens the sparse kernel, 64 at a time: it expands the weights in registers, once for all of them.
More tokens are bound by arithmetic, of which zeros save none: the weights are expanded into memory, which the
next matrix takes over, and multiplied by torch's own product; `dense` are weights that lie there expanded.

Shapes: T tokens, N outputs, K inputs, P panels of 16 outputs, S steps of 128 inputs.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from gossamer.gpu import kernels
from gossamer.gpu.kernels import Device
from gossamer.gpu.layout import STEP_INPUTS, TILE_TOKENS
from gossamer.gpu.packing import PackedWeights
from gossamer.packed.values import PANEL_ROWS

MOST_AT_ONCE = 64
MOST_SPARSE = 256
LEAST_STEPS = 4  # of a share: fewer do not fill the pipeline of copies
MOST_SHARES = 16
WARPS_OF_PROCESSOR = 16  # that it should have to hide what it waits for
LEAST_INT8_TOKENS = 32  # torch's INT8 product takes more than 16, in eights


def product(
    device: Device,
    x_TK: Tensor,
    packed: PackedWeights | None,
    dense: Tensor | None,
    scales_N: Tensor | None,
    rows: int,
) -> Tensor:
    """y [T, N] of x bfloat16 or float32 [T, K], which is contiguous; weights without scales take bfloat16."""
    if len(x_TK) == 0:
        return x_TK.new_empty(0, rows)
    if packed is None or (dense is not None and len(x_TK) > MOST_AT_ONCE):
        assert dense is not None
        return dense_product(device, x_TK, dense, scales_N, rows)
    if len(x_TK) > MOST_SPARSE:
        return dense_product(device, x_TK, expanded(device, packed), scales_N, rows)
    parts = [_sparse(device, it, packed, scales_N) for it in x_TK.split(MOST_AT_ONCE)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def dense_product(device: Device, x_TK: Tensor, w: Tensor, scales_N: Tensor | None, rows: int) -> Tensor:
    """The same of weights [P x 16, S x 128], of which `rows` are the model's."""
    tokens, inputs = x_TK.shape
    if scales_N is None:
        return linear(pad(x_TK, (0, w.shape[1] - inputs)), w[:rows])
    whole = max(LEAST_INT8_TOKENS, -(-tokens // 8) * 8)
    rounded = x_TK.new_empty(whole, w.shape[1], dtype=torch.int8)
    input_scales = _round(device, x_TK, rounded, 0, whole)
    sums = torch.ops.aten._int_mm(rounded, w.T)
    return _outputs(device, x_TK, sums.unsqueeze(0), rows, input_scales, scales_N)


def expanded(device: Device, packed: PackedWeights) -> Tensor:
    """Weights int8 or bfloat16 [P x 16, S x 128], zeros beyond the matrix."""
    panels, steps, _ = packed.masks.shape
    dtype = packed.values.dtype if packed.multipliers is None else torch.int8
    w = packed.values.new_empty(panels * PANEL_ROWS, steps * STEP_INPUTS, dtype=dtype)
    blocks = -(-panels * steps // kernels.UNITS_OF_BLOCK)
    job = kernels.Expand(
        masks=packed.masks, values=packed.values, starts=packed.starts, multipliers=packed.multipliers, w=w,
        panels=panels, steps=steps,
    )  # fmt: skip
    device.launch(kernels.expand(packed.values.dtype), blocks, job)
    return w


def _sparse(device: Device, x_TK: Tensor, packed: PackedWeights, scales_N: Tensor | None) -> Tensor:
    panels, steps, _ = packed.masks.shape
    tiles = next(it for it in kernels.TILES if it * TILE_TOKENS >= len(x_TK))
    ordered = x_TK.new_empty(
        tiles * TILE_TOKENS * steps * STEP_INPUTS * packed.values.itemsize, dtype=torch.int8
    )
    blocks = tiles * TILE_TOKENS
    if scales_N is None:
        input_scales, sum_type = None, torch.float32
        given = {"tokens": len(x_TK), "inputs": x_TK.shape[1], "steps": steps, "tiles": tiles}
        device.launch(kernels.ORDER_INPUTS, blocks, kernels.OrderInputs(x=x_TK, ordered=ordered, **given))
    else:
        input_scales, sum_type = _round(device, x_TK, ordered, tiles, blocks), torch.int32
    shares = num_shares(device.processors, panels, steps)
    sums = x_TK.new_empty(shares, blocks, panels * PANEL_ROWS, dtype=sum_type)
    job = kernels.SparseProduct(
        masks=packed.masks, values=packed.values, starts=packed.starts, multipliers=packed.multipliers,
        inputs=ordered, sums=sums, panels=panels, steps=steps, shares=shares,
    )  # fmt: skip
    kernel = kernels.sparse_product(packed.values.dtype, tiles)
    device.launch(kernel, -(-panels * shares // kernels.UNITS_OF_BLOCK), job)
    return _outputs(device, x_TK, sums, packed.rows, input_scales, scales_N)


def num_shares(processors: int, panels: int, steps: int) -> int:
    """Into how many shares the steps of each panel are cut, so that all processors have warps enough."""
    wanted = -(-processors * WARPS_OF_PROCESSOR // panels)
    return max(1, min(wanted, steps // LEAST_STEPS, MOST_SHARES))


def _round(device: Device, x_TK: Tensor, rounded: Tensor, tiles: int, blocks: int) -> Tensor:
    tokens, inputs = x_TK.shape
    input_scales = x_TK.new_empty(tokens, dtype=torch.float32)
    job = kernels.RoundInputs(
        x=x_TK, rounded=rounded, scales=input_scales, tokens=tokens, inputs=inputs,
        steps=-(-inputs // STEP_INPUTS), tiles=tiles, bfloat16=int(x_TK.dtype == torch.bfloat16),
    )  # fmt: skip
    device.launch(kernels.ROUND_INPUTS, blocks, job)
    return input_scales


def _outputs(
    device: Device,
    x_TK: Tensor,
    sums: Tensor,
    rows: int,
    input_scales_T: Tensor | None,
    scales_N: Tensor | None,
) -> Tensor:
    shares, sum_tokens, outputs = sums.shape
    y_TN = x_TK.new_empty(len(x_TK), rows)
    job = kernels.ScaleSums(
        sums=sums, input_scales=input_scales_T, scales=scales_N, y=y_TN, tokens=len(x_TK),
        sum_tokens=sum_tokens, outputs=rows, panels=outputs // PANEL_ROWS, shares=shares,
        bfloat16=int(y_TN.dtype == torch.bfloat16),
    )  # fmt: skip
    device.launch(kernels.SCALE_SUMS, -(-y_TN.numel() // kernels.SCALE_SUMS.threads), job)
    return y_TN
