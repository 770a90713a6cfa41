"""How a sparse matrix and its inputs lie in a GPU's memory: what the kernels are tested against.

A vector of a .goss panel of INT8, 16 rows x 4 inputs with a mask bit each, is a column of the fragment that
the instruction `mma.m16n8k32` takes of its first matrix: so the masks and the weights of a stream are moved
apart, and no byte of them changes. bfloat16, which has 16 rows x 2 inputs in a .goss file, lies here as INT8
does. A step is 32 vectors, 128 inputs: what a warp does between two waits. For each step `starts` says where
its weights begin; 32 bits for 2,048 weights.

INT4 has the masks of INT8, and nibbles in pairs: byte i of a step holds the i-th weight of its vectors 0 to
15 in the low nibble, and that of vectors 16 to 31 in the high one; a nibble past the last is 0. (A .goss file
pairs vector with vector, which takes 4% more.) A step is a group of inputs: each row has a multiplier for it.

Shapes: N outputs, K inputs, P panels of 16 outputs, S steps of 128 inputs, T tokens in tiles of 8.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gossamer.errors import UnsupportedError
from gossamer.packed import streams
from gossamer.packed.panels import from_vectors, join_nibbles, round_up, split_nibbles
from gossamer.packed.values import PANEL_ROWS

STEP_VECTORS = 32
STEP_INPUTS = 128
TILE_TOKENS = 8
BLOCK_BYTES = 16  # that a copy moves at once, from a multiple of 16 bytes
MOST_WEIGHTS = (1 << 31) - 1  # that are not zero, as torch's int32 counts them


Values = NDArray[np.int8 | np.uint16 | np.uint8]


@dataclass(frozen=True)
class SparseMatrix:
    """masks uint64 [P, S, 32], zeros past the end; values int8 or (bfloat16) uint16, vector by vector.

    `values` has zeros more, up to a whole block of 16 bytes. `starts`, uint32 [P S + 1], says where each
    step's weights begin, and where the last one's end. Of INT4 values are pairs of nibbles, uint8, and
    multipliers uint8 [P, S, 8, 2] those of rows g and g + 8 side by side, 0 for rows past the end.
    """

    rows: int
    columns: int
    masks: NDArray[np.uint64]
    values: Values
    starts: NDArray[np.uint32]
    multipliers: NDArray[np.uint8] | None = None

    @property
    def num_bytes(self) -> int:
        """What it takes on the device, without its scales."""
        held = (self.masks, self.values, self.starts, self.multipliers)
        return sum(it.nbytes for it in held if it is not None)


def from_stream(
    stream: NDArray[np.uint8], offsets: NDArray[np.uint64], rows: int, columns: int, source: str = "stream"
) -> SparseMatrix:
    """The matrix of a .goss `i8` stream; FormatError as `streams.decode`'s for one that is damaged.

    UnsupportedError where `starts` cannot count the weights.
    """
    masks_PV8, values = streams.split("i8", stream, offsets, rows, columns, source)
    panels, num, _ = masks_PV8.shape
    masks = np.zeros((panels, round_up(num, STEP_VECTORS)), np.uint64)
    masks[:, :num] = np.ascontiguousarray(masks_PV8).view("<u8")[..., 0]
    return _matrix(rows, columns, masks.reshape(panels, -1, STEP_VECTORS), values.view(np.int8))


def from_weights(w_NK: Values, multiplier_NS: NDArray[np.uint8] | None = None) -> SparseMatrix:
    """The matrix of weights int8 [N, K], or the bits of bfloat16 in uint16, whose -0 is a zero as 0 is.

    With multipliers [N, S], 1 to 16, the weights are INT4, -8 to 7.
    """
    if w_NK.dtype == np.int8 and multiplier_NS is None:
        return from_stream(*streams.encode("i8", w_NK), *w_NK.shape)
    rows, columns = w_NK.shape
    whole = np.zeros((round_up(rows, PANEL_ROWS), round_up(columns, STEP_INPUTS)), w_NK.dtype)
    whole[:rows, :columns] = w_NK
    inputs = STEP_INPUTS // STEP_VECTORS
    vectors = whole.reshape(-1, PANEL_ROWS, whole.shape[1] // inputs, inputs).swapaxes(1, 2)
    vectors = vectors.reshape(*vectors.shape[:2], -1)
    live = vectors != 0 if w_NK.dtype == np.int8 else vectors & 0x7FFF != 0
    masks = np.packbits(live, axis=2, bitorder="little").view("<u8").reshape(len(whole) // PANEL_ROWS, -1, 32)
    if multiplier_NS is None:
        return _matrix(rows, columns, masks, vectors[live])
    whole_multipliers = np.zeros((len(whole), multiplier_NS.shape[1]), np.uint8)
    whole_multipliers[:rows] = multiplier_NS
    multipliers = whole_multipliers.reshape(len(masks), 2, PANEL_ROWS // 2, -1).transpose(0, 3, 2, 1)
    return _matrix(rows, columns, masks, _pairs(vectors, masks), np.ascontiguousarray(multipliers))


def weights(matrix: SparseMatrix) -> Values:
    """int8, or bits of bfloat16, [N, K]; FormatError where there are weights beyond it.

    Of INT4 the int8 weights: nibbles times multipliers.
    """
    bits = np.unpackbits(matrix.masks.view(np.uint8), bitorder="little").astype(np.bool_)
    values = matrix.values[: matrix.starts[-1]]
    vectors = np.zeros(bits.size, values.dtype if matrix.multipliers is None else np.int8)
    vectors[bits] = values if matrix.multipliers is None else _singles(values, matrix.masks)
    shape = (len(matrix.masks), -1, PANEL_ROWS, STEP_INPUTS // STEP_VECTORS)
    if matrix.multipliers is not None:
        in_rows = matrix.multipliers.swapaxes(2, 3).reshape(len(matrix.masks), -1, 1, PANEL_ROWS, 1)
        vectors.reshape(*matrix.masks.shape, PANEL_ROWS, -1)[...] *= in_rows.view(np.int8)
    return from_vectors(vectors.reshape(shape), matrix.rows, matrix.columns, "matrix")


def concatenated(matrices: Sequence[SparseMatrix]) -> SparseMatrix:
    """Matrices of the same inputs under one another, as q, k and v are; whole panels but for the last."""
    rows, columns = sum(it.rows for it in matrices), matrices[0].columns
    if any(it.columns != columns for it in matrices) or any(it.rows % PANEL_ROWS for it in matrices[:-1]):
        found = ", ".join(f"{it.rows} x {it.columns}" for it in matrices)
        raise UnsupportedError(
            f"matrices of {found} do not make one; supported: the same inputs, outputs in {PANEL_ROWS}s"
        )
    values = np.concatenate([it.values[: it.starts[-1]] for it in matrices])
    multipliers = [it.multipliers for it in matrices if it.multipliers is not None]
    whole = np.concatenate(multipliers) if multipliers else None
    return _matrix(rows, columns, np.concatenate([it.masks for it in matrices]), values, whole)


def outputs_of(matrix: SparseMatrix, begin: int, end: int) -> SparseMatrix:
    """Outputs begin .. end of it, both multiples of 16 (or the end the last): a run of panels."""
    _check_border("outputs", begin, end, PANEL_ROWS, matrix.rows)
    first, last = begin // PANEL_ROWS, -(-end // PANEL_ROWS)
    steps = matrix.masks.shape[1]
    values = matrix.values[matrix.starts[first * steps] : matrix.starts[last * steps]]
    multipliers = None if matrix.multipliers is None else matrix.multipliers[first:last]
    return _matrix(end - begin, matrix.columns, matrix.masks[first:last], values, multipliers)


def inputs_of(matrix: SparseMatrix, begin: int, end: int) -> SparseMatrix:
    """Inputs begin .. end of it, both multiples of 128 (or the end the last): runs of steps."""
    _check_border("inputs", begin, end, STEP_INPUTS, matrix.columns)
    first, last = begin // STEP_INPUTS, -(-end // STEP_INPUTS)
    panels, steps = matrix.masks.shape[:2]
    starts = matrix.starts.astype(np.int64)
    kept = np.zeros((panels, steps), np.bool_)
    kept[:, first:last] = True
    values = matrix.values[: starts[-1]][np.repeat(kept.ravel(), np.diff(starts))]
    masks = np.ascontiguousarray(matrix.masks[:, first:last])
    if matrix.multipliers is None:
        return _matrix(matrix.rows, end - begin, masks, values)
    multipliers = np.ascontiguousarray(matrix.multipliers[:, first:last])
    return _matrix(matrix.rows, end - begin, masks, values, multipliers)


def check_number(rows: int, columns: int, number: int) -> None:
    """UnsupportedError where a matrix has more weights than `starts` can count."""
    if number > MOST_WEIGHTS:
        raise UnsupportedError(
            f"a matrix of {rows} x {columns} has {number:,} weights; supported on a GPU: {MOST_WEIGHTS:,}"
        )


def fragments(x_TK: Values) -> NDArray[np.uint32]:
    """uint32 [S, tiles, products, 32, 2]: inputs int8, or bits of bfloat16, [T, K] as the lanes take them.

    Of each step and tile of 8 tokens four products (eight of bfloat16); of each product two words a lane.
    Lane 4 g + t has of token g, of INT8, the inputs 4 t .. 4 t + 3 in the first word, and those 16 further on
    in the second; of bfloat16 the inputs 4 t .. 4 t + 3 in both.
    """
    tokens, inputs = x_TK.shape
    tiles, steps = -(-tokens // TILE_TOKENS), -(-inputs // STEP_INPUTS)
    whole = np.zeros((tiles * TILE_TOKENS, steps * STEP_INPUTS), x_TK.dtype)
    whole[:tokens, :inputs] = x_TK
    if x_TK.dtype == np.int8:
        tile_g_step_product_half_t = whole.reshape(tiles, TILE_TOKENS, steps, 4, 2, 4, 4)
        ordered = tile_g_step_product_half_t.transpose(2, 0, 3, 1, 5, 4, 6)
    else:
        ordered = whole.reshape(tiles, TILE_TOKENS, steps, 8, 4, 4).transpose(2, 0, 3, 1, 4, 5)
    return np.ascontiguousarray(ordered).view(np.uint32).reshape(steps, tiles, -1, STEP_VECTORS, 2)


def _run_lengths(masks: NDArray[np.uint64]) -> NDArray[np.int64]:
    """[P S, 2]: how many weights of INT4 the vectors of each half of a step have."""
    return np.bitwise_count(masks).reshape(-1, 2, STEP_VECTORS // 2).sum(axis=2, dtype=np.int64)


def _pairs(vectors: Values, masks: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Bytes of the weights of vectors [P, S 32, 64], step after step."""
    lengths, place = _run_lengths(masks), np.arange(PANEL_ROWS * STEP_INPUTS // 2)
    runs = vectors.reshape(len(lengths), 2, -1)
    front = np.zeros_like(runs)
    front[place < lengths[..., None]] = runs[runs != 0]
    return join_nibbles(front[:, 0], front[:, 1])[place < lengths.max(axis=1, keepdims=True)]


def _singles(values: Values, masks: NDArray[np.uint64]) -> NDArray[np.int8]:
    """The weights of such bytes, vector after vector."""
    lengths, place = _run_lengths(masks), np.arange(PANEL_ROWS * STEP_INPUTS // 2)
    joined = np.zeros((len(lengths), place.size), np.uint8)
    joined[place < lengths.max(axis=1, keepdims=True)] = values
    return np.stack(split_nibbles(joined), axis=1)[place < lengths[..., None]]


def _matrix(
    rows: int,
    columns: int,
    masks: NDArray[np.uint64],
    values: Values,
    multipliers: NDArray[np.uint8] | None = None,
) -> SparseMatrix:
    if multipliers is None:
        counts = np.bitwise_count(masks).sum(axis=2, dtype=np.int64).ravel()
    else:
        counts = _run_lengths(masks).max(axis=1)
    check_number(rows, columns, int(counts.sum()))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32)
    whole = np.zeros(round_up(values.size, BLOCK_BYTES // values.itemsize), values.dtype)
    whole[: values.size] = values
    return SparseMatrix(rows, columns, masks, whole, starts, multipliers)


def _check_border(what: str, begin: int, end: int, multiple: int, size: int) -> None:
    if begin % multiple or (end % multiple and end != size) or not 0 <= begin < end <= size:
        raise UnsupportedError(
            f"{what} {begin} to {end} of {size} are no whole pieces; supported: multiples of {multiple}"
        )
