"""Rotary position embeddings: the angle that each pair of numbers turns by per position.

    inverse_e = theta^(-2 e / E)

Models are taught longer contexts by stretching these frequencies (transformers' modeling_rope_utils.py):

    linear    inverse / factor
    llama3    long wavelengths divided by `factor`, short ones kept, a ramp between (Llama 3.1)
    yarn      the same with a ramp over e, cosines and sines multiplied by a scale (arXiv 2309.00071)
    dynamic   inverse, within the context of the configuration; beyond it, where transformers changes all
              frequencies with each further token, the engine does not go
"""

import math
from dataclasses import dataclass
from typing import ClassVar, get_args

import numpy as np

from gossamer.architecture.config import Config
from gossamer.architecture.rope import Rope
from gossamer.errors import CheckpointError, UnsupportedError


@dataclass(frozen=True)
class Linear:
    """All frequencies divided by `factor`."""

    kind: ClassVar[str] = "linear"
    factor: float

    @classmethod
    def read(cls, settings: Config, config: Config) -> "Linear":
        return cls(settings.number("factor"))

    def apply(self, inverse_E: np.ndarray, theta: float) -> np.ndarray:
        return inverse_E / np.float32(self.factor)


@dataclass(frozen=True)
class Dynamic:
    """Frequencies as they are, for contexts of at most `max_position_embeddings`."""

    kind: ClassVar[str] = "dynamic"
    factor: float

    @classmethod
    def read(cls, settings: Config, config: Config) -> "Dynamic":
        return cls(settings.number("factor"))

    def apply(self, inverse_E: np.ndarray, theta: float) -> np.ndarray:
        return inverse_E


@dataclass(frozen=True)
class Llama3:
    """Wavelengths above original / low_freq_factor are stretched, those below original / high not."""

    kind: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    @classmethod
    def read(cls, settings: Config, config: Config) -> "Llama3":
        low, high = (settings.number(f"{which}_freq_factor") for which in ("low", "high"))
        if low == high:
            raise CheckpointError(
                f"{config.source}: low_freq_factor and high_freq_factor are equal; expected a range"
            )
        return cls(settings.number("factor"), low, high, original_length(settings, config))

    def apply(self, inverse_E: np.ndarray, theta: float) -> np.ndarray:
        wavelength = 2 * math.pi / inverse_E
        low = self.original_max_position_embeddings / self.low_freq_factor
        high = self.original_max_position_embeddings / self.high_freq_factor
        ramp = (self.original_max_position_embeddings / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blended = (1 - ramp) * inverse_E / self.factor + ramp * inverse_E
        return np.where(
            wavelength > low, inverse_E / self.factor, np.where(wavelength < high, inverse_E, blended)
        )


@dataclass(frozen=True)
class Yarn:
    """Pairs that turn more than `beta_fast` times in the original context keep their frequency.

    Those that turn less than `beta_slow` times are divided by `factor`. `truncate`: the ramp between begins
    and ends at whole pairs. `scale` multiplies cosines and sines, and so scores by its square.
    """

    kind: ClassVar[str] = "yarn"
    factor: float
    scale: float
    beta_fast: float
    beta_slow: float
    truncate: bool
    original_max_position_embeddings: int

    @classmethod
    def read(cls, settings: Config, config: Config) -> "Yarn":
        factor = settings.number("factor")
        return cls(
            factor,
            settings.number("attention_factor", _yarn_scale(factor, settings)),
            settings.number("beta_fast", 32),
            settings.number("beta_slow", 1),
            settings.flag("truncate", True),
            original_length(settings, config),
        )

    def apply(self, inverse_E: np.ndarray, theta: float) -> np.ndarray:
        begin, end = (
            len(inverse_E)
            * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi))
            / math.log(theta)
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            begin, end = float(math.floor(begin)), float(math.ceil(end))
        begin, end = max(begin, 0.0), min(end, 2.0 * len(inverse_E) - 1)
        ramp = (np.arange(len(inverse_E)) - begin) / (end - begin if end != begin else 0.001)
        stretched = np.clip(ramp, 0, 1)
        return inverse_E / self.factor * stretched + inverse_E * (1 - stretched)


def _yarn_scale(factor: float, settings: Config) -> float:
    """0.1 ln(factor) + 1, or the quotient of two such numbers where the model says how both are weighted."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return scale(settings.number("mscale")) / scale(settings.number("mscale_all_dim"))
    return scale(1)


Stretch = Linear | Llama3 | Yarn | Dynamic
KINDS: dict[str, type[Stretch]] = {stretch.kind: stretch for stretch in get_args(Stretch)}


def read_stretch(kind: object, settings: Config, config: Config, theta: float) -> Stretch:
    """How a configuration stretches frequencies; UnsupportedError for a kind that is not known."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise UnsupportedError(
            f"{config.source}: found rope_type {kind!r}; supported: default, {', '.join(KINDS)}"
        )
    if theta == 1:
        raise CheckpointError(f"{config.source}: rope_theta is 1; expected a larger base for {kind}")
    return KINDS[kind].read(settings, config)


def original_length(settings: Config, config: Config) -> int:
    """How many positions there were before they were stretched; what stands outside `settings` prevails."""
    inside = settings.size("original_max_position_embeddings", config.size("max_position_embeddings", 2048))
    return config.size("original_max_position_embeddings", inside)


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """float32 [E/2]: the angle per position, as transformers computes it."""
    exponents_E = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    inverse_E = (1.0 / np.float32(rope.theta) ** exponents_E.astype(np.float32)).astype(np.float32)
    stretched_E = rope.stretch.apply(inverse_E, rope.theta) if rope.stretch else inverse_E
    return stretched_E.astype(np.float32)


def rotary_scale(rope: Rope) -> float:
    """What cosines and sines are multiplied by."""
    return rope.stretch.scale if isinstance(rope.stretch, Yarn) else 1.0
