"""What a model says of its rotary position embeddings; frequencies.py makes numbers of it."""

from dataclasses import dataclass
from typing import Literal

from gossamer.architecture.config import Config
from gossamer.errors import CheckpointError, UnsupportedError

_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Rope:
    """Base and, for `linear` and `llama3`, how the frequencies are stretched."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: float = 8192

    @classmethod
    def read(cls, config: Config) -> "Rope":
        """transformers 5 writes `rope_parameters`; older files have `rope_theta` and `rope_scaling`.

        Where a file has both, it reads `rope_scaling`.
        """
        settings = (
            config.section("rope_scaling") or config.section("rope_parameters") or Config({}, config.source)
        )
        theta = settings.number("rope_theta", config.number("rope_theta", 10000.0))
        kind = settings.get("rope_type") or settings.get("type") or "default"
        if kind == "default":
            return cls(theta)
        if kind not in ("linear", "llama3"):
            raise UnsupportedError(
                f"{config.source}: found rope_type {kind!r}; supported: default, linear, llama3"
            )
        needed = ("factor",) if kind == "linear" else _LLAMA3_KEYS
        if missing := [key for key in needed if settings.get(key) is None]:
            raise CheckpointError(f"{config.source}: rope_type {kind} lacks {', '.join(missing)}")
        rope = cls(theta, kind, **{key: settings.number(key) for key in needed})
        if kind == "llama3" and rope.low_freq_factor == rope.high_freq_factor:
            raise CheckpointError(
                f"{config.source}: low_freq_factor and high_freq_factor are equal; expected a range"
            )
        return rope
