"""Weights to what a GPU's kernels read, by torch on the device where the weights lie: layout.py in tensors.

Shapes: N outputs, K inputs, P panels of 16 outputs, S steps of 128 inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.gpu.layout import BLOCK_BYTES, STEP_INPUTS, STEP_VECTORS, check_number
from gossamer.packed.values import PANEL_ROWS

CHUNK_WEIGHTS = 1 << 24  # that are looked at at once, at some five bytes each, of INT4 eight


@dataclass(frozen=True)
class PackedWeights:
    """`layout.SparseMatrix` in tensors of one device: the same bits, in torch's signed types.

    masks int64 [P, S, 32]; values int8, bfloat16 or pairs of INT4 in uint8, in whole blocks of 16 bytes;
    starts int32 [P S + 1]; multipliers of INT4 uint8 [P, S, 8, 2].
    """

    rows: int
    columns: int
    masks: Tensor
    values: Tensor
    starts: Tensor
    multipliers: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """What it takes on the device, without its scales."""
        held = (self.masks, self.values, self.starts, self.multipliers)
        return sum(it.nbytes for it in held if it is not None)


def pack(w_NK: Tensor, multiplier_NS: Tensor | None = None) -> PackedWeights:
    """Of weights int8 or bfloat16 [N, K]; beside them and the result it takes some bytes for 16 M at a time.

    With multipliers uint8 [N, S] the weights are INT4, in int8. UnsupportedError where more of them are not
    zero than the layout can count.
    """
    rows, columns = w_NK.shape
    paired = multiplier_NS is not None
    panels, steps = -(-rows // PANEL_ROWS), -(-columns // STEP_INPUTS)
    at_once = max(1, CHUNK_WEIGHTS // (PANEL_ROWS * steps * STEP_INPUTS)) * PANEL_ROWS
    parts = [_pack_panels(w_NK[begin : begin + at_once], steps, paired) for begin in range(0, rows, at_once)]
    masks, values, counts = (torch.cat(it) for it in zip(*parts, strict=True))
    check_number(rows, columns, values.numel())
    starts = pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    whole = pad(values, (0, -values.numel() % (BLOCK_BYTES // values.itemsize)))
    multipliers = None if multiplier_NS is None else _in_fragments(multiplier_NS)
    return PackedWeights(rows, columns, masks.view(panels, steps, STEP_VECTORS), whole, starts, multipliers)


def padded(w_NK: Tensor) -> Tensor:
    """[P x 16, S x 128]: the weights, and zeros up to whole panels and steps."""
    rows, columns = w_NK.shape
    return pad(w_NK, (0, -columns % STEP_INPUTS, 0, -rows % PANEL_ROWS))


def unpacked(packed: PackedWeights) -> Tensor:
    """int8 or bfloat16 [N, K]: what was packed; of INT4 the int8 weights, nibbles times multipliers."""
    panels, steps, lanes = packed.masks.shape
    places = torch.arange(8, dtype=torch.uint8, device=packed.masks.device)
    live = (packed.masks.view(torch.uint8).unsqueeze(-1) >> places & 1).flatten().bool()
    values = packed.values[: int(packed.starts[-1])]
    if packed.multipliers is not None:
        values = _singles(values, live.view(panels * steps, 2, -1))
    vectors = values.new_zeros(live.numel())
    vectors[live] = values
    vectors = vectors.view(panels, steps, lanes, PANEL_ROWS, STEP_INPUTS // lanes)
    if packed.multipliers is not None:
        in_rows = packed.multipliers.transpose(2, 3).reshape(panels, steps, 1, PANEL_ROWS, 1)
        vectors *= in_rows.view(torch.int8)
    whole = vectors.flatten(1, 2).transpose(1, 2)
    return whole.reshape(panels * PANEL_ROWS, -1)[: packed.rows, : packed.columns].contiguous()


def _in_fragments(multiplier_NS: Tensor) -> Tensor:
    """[P, S, 8, 2], zeros for the rows past the end."""
    whole = pad(multiplier_NS, (0, 0, 0, -len(multiplier_NS) % PANEL_ROWS))
    return whole.view(-1, 2, PANEL_ROWS // 2, whole.shape[1]).permute(0, 3, 2, 1).contiguous()


def _pack_panels(w_NK: Tensor, steps: int, paired: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Masks int64 [panels x S x 32], values, and how many of them each step has, int64 [panels x S]."""
    whole = padded(w_NK)
    inputs = STEP_INPUTS // STEP_VECTORS
    vectors = whole.view(-1, PANEL_ROWS, steps * STEP_VECTORS, inputs).transpose(1, 2).contiguous()
    live = vectors != 0
    places = torch.tensor([1 << place for place in range(8)], dtype=torch.uint8, device=w_NK.device)
    masks = (live.view(-1, 8) * places).sum(dim=1, dtype=torch.uint8).view(torch.int64)
    of_steps = live.view(-1, STEP_VECTORS * PANEL_ROWS * inputs)
    if paired:
        return masks, *_pairs(vectors[live], of_steps.view(len(of_steps), 2, -1))
    return masks, vectors[live], of_steps.sum(dim=1)


def _pairs(weights: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes of INT4 weights that are live, bool [steps, 2, 1024], and how many bytes each step has."""
    in_front, in_pair = _fronts(live)
    front = torch.zeros(live.shape, dtype=torch.uint8, device=live.device)
    front[in_front] = weights.view(torch.uint8)
    joined = front[:, 0] & 15 | front[:, 1] << 4
    return joined[in_pair], in_pair.sum(dim=1)


def _singles(values: Tensor, live: Tensor) -> Tensor:
    """int8, one by one: those of which `_pairs` makes such bytes."""
    in_front, in_pair = _fronts(live)
    joined = torch.zeros(in_pair.shape, dtype=torch.uint8, device=live.device)
    joined[in_pair] = values
    return torch.stack([joined << 4, joined], 1).view(torch.int8)[in_front] >> 4


def _fronts(live: Tensor) -> tuple[Tensor, Tensor]:
    """Of each run as many places, from its first, as are live; and of each step, as the longer run has."""
    in_front = torch.arange(live.shape[2], device=live.device) < live.sum(dim=2, keepdim=True)
    return in_front, in_front.any(dim=1)
