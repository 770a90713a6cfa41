"""How a sparse matrix and its inputs lie in a GPU's memory: what the kernels are tested against.

A vector of a .goss panel of INT8, 16 rows x 4 inputs with a mask bit each, is a column of the fragment that
the instruction `mma.m16n8k32` takes of its first matrix: so the masks and the weights of a stream are moved
apart, and no byte of them changes. bfloat16, which has 16 rows x 2 inputs in a .goss file, lies here as INT8
does. A step is 32 vectors, 128 inputs: what a warp does between two waits. For each step `starts` says where
its weights begin; 32 bits for 2,048 weights.

Shapes: N outputs, K inputs, P panels of 16 outputs, S steps of 128 inputs, T tokens in tiles of 8.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gossamer.errors import UnsupportedError
from gossamer.packed import streams
from gossamer.packed.panels import from_vectors, round_up
from gossamer.packed.values import PANEL_ROWS

STEP_VECTORS = 32
STEP_INPUTS = 128
TILE_TOKENS = 8
BLOCK_BYTES = 16  # that a copy moves at once, from a multiple of 16 bytes
MOST_WEIGHTS = (1 << 31) - 1  # that are not zero, as torch's int32 counts them


Values = NDArray[np.int8 | np.uint16]


@dataclass(frozen=True)
class SparseMatrix:
    """masks uint64 [P, S, 32], zeros past the end; values int8 or (bfloat16) uint16, vector by vector.

    `values` has zeros more, up to a whole block of 16 bytes. `starts`, uint32 [P S + 1], says where each
    step's weights begin, and where the last one's end.
    """

    rows: int
    columns: int
    masks: NDArray[np.uint64]
    values: Values
    starts: NDArray[np.uint32]

    @property
    def num_bytes(self) -> int:
        """What it takes on the device, without its scales."""
        return self.masks.nbytes + self.values.nbytes + self.starts.nbytes


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


def from_weights(w_NK: Values) -> SparseMatrix:
    """The matrix of weights int8 [N, K], or the bits of bfloat16 in uint16, whose -0 is a zero as 0 is."""
    if w_NK.dtype == np.int8:
        return from_stream(*streams.encode("i8", w_NK), *w_NK.shape)
    rows, columns = w_NK.shape
    whole = np.zeros((round_up(rows, PANEL_ROWS), round_up(columns, STEP_INPUTS)), np.uint16)
    whole[:rows, :columns] = w_NK
    inputs = STEP_INPUTS // STEP_VECTORS
    vectors = whole.reshape(-1, PANEL_ROWS, whole.shape[1] // inputs, inputs).swapaxes(1, 2)
    live = vectors.reshape(*vectors.shape[:2], -1) & 0x7FFF != 0
    masks = np.packbits(live, axis=2, bitorder="little").view("<u8").reshape(len(whole) // PANEL_ROWS, -1, 32)
    return _matrix(rows, columns, masks, vectors.reshape(live.shape)[live])


def weights(matrix: SparseMatrix) -> Values:
    """int8, or bits of bfloat16, [N, K]; FormatError where there are weights beyond it."""
    bits = np.unpackbits(matrix.masks.view(np.uint8), bitorder="little").astype(np.bool_)
    vectors = np.zeros(bits.size, matrix.values.dtype)
    vectors[bits] = matrix.values[: matrix.starts[-1]]
    shape = (len(matrix.masks), -1, PANEL_ROWS, STEP_INPUTS // STEP_VECTORS)
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
    return _matrix(rows, columns, np.concatenate([it.masks for it in matrices]), values)


def outputs_of(matrix: SparseMatrix, begin: int, end: int) -> SparseMatrix:
    """Outputs begin .. end of it, both multiples of 16 (or the end the last): a run of panels."""
    _check_border("outputs", begin, end, PANEL_ROWS, matrix.rows)
    first, last = begin // PANEL_ROWS, -(-end // PANEL_ROWS)
    steps = matrix.masks.shape[1]
    values = matrix.values[matrix.starts[first * steps] : matrix.starts[last * steps]]
    return _matrix(end - begin, matrix.columns, matrix.masks[first:last], values)


def inputs_of(matrix: SparseMatrix, begin: int, end: int) -> SparseMatrix:
    """Inputs begin .. end of it, both multiples of 128 (or the end the last): runs of steps."""
    _check_border("inputs", begin, end, STEP_INPUTS, matrix.columns)
    first, last = begin // STEP_INPUTS, -(-end // STEP_INPUTS)
    panels, steps = matrix.masks.shape[:2]
    starts = matrix.starts.astype(np.int64)
    kept = np.zeros((panels, steps), np.bool_)
    kept[:, first:last] = True
    values = matrix.values[: starts[-1]][np.repeat(kept.ravel(), np.diff(starts))]
    return _matrix(matrix.rows, end - begin, np.ascontiguousarray(matrix.masks[:, first:last]), values)


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


def _matrix(rows: int, columns: int, masks: NDArray[np.uint64], values: Values) -> SparseMatrix:
    counts = np.bitwise_count(masks).sum(axis=2, dtype=np.int64).ravel()
    check_number(rows, columns, int(counts.sum()))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32)
    whole = np.zeros(round_up(values.size, BLOCK_BYTES // values.itemsize), values.dtype)
    whole[: values.size] = values
    return SparseMatrix(rows, columns, masks, whole, starts)


def _check_border(what: str, begin: int, end: int, multiple: int, size: int) -> None:
    if begin % multiple or (end % multiple and end != size) or not 0 <= begin < end <= size:
        raise UnsupportedError(
            f"{what} {begin} to {end} of {size} are no whole pieces; supported: multiples of {multiple}"
        )
