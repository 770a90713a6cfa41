"""Two copies of a model on their way through the layers: the one being changed, and its parent."""

import collections
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from gossamer.compress.target import Evidence, added_to_hidden, read_by_others
from gossamer.layerwise.finite import finite
from gossamer.modules.decoder import Block, in_pieces


@dataclass(frozen=True)
class States:
    """Hidden states [rows, T, D] of the pruned model and of its parent, on their way through the layers.

    `first_row`: which row of the calibration text theirs begin with.
    """

    ours_BTD: Tensor
    parent_BTD: Tensor
    first_row: int = 0

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Both, by what a checkpoint calls them."""
        return {f"{name}.ours": self.ours_BTD, f"{name}.parent": self.parent_BTD}

    def walk(
        self, block: Block, parent: Block, seen: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[tuple[dict[str, nn.Linear], Callable[[], Evidence]]]:
        """Through a layer by groups, with what their inputs (as `seen` by them) and outputs say once."""
        walks = zip(
            block.anatomy.groups, block.walk(self.ours_BTD), parent.follow(self.parent_BTD), strict=True
        )
        for anatomy, (group, inputs), (_, parent_inputs) in walks:
            ours, parents = (finite(pieces, group, self.first_row) for pieces in (inputs, parent_inputs))
            ours = map(seen, ours) if seen else ours
            if anatomy.adds_to_hidden:
                collections.deque(parents, maxlen=0)  # after which the parent's hidden states have moved on
                hidden = zip(in_pieces(self.ours_BTD), in_pieces(self.parent_BTD), strict=True)
                yield group, partial(added_to_hidden, next(iter(group.values())), ours, hidden)
            else:
                yield group, partial(read_by_others, zip(ours, parents, strict=True))


def at_the_start(hidden_BTD: Tensor, num_rows: int) -> tuple[States, States]:
    """Those of the first rows, for calibration, and of the others, held out, before the first layer."""
    rows_BTD, held_BTD = hidden_BTD.tensor_split((num_rows,))
    return States(rows_BTD, rows_BTD.clone()), States(held_BTD, held_BTD.clone(), num_rows)
