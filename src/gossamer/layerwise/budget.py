"""Which share of each linear's weights becomes zero, and whether a pattern fixes it."""

from gossamer.checkpoint.directory import Checkpoint
from gossamer.compress.pattern import parse_pattern
from gossamer.errors import ConfigError, UnsupportedError
from gossamer.layerwise.options import PruneOptions


def check_pattern(source: Checkpoint, job: PruneOptions) -> None:
    """Raise ConfigError where options contradict the pattern, UnsupportedError where a width does."""
    if not (pattern := parse_pattern(job.pattern)):
        return
    if abs(job.sparsity - pattern.sparsity) > 5e-7:
        raise ConfigError(
            f"--pattern {job.pattern} fixes the sparsity at {pattern.sparsity:g}, and --sparsity is "
            f"{job.sparsity:g}; give --sparsity {pattern.sparsity:g}, or another pattern"
        )
    for name in source.linears:
        width = source.architecture.tensor_shapes[f"{name}.weight"][1]
        if width % pattern.size:
            raise UnsupportedError(
                f"{name} has {width} inputs, of which --pattern {job.pattern} makes no whole groups; "
                f"supported: an M that divides {width}"
            )
