"""Rotary position embeddings: the angle that each pair of numbers turns by per position.

inverse_e = theta^(-2 e / E)        stretched for longer contexts by `linear` or `llama3`
"""

import math

import numpy as np

from gossamer.architecture.rope import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """float32 [E/2]: the angle per position, as transformers computes it."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    inverse = (1.0 / np.float32(rope.theta) ** exponents.astype(np.float32)).astype(np.float32)
    if rope.kind == "linear":
        return inverse / np.float32(rope.factor)
    return _llama3(rope, inverse) if rope.kind == "llama3" else inverse


def _llama3(rope: Rope, inverse: np.ndarray) -> np.ndarray:
    """Llama 3.1's stretch: long wavelengths divided by `factor`, short ones kept, a ramp between."""
    wavelength = 2 * math.pi / inverse
    low = rope.original_max_position_embeddings / rope.low_freq_factor
    high = rope.original_max_position_embeddings / rope.high_freq_factor
    ramp = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - ramp) * inverse / rope.factor + ramp * inverse
    return np.where(
        wavelength > low, inverse / rope.factor, np.where(wavelength < high, inverse, blended)
    ).astype(np.float32)
