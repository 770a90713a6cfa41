"""Patterns of zeros: which weights become zero together, or in which company they stay.

`Groups` (N:M sparsity): of each M weights that follow one another along the input, N stay. "2:4" keeps 2 of
each 4 weights of an output, and "16:64" keeps 16 of each 64, as hardware vendors count; the code of SparseGPT
and Wanda counts the zeros instead. Where more than M - N of a group are zero when they come in, they all stay
zero, and the group has fewer than N weights left.

`Blocks` (1xM): M weights that follow one another along the input stay or go as one, wherever in the matrix.
"1x4" is what products of bytes can skip: an instruction multiplies 4 inputs at a time. What a block is worth
is the sum over its weights of what each is worth by itself.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gossamer.compress.hessian import fix_rows
from gossamer.compress.sparsegpt import smallest
from gossamer.errors import ConfigError, UnsupportedError


class Pattern(Protocol):
    """Weights [N, K] are looked at in groups of `size` inputs of an output; K is a multiple of it."""

    @property
    def size(self) -> int: ...

    @property
    def sparsity(self) -> float | None:
        """The share of zeros that the pattern itself fixes, if it does."""
        ...

    def choose(self, saliency_NK: Tensor, zeros_NK: Tensor, sparsity: float, share: float = 1.0) -> Tensor:
        """Boolean mask [N, K], True at `zeros_NK` and at what is least, of squares, of the rest.

        `saliency_NK` is the square of what a weight is worth. With a lower `share`, only that share of the
        zeros that are missing is chosen, rounded.
        """
        ...

    def fix(self, w_BN: Tensor, u_BB: Tensor, zeros_BN: Tensor, quota: int) -> Tensor:
        """As `fix_rows` of B inputs, of which as many become zero as the pattern has, or `quota` says."""
        ...


@dataclass(frozen=True)
class Groups:
    """At most `kept` nonzero weights in each group of `size` inputs of an output."""

    kept: int
    size: int

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.size

    def choose(self, saliency_NK: Tensor, zeros_NK: Tensor, sparsity: float, share: float = 1.0) -> Tensor:
        """The smallest of each group; `sparsity` is the pattern's own."""
        groups = saliency_NK.masked_fill(zeros_NK, -1.0).reshape(len(saliency_NK), -1, self.size)
        count = round(share * (self.size - self.kept))
        indices = groups.topk(count, largest=False, sorted=False).indices
        return (
            torch.zeros_like(groups, dtype=torch.bool).scatter_(2, indices, True).view_as(zeros_NK) | zeros_NK
        )

    def fix(self, w_BN: Tensor, u_BB: Tensor, zeros_BN: Tensor, quota: int) -> Tensor:
        """Group after group: a group's zeros are chosen when the sweep has come to it.

        That is SparseGPT's way, because the weights have made up for all inputs before them by then.
        """
        errors = []
        for start in range(0, len(w_BN), self.size):
            group = slice(start, start + self.size)
            u_GG = u_BB[group, group]
            saliency_GN = (w_BN[group] / u_GG.diagonal()[:, None]).square()
            pruned_GN = self.choose(saliency_GN.T, zeros_BN[group].T, self.sparsity).T
            errors.append(fix_rows(w_BN[group], u_GG, ~pruned_GN.contiguous()))
            w_BN[group.stop :].addmm_(u_BB[group, group.stop :].T, errors[-1], alpha=-1)
        return torch.cat(errors)


@dataclass(frozen=True)
class Blocks:
    """Blocks of `size` inputs of an output that are all zero, or not; the share of them is free.

    A block that comes with some zeros keeps them where it stays. So there are as many zeros as asked for, to
    half a block, and those zeros beside.
    """

    size: int
    sparsity = None

    def choose(self, saliency_NK: Tensor, zeros_NK: Tensor, sparsity: float, share: float = 1.0) -> Tensor:
        """The blocks of the smallest sums."""
        empty = self._empty(zeros_NK)
        before = int(empty.sum())
        after = max(before, round(sparsity * empty.numel()))
        return self._smallest(saliency_NK, zeros_NK, empty, before + round(share * (after - before)))

    def fix(self, w_BN: Tensor, u_BB: Tensor, zeros_BN: Tensor, quota: int) -> Tensor:
        """All at once, by what the weights are before the first is fixed."""
        saliency_BN = (w_BN / u_BB.diagonal()[:, None]).square()
        empty = self._empty(zeros_BN.T)
        num_blocks = max(round(quota / self.size), int(empty.sum()))
        pruned_NB = self._smallest(saliency_BN.T, zeros_BN.T, empty, num_blocks)
        return fix_rows(w_BN, u_BB, ~pruned_NB.T.contiguous())

    def _empty(self, zeros_NK: Tensor) -> Tensor:
        """Boolean [N, K / size], True at blocks that have no weight."""
        return zeros_NK.reshape(len(zeros_NK), -1, self.size).all(2)

    def _smallest(self, saliency_NK: Tensor, zeros_NK: Tensor, empty: Tensor, num_blocks: int) -> Tensor:
        worth = saliency_NK.masked_fill(zeros_NK, 0.0).reshape(*empty.shape, self.size).sum(2)
        chosen = smallest(worth.masked_fill(empty, -1.0), num_blocks)
        return chosen.repeat_interleave(self.size, 1) | zeros_NK


def check_fits(
    pattern: Pattern, text: str, names: Sequence[str], shapes: Mapping[str, Sequence[int]]
) -> None:
    """Raise UnsupportedError for a matrix [N, K] of `names` whose rows `text` does not divide."""
    for name, width in ((it, shapes[f"{it}.weight"][1]) for it in names):
        if width % pattern.size:
            raise UnsupportedError(
                f"{name} has {width} inputs, of which --pattern {text} makes no whole groups; "
                f"supported: an M that divides {width}"
            )


def parse_pattern(text: str) -> Pattern | None:
    """The pattern of "N:M" or "1xM", None of "unstructured"; raises ConfigError for anything else."""
    if text == "unstructured":
        return None
    if (found := re.fullmatch(r"1x(\d{1,6})", text)) and int(found[1]) > 1:
        return Blocks(int(found[1]))
    found = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise ConfigError(
            f"--pattern is {text}; expected unstructured; 1xM such as 1x4, of which M (at least 2) says how "
            "many weights go together; or N:M such as 2:4, 4:8 or 16:64, of which N (at least 1, less than "
            "M) says how many of each M weights stay"
        )
    return Groups(int(found[1]), int(found[2]))
