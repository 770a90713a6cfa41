"""Weights to what a GPU's kernels read, by torch on the device where the weights lie: layout.py in tensors.

Shapes: N outputs, K inputs, P panels of 16 outputs, S steps of 128 inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.gpu.layout import BLOCK_BYTES, STEP_INPUTS, STEP_VECTORS, check_number
from gossamer.packed.values import PANEL_ROWS

CHUNK_WEIGHTS = 1 << 24  # that are looked at at once, at some five bytes each


@dataclass(frozen=True)
class PackedWeights:
    """`layout.SparseMatrix` in tensors of one device: the same bits, in torch's signed types.

    masks int64 [P, S, 32]; values int8 or bfloat16, in whole blocks of 16 bytes; starts int32 [P S + 1].
    """

    rows: int
    columns: int
    masks: Tensor
    values: Tensor
    starts: Tensor

    @property
    def num_bytes(self) -> int:
        """What it takes on the device, without its scales."""
        return sum(it.nbytes for it in (self.masks, self.values, self.starts))


def pack(w_NK: Tensor) -> PackedWeights:
    """Of weights int8 or bfloat16 [N, K]; beside them and the result it takes some bytes for 16 M at a time.

    UnsupportedError where more of them are not zero than the layout can count.
    """
    rows, columns = w_NK.shape
    panels, steps = -(-rows // PANEL_ROWS), -(-columns // STEP_INPUTS)
    at_once = max(1, CHUNK_WEIGHTS // (PANEL_ROWS * steps * STEP_INPUTS)) * PANEL_ROWS
    parts = [_pack_panels(w_NK[begin : begin + at_once], steps) for begin in range(0, rows, at_once)]
    masks, values, counts = (torch.cat(it) for it in zip(*parts, strict=True))
    check_number(rows, columns, values.numel())
    starts = pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    whole = pad(values, (0, -values.numel() % (BLOCK_BYTES // values.itemsize)))
    return PackedWeights(rows, columns, masks.view(panels, steps, STEP_VECTORS), whole, starts)


def padded(w_NK: Tensor) -> Tensor:
    """[P x 16, S x 128]: the weights, and zeros up to whole panels and steps."""
    rows, columns = w_NK.shape
    return pad(w_NK, (0, -columns % STEP_INPUTS, 0, -rows % PANEL_ROWS))


def _pack_panels(w_NK: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masks int64 [panels x S x 32], values, and how many of them each step has, int64 [panels x S]."""
    whole = padded(w_NK)
    inputs = STEP_INPUTS // STEP_VECTORS
    vectors = whole.view(-1, PANEL_ROWS, steps * STEP_VECTORS, inputs).transpose(1, 2).contiguous()
    live = vectors != 0
    places = torch.tensor([1 << place for place in range(8)], dtype=torch.uint8, device=w_NK.device)
    masks = (live.view(-1, 8) * places).sum(dim=1, dtype=torch.uint8).view(torch.int64)
    counts = live.view(-1, STEP_VECTORS * PANEL_ROWS * inputs).sum(dim=1)
    return masks, vectors[live], counts
