"""How a weight matrix lies in a .goss file: vectors, panels, dense storage (docs/format.md, section 3).

A panel is 16 rows. A vector is 16 rows x I consecutive inputs of one panel, in the order [row][input]: I is 1
for float32, 2 for bfloat16, 4 for int8 and int4 (the order in which an AMX tile and `vpdpbusd` want it). It
takes 64 bytes, or 32 of int4. Rows and inputs are padded with zeros to whole vectors. Dense panels are all
vectors of all panels, one after the other; int4 vectors 2j and 2j + 1 share 64 bytes as low and high nibbles.
The sparse panels are in `streams`.

This file is the specification that the C++ is tested against: NumPy, no loop over weights.

Shapes: N outputs, K inputs, P panels, V vectors of a panel, I inputs of a vector, G groups of 128 inputs.
"""

from collections.abc import Iterator

import numpy as np

from gossamer.errors import FormatError
from gossamer.packed.values import NUMBER_TYPES, PANEL_ROWS

VECTOR_BYTES = 64
ALIGNMENT = 64
MULTIPLIER_INPUTS = 128  # consecutive inputs of a row that share an int4 multiplier
MAX_MULTIPLIER = 16

_CHUNK_WEIGHTS = 1 << 23


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def num_vectors(values: str, columns: int) -> int:
    """V: vectors of a panel of a matrix with so many columns."""
    return -(-columns // NUMBER_TYPES[values].inputs_per_vector)


def panel_shape(values: str, rows: int, columns: int) -> tuple[int, int, int, int]:
    """[P, V, 16, I] of a dense rows x columns matrix; [P, ceil(V / 2), 16, 4] bytes for a paired type."""
    vectors = num_vectors(values, columns)
    stored = -(-vectors // 2) if NUMBER_TYPES[values].paired else vectors
    return -(-rows // PANEL_ROWS), stored, PANEL_ROWS, NUMBER_TYPES[values].inputs_per_vector


def to_vectors(values: str, w_NK: np.ndarray) -> np.ndarray:
    """Vectors [P, V, 16, I] of weights [N, K], in their own dtype."""
    assert w_NK.dtype == NUMBER_TYPES[values].dtype, f"{values} weights are {w_NK.dtype}"
    (rows, columns), inputs = w_NK.shape, NUMBER_TYPES[values].inputs_per_vector
    whole = np.zeros((round_up(rows, PANEL_ROWS), round_up(columns, inputs)), w_NK.dtype)
    whole[:rows, :columns] = w_NK
    vectors_P16VI = whole.reshape(-1, PANEL_ROWS, whole.shape[1] // inputs, inputs)
    return np.ascontiguousarray(vectors_P16VI.transpose(0, 2, 1, 3))


def from_vectors(vectors: np.ndarray, rows: int, columns: int, source: str) -> np.ndarray:
    """Weights [N, K] of vectors [P, V, 16, I]; FormatError when the padding is not zero."""
    whole = vectors.transpose(0, 2, 1, 3).reshape(vectors.shape[0] * PANEL_ROWS, -1)
    if whole[rows:].any() or whole[:, columns:].any():
        raise FormatError(f"{source}: found weights outside its {rows} x {columns} matrix; expected zeros")
    return np.ascontiguousarray(whole[:rows, :columns])


def to_panels(values: str, w_NK: np.ndarray) -> np.ndarray:
    """Dense panels of weights [N, K]: `panel_shape`, uint8 for a paired type."""
    vectors = to_vectors(values, w_NK)
    if not NUMBER_TYPES[values].paired:
        return vectors
    even = np.pad(vectors, ((0, 0), (0, vectors.shape[1] % 2), (0, 0), (0, 0)))
    return join_nibbles(even[:, ::2], even[:, 1::2])


def from_panels(
    values: str, panels: np.ndarray, rows: int, columns: int, source: str = "panels"
) -> np.ndarray:
    """Weights [N, K] of dense panels; FormatError when the padding is not zero."""
    if NUMBER_TYPES[values].paired:
        num_panels, stored, _, _ = panels.shape
        both = np.stack(split_nibbles(panels), axis=2)
        panels = both.reshape(num_panels, 2 * stored, PANEL_ROWS, 4)
    return from_vectors(panels, rows, columns, source)


def join_nibbles(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """uint8 of two int8 arrays with numbers from -8 to 7."""
    return low.view(np.uint8) & np.uint8(15) | high.view(np.uint8) << 4


def split_nibbles(joined: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two int8 arrays, low and high nibbles, whose numbers are in a uint8 array."""
    return (joined << 4).view(np.int8) >> 4, joined.view(np.int8) >> 4


def num_multipliers(rows: int, columns: int) -> int:
    """Bytes of the int4 multipliers: one a row and group of 128 inputs, padded to 64."""
    groups = -(-columns // MULTIPLIER_INPUTS)
    return round_up(round_up(rows, PANEL_ROWS) * groups, ALIGNMENT)


def to_multipliers(multiplier_NG: np.ndarray) -> np.ndarray:
    """Stored order, [panel][group of inputs][16 rows] with zeros for padding, of int4 multipliers 1 to 16."""
    rows, groups = multiplier_NG.shape
    whole = np.zeros((round_up(rows, PANEL_ROWS), groups), np.uint8)
    whole[:rows] = multiplier_NG
    flat = whole.reshape(-1, PANEL_ROWS, groups).transpose(0, 2, 1).reshape(-1)
    return padded(flat, ALIGNMENT)


def from_multipliers(stored: np.ndarray, rows: int, columns: int, source: str = "multipliers") -> np.ndarray:
    """uint8 [N, G] of stored int4 multipliers; FormatError unless 1 to 16, and 0 in the padding."""
    groups, padded_rows = -(-columns // MULTIPLIER_INPUTS), round_up(rows, PANEL_ROWS)
    flat, rest = stored[: padded_rows * groups], stored[padded_rows * groups :]
    whole = flat.reshape(-1, groups, PANEL_ROWS).transpose(0, 2, 1).reshape(padded_rows, groups)
    found = whole[:rows]
    if rest.any() or whole[rows:].any() or (found < 1).any() or (found > MAX_MULTIPLIER).any():
        raise FormatError(
            f"{source}: int4 multipliers must be from 1 to {MAX_MULTIPLIER}, and 0 in the padding"
        )
    return np.ascontiguousarray(found)


def multiply_groups(q_NK: np.ndarray, multiplier_NG: np.ndarray) -> np.ndarray:
    """int8 [N, K] weights of int4 ones: each times the multiplier of its row and group of 128 inputs."""
    factor_NK = np.repeat(multiplier_NG.astype(np.int8), MULTIPLIER_INPUTS, axis=1)
    return q_NK * factor_NK[:, : q_NK.shape[1]]


def panel_chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Row ranges [begin, end) of whole panels, a few million weights each: the unit of all larger work."""
    step = max(1, _CHUNK_WEIGHTS // (PANEL_ROWS * max(columns, 1))) * PANEL_ROWS
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def count_nonzero(w_NK: np.ndarray) -> int:
    """Weights that are not zero; -0.0 is zero, in bfloat16 bit patterns (uint16) too."""
    if w_NK.dtype == np.uint16:
        parts = np.array_split(w_NK, -(-w_NK.size // (1 << 24)))
        return sum(int(np.count_nonzero(part & 0x7FFF)) for part in parts)
    return int(np.count_nonzero(w_NK))


def padded(vector: np.ndarray, multiple: int) -> np.ndarray:
    """The vector with zeros up to a multiple of so many entries."""
    return np.pad(vector, (0, -vector.size % multiple))
