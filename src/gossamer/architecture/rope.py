"""What a model says of its rotary position embeddings; frequencies.py makes numbers of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gossamer.architecture.config import Config

if TYPE_CHECKING:
    from gossamer.architecture.frequencies import Stretch


@dataclass(frozen=True)
class Rope:
    """Base of the frequencies, and how they are stretched for longer contexts (None: not at all)."""

    theta: float
    stretch: "Stretch | None" = None

    @classmethod
    def read(cls, config: Config) -> "Rope":
        """transformers 5 writes `rope_parameters`; where older files' `rope_scaling` is, that prevails."""
        settings = (
            config.section("rope_scaling") or config.section("rope_parameters") or Config({}, config.source)
        )
        for place in (config, settings):
            place.expect(partial_rotary_factor=1.0, full_attention=None, sliding_attention=None)
        theta = settings.number("rope_theta", config.number("rope_theta", 10000.0))
        kind = settings.get("rope_type") or settings.get("type") or "default"
        if kind == "default":
            return cls(theta)
        from gossamer.architecture.frequencies import read_stretch

        return cls(theta, read_stretch(kind, settings, config, theta))
