"""Magnitude pruning: the weights nearest to zero go, whatever their inputs. The baseline of every paper."""

from torch import Tensor

from gossamer.compress.pattern import Pattern
from gossamer.compress.sparsegpt import smallest


def magnitude(w_NK: Tensor, sparsity: float, *, pattern: Pattern | None = None) -> Tensor:
    """Return W [N, K] with round(sparsity N K) zeros, or as many as it came with where these are more.

    With a pattern that fixes the sparsity, `sparsity` is the pattern's.
    """
    if pattern:
        return w_NK.masked_fill(pattern.choose(w_NK.square(), w_NK == 0, sparsity), 0.0)
    count = max(round(sparsity * w_NK.numel()), int((w_NK == 0).sum()))
    return w_NK.masked_fill(smallest(w_NK.abs(), count), 0.0)
