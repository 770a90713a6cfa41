"""The number types of stored weights: one record each, from which sizes, layouts and limits follow.

The C++ counterpart is `NumberType` in native/base/view.hpp.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Values = Literal["f32", "bf16", "i8", "i4"]

PANEL_ROWS = 16  # output rows that are stored together


@dataclass(frozen=True)
class NumberType:
    """How weights of one type are stored.

    `dtype` is a weight in memory: bfloat16 as its bit pattern, int4 as int8. `stored` is safetensors' word
    for dense panels. `largest` is the largest magnitude of an integer weight as the kernels see it (int4
    times its multiplier fills int8), None for floats, which need no scales. Two vectors of a `paired` type
    share 64 bytes, a nibble each.
    """

    name: Values
    bits: int
    inputs_per_vector: int
    dtype: np.dtype
    stored: str
    largest: int | None = None
    paired: bool = False

    @property
    def integer(self) -> bool:
        """Whether the product is one of int8 numbers, with row scales and rounded activations."""
        return self.largest is not None

    @property
    def vector_weights(self) -> int:
        """Weights of a vector: 16 rows of its inputs."""
        return PANEL_ROWS * self.inputs_per_vector

    @property
    def mask_bytes(self) -> int:
        """Bytes of a vector's mask, a bit a weight."""
        return self.vector_weights // 8

    @property
    def word(self) -> np.dtype:
        """Unsigned integers as wide as a weight in memory."""
        return np.dtype(f"<u{self.dtype.itemsize}")

    @property
    def magnitude(self) -> int:
        """The bits of a word that -0.0 has not set: a weight is zero when none of them is."""
        bits = 8 * self.dtype.itemsize
        return (1 << bits) - 1 if self.integer else (1 << bits - 1) - 1


NUMBER_TYPES: dict[str, NumberType] = {
    "f32": NumberType("f32", 32, 1, np.dtype("<f4"), "F32"),
    "bf16": NumberType("bf16", 16, 2, np.dtype("<u2"), "BF16"),
    "i8": NumberType("i8", 8, 4, np.dtype("i1"), "I8", largest=127),
    "i4": NumberType("i4", 4, 4, np.dtype("i1"), "U8", largest=127, paired=True),
}
