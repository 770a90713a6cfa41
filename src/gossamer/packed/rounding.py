"""Float weights rounded to the integers that a .goss file stores, to nearest: no text, no Hessian.

    int8    w = q s_n              q from -127 to 127, s_n = max |row| / 127
    int4    w = q m_ng s_n         q from -8 to 7, a multiplier m from 1 to 16 for each 128 inputs

The scale of an int4 row is the least with which its largest weights fit under the multiplier 16: 7 x 16 times
the scale upwards, 8 x 16 times downwards. Each group then takes the multiplier with the least squared error,
which may clip its largest weights. Zeros stay zeros.

Shapes: N outputs, K inputs, G groups of 128 inputs.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gossamer.packed.panels import MAX_MULTIPLIER, MULTIPLIER_INPUTS, multiply_groups, panel_chunks

Rounded = Literal["i8", "i4"]

_LOWEST, _HIGHEST = -8, 7  # of an int4 number
_TRIED = 7  # multipliers that are tried: the least that clips nothing, and smaller ones


@dataclass(frozen=True, eq=False)
class RoundedMatrix:
    """Integers [N, K] with scales [N], and multipliers [N, G] where the integers are int4 (else None).

    `row_errors` are |rounded - w| / |w| of the rows, 0 for a row of zeros, and `error` is that of the whole.
    """

    q_NK: np.ndarray
    scale_N: np.ndarray
    multiplier_NG: np.ndarray | None
    row_errors: np.ndarray
    error: float

    @property
    def whole_NK(self) -> np.ndarray:
        """The int8 weights that the kernels see: int4 ones times their multipliers."""
        return self.q_NK if self.multiplier_NG is None else multiply_groups(self.q_NK, self.multiplier_NG)


def round_rows(w_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round float32 weights to int8 [N, K], scales [N] = max |row| / 127; a row of zeros has scale 0."""
    scale_N = np.abs(w_NK).max(axis=1) / np.float32(127)
    divisor_N1 = _divisor(scale_N)[:, None]
    return np.clip(np.rint(w_NK / divisor_N1), -127, 127).astype(np.int8), scale_N


def round_groups(w_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round float32 weights to int4 [N, K], with multipliers uint8 [N, G] and scales float32 [N]."""
    rows, columns = w_NK.shape
    highest_N, lowest_N = w_NK.max(axis=1, initial=0), w_NK.min(axis=1, initial=0)
    reach = np.float32(MAX_MULTIPLIER)
    scale_N = np.maximum(highest_N / (_HIGHEST * reach), lowest_N / (_LOWEST * reach)).astype(np.float32)
    groups = -(-columns // MULTIPLIER_INPUTS)
    padded_NK = np.pad(w_NK, ((0, 0), (0, groups * MULTIPLIER_INPUTS - columns)))
    x_NGJ = padded_NK.reshape(rows, groups, MULTIPLIER_INPUTS) / _divisor(scale_N)[:, None, None]
    needed_NG = np.ceil(np.maximum(x_NGJ.max(axis=2) / _HIGHEST, x_NGJ.min(axis=2) / _LOWEST))
    best_NG = np.full((rows, groups), np.inf, np.float32)
    q_NGJ, multiplier_NG = np.zeros(x_NGJ.shape, np.int8), np.ones((rows, groups), np.uint8)
    for less in range(_TRIED):
        tried_NG = np.clip(needed_NG - less, 1, MAX_MULTIPLIER).astype(np.float32)
        found_NGJ = np.clip(np.rint(x_NGJ / tried_NG[..., None]), _LOWEST, _HIGHEST)
        error_NG = np.square(found_NGJ * tried_NG[..., None] - x_NGJ).sum(axis=2)
        better_NG = error_NG < best_NG
        best_NG[better_NG], multiplier_NG[better_NG] = error_NG[better_NG], tried_NG[better_NG]
        q_NGJ[better_NG] = found_NGJ[better_NG]
    return q_NGJ.reshape(rows, -1)[:, :columns], multiplier_NG, scale_N


def round_matrix(
    values: Rounded, shape: tuple[int, int], read: Callable[[int, int], np.ndarray]
) -> RoundedMatrix:
    """Round a matrix some rows at a time: `read` gives rows [begin, end) as float32."""
    pieces = list(_round_pieces(values, shape, read))
    q, scales, multipliers, squares, totals = zip(*pieces, strict=True)
    square_N, total_N = np.concatenate(squares), np.concatenate(totals)
    total = float(total_N.sum())
    return RoundedMatrix(
        q_NK=np.concatenate(q),
        scale_N=np.concatenate(scales),
        multiplier_NG=np.concatenate(multipliers) if values == "i4" else None,
        row_errors=np.sqrt(np.divide(square_N, total_N, out=np.zeros_like(square_N), where=total_N > 0)),
        error=math.sqrt(float(square_N.sum()) / total) if total else 0.0,
    )


def _round_pieces(
    values: Rounded, shape: tuple[int, int], read: Callable[[int, int], np.ndarray]
) -> Iterator[tuple[np.ndarray, ...]]:
    """Of some rows: integers, scales, multipliers (none of int8), squares [N] of errors and of weights."""
    for begin, end in panel_chunks(*shape):
        w_NK = read(begin, end)
        if values == "i4":
            q_NK, multiplier_NG, scale_N = round_groups(w_NK)
            whole_NK = multiply_groups(q_NK, multiplier_NG)
        else:
            q_NK, scale_N = round_rows(w_NK)
            whole_NK, multiplier_NG = q_NK, np.zeros((0, 0), np.uint8)
        off_NK = whole_NK * scale_N[:, None] - w_NK
        yield q_NK, scale_N, multiplier_NG, _squares(off_NK), _squares(w_NK)


def _squares(x_NK: np.ndarray) -> np.ndarray:
    return np.square(x_NK).sum(axis=1, dtype=np.float64)


def _divisor(scale_N: np.ndarray) -> np.ndarray:
    return np.where(scale_N > 0, scale_N, np.float32(1))
