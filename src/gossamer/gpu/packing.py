"""Weights to what a GPU's kernels read, by torch on the device where the weights lie: layout.py in tensors.

Shapes: N outputs, K inputs, P panels of 16 outputs, S steps of 128 inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.gpu.layout import BLOCK_BYTES, STEP_INPUTS, STEP_VECTORS, check_number
from gossamer.packed.panels import round_up
from gossamer.packed.values import PANEL_ROWS

STEP_WEIGHTS = PANEL_ROWS * STEP_INPUTS
START_BYTES = 4
CHUNK_WEIGHTS = 1 << 21  # that are looked at at once
CHUNK_BYTES, LIVE_BYTES = 4, 9  # at most for each of those, and more where it is not zero: 8 for its place
COUNTING_BYTES = 64  # at most for each step
TOP_BITS = 0x0102_0408_1020_4080  # times eight bytes of 0 or 1: in the highest byte each has its bit


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
    """Of weights int8 or bfloat16 [N, K]; `packing_bytes` says what it takes beside them.

    With multipliers uint8 [N, S] the weights are INT4, in int8. UnsupportedError where more of them are not
    zero than the layout can count.
    """
    w_NK, paired = w_NK.detach(), multiplier_NS is not None
    rows, columns = w_NK.shape
    panels, steps = _grid(rows, columns)
    at_once = _panels_at_once(steps)
    chunks = w_NK.split(at_once * PANEL_ROWS)
    lengths = torch.cat([_run_lengths(it, steps) for it in chunks])
    starts = pad((lengths.amax(1) if paired else lengths.sum(1)).cumsum(0), (1, 0))
    borders = [*starts[:: at_once * steps].tolist(), int(starts[-1])]
    check_number(rows, columns, borders[-1])
    masks = w_NK.new_empty(panels, steps, STEP_VECTORS, dtype=torch.int64)
    dtype = torch.uint8 if paired else w_NK.dtype
    values = w_NK.new_zeros(round_up(borders[-1], BLOCK_BYTES // dtype.itemsize), dtype=dtype)
    parts = zip(chunks, masks.split(at_once), lengths.split(at_once * steps), strict=True)
    for index, (chunk, of_masks, of_lengths) in enumerate(parts):
        part = values[borders[index] : borders[index + 1]]
        _pack_panels(chunk, of_masks, of_lengths if paired else None, part)
    multipliers = None if multiplier_NS is None else _in_fragments(multiplier_NS)
    return PackedWeights(rows, columns, masks, values, starts.to(torch.int32), multipliers)


def packed_bytes(
    rows: int, columns: int, dtype: torch.dtype, *, is_int4: bool = False, num_values: int | None = None
) -> int:
    """What `pack` makes of weights of this type, at most or of so many values: of INT4 pairs of them."""
    panels, steps = _grid(rows, columns)
    most = panels * steps * STEP_WEIGHTS // (2 if is_int4 else 1)
    value_bytes = (most if num_values is None else min(most, num_values)) * dtype.itemsize
    step_bytes = STEP_WEIGHTS // 8 + START_BYTES + (PANEL_ROWS if is_int4 else 0)
    return panels * steps * step_bytes + START_BYTES + round_up(value_bytes, BLOCK_BYTES)


def packing_bytes(
    rows: int, columns: int, dtype: torch.dtype, *, is_int4: bool = False, num_values: int | None = None
) -> int:
    """What `pack` takes at most beside the weights: what it makes, and what it looks at at once."""
    panels, steps = _grid(rows, columns)
    weights = min(panels, _panels_at_once(steps)) * steps * STEP_WEIGHTS
    live = weights if num_values is None else min(weights, num_values * (2 if is_int4 else 1))
    made = packed_bytes(rows, columns, dtype, is_int4=is_int4, num_values=num_values)
    return made + COUNTING_BYTES * panels * steps + CHUNK_BYTES * weights + LIVE_BYTES * live


def count_nonzero(w_NK: Tensor) -> int:
    """Of as many weights at once as `pack` looks at: on a GPU torch counts in int64, one for each."""
    at_once = _panels_at_once(_grid(*w_NK.shape)[1]) * PANEL_ROWS
    return int(sum(torch.count_nonzero(it) for it in w_NK.split(at_once)))


def padded(w_NK: Tensor) -> Tensor:
    """[P x 16, S x 128]: the weights, and zeros up to whole panels and steps."""
    rows, columns = w_NK.shape
    return pad(w_NK, (0, -columns % STEP_INPUTS, 0, -rows % PANEL_ROWS))


def padded_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    """What `padded` takes."""
    panels, steps = _grid(rows, columns)
    return panels * steps * STEP_WEIGHTS * dtype.itemsize


def unpacked(packed: PackedWeights) -> Tensor:
    """int8 or bfloat16 [N, K]: what was packed; of INT4 the int8 weights, nibbles times multipliers."""
    panels, steps, lanes = packed.masks.shape
    places = torch.arange(8, dtype=torch.uint8, device=packed.masks.device)
    live = (packed.masks.view(torch.uint8).unsqueeze(-1) >> places & 1).flatten().bool()
    values = packed.values[: int(packed.starts[-1])]
    if packed.multipliers is not None:
        values = _singles(values, live.view(panels * steps, 2, -1).sum(dim=2))
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


def _grid(rows: int, columns: int) -> tuple[int, int]:
    """Panels and steps."""
    return -(-rows // PANEL_ROWS), -(-columns // STEP_INPUTS)


def _panels_at_once(steps: int) -> int:
    return max(1, CHUNK_WEIGHTS // (steps * STEP_WEIGHTS))


def _run_lengths(w_NK: Tensor, steps: int) -> Tensor:
    """int64 [panels x S, 2]: how many weights of each half of a step's vectors are not zero."""
    live = _whole(w_NK).view(-1, PANEL_ROWS, steps, 2, STEP_INPUTS // 2) != 0
    in_rows = live.view(torch.uint8).sum(dim=4, dtype=torch.uint8)  # of booleans torch makes int64 first
    return in_rows.sum(dim=1).flatten(0, 1)


def _pack_panels(w_NK: Tensor, masks: Tensor, lengths: Tensor | None, values: Tensor) -> None:
    """Fill in masks int64 [panels, S, 32] and values; of INT4 these are pairs of runs of such lengths."""
    vectors = _in_vectors(w_NK)
    live = vectors != 0
    masks.view(torch.uint8).view(-1).copy_(live.view(torch.int64).mul(TOP_BITS).bitwise_right_shift_(56))
    if lengths is None:
        torch.index_select(vectors, 0, _places(live), out=values)
        return
    weights = vectors[_places(live)]
    del vectors, live
    joined, in_pair = _pairs(weights, lengths)
    torch.index_select(joined.view(-1), 0, _places(in_pair), out=values)


def _in_vectors(w_NK: Tensor) -> Tensor:
    """All weights in a row, vector by vector."""
    whole, inputs = _whole(w_NK), STEP_INPUTS // STEP_VECTORS
    return whole.view(len(whole) // PANEL_ROWS, PANEL_ROWS, -1, inputs).transpose(1, 2).flatten()


def _whole(w_NK: Tensor) -> Tensor:
    """`padded`, which copies, where there is something to pad."""
    rows, columns = w_NK.shape
    return padded(w_NK) if rows % PANEL_ROWS or columns % STEP_INPUTS else w_NK


def _places(chosen: Tensor) -> Tensor:
    """int64: which of all in a row are chosen; a mask as an index makes such numbers for each dimension."""
    return chosen.view(-1).nonzero().view(-1)


def _pairs(weights: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 and bool [steps, 1024]: INT4 weights of runs of such lengths in pairs, and which are pairs."""
    in_front, in_pair = _fronts(lengths)
    front = in_front.to(torch.uint8)
    front.view(-1).index_copy_(0, _places(in_front), weights.view(torch.uint8))
    return (front[:, 1] << 4).bitwise_or_(front[:, 0].bitwise_and_(15)), in_pair


def _singles(values: Tensor, lengths: Tensor) -> Tensor:
    """int8, one by one: those of which `_pairs` makes such bytes."""
    in_front, in_pair = _fronts(lengths)
    joined = torch.zeros(in_pair.shape, dtype=torch.uint8, device=values.device)
    joined[in_pair] = values
    return torch.stack([joined << 4, joined], 1).view(torch.int8)[in_front] >> 4


def _fronts(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Of each run as many places, from its first, as it is long; and of each step, as the longer run is."""
    places = torch.arange(STEP_WEIGHTS // 2, device=lengths.device)
    return places < lengths.unsqueeze(2), places < lengths.amax(1, keepdim=True)
