"""Patterns of zeros: of each M weights that follow one another along the input, N stay (N:M sparsity).

"2:4" keeps 2 of each 4 weights of an output, and "16:64" keeps 16 of each 64, as hardware vendors count; the
code of SparseGPT and Wanda counts the zeros instead. Where more than M - N of a group are zero when they come
in, they all stay zero, and the group has fewer than N weights left.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.compress.hessian import fix_rows
from gossamer.errors import ConfigError


@dataclass(frozen=True)
class Pattern:
    """At most `kept` nonzero weights in each group of `size` inputs of an output."""

    kept: int
    size: int

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.size

    def choose(self, saliency_NK: Tensor, zeros_NK: Tensor, share: float = 1.0) -> Tensor:
        """Boolean mask [N, K], True at `zeros_NK` and at the smallest of each group.

        With a lower `share`, only that share of the M - N zeros of a group is chosen, rounded.
        """
        groups = saliency_NK.masked_fill(zeros_NK, -1.0).reshape(len(saliency_NK), -1, self.size)
        count = round(share * (self.size - self.kept))
        indices = groups.topk(count, largest=False, sorted=False).indices
        return (
            torch.zeros_like(groups, dtype=torch.bool).scatter_(2, indices, True).view_as(zeros_NK) | zeros_NK
        )

    def fix(self, w_BN: Tensor, u_BB: Tensor, zeros_BN: Tensor) -> Tensor:
        """As `fix_rows`, group after group: a group's zeros are chosen when the sweep has come to it.

        That is SparseGPT's way, because the weights have made up for all inputs before them by then.
        """
        errors = []
        for start in range(0, len(w_BN), self.size):
            group = slice(start, start + self.size)
            u_GG = u_BB[group, group]
            saliency_GN = (w_BN[group] / u_GG.diagonal()[:, None]).square()
            pruned_GN = self.choose(saliency_GN.T, zeros_BN[group].T).T
            errors.append(fix_rows(w_BN[group], u_GG, ~pruned_GN.contiguous()))
            w_BN[group.stop :].addmm_(u_BB[group, group.stop :].T, errors[-1], alpha=-1)
        return torch.cat(errors)


def parse_pattern(text: str) -> Pattern | None:
    """The pattern of "N:M", None of "unstructured"; raises ConfigError for anything else."""
    if text == "unstructured":
        return None
    found = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise ConfigError(
            f"--pattern is {text}; expected unstructured, or N:M such as 2:4, 4:8 or 16:64, of which N "
            "(at least 1, less than M) says how many of each M weights stay"
        )
    return Pattern(int(found[1]), int(found[2]))
