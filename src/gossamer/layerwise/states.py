"""Two copies of a model on their way through the layers: the one being changed, and its parent."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from gossamer.compress.target import Evidence, added_to_hidden, read_by_others
from gossamer.decoder import Block, in_pieces


@dataclass(frozen=True)
class States:
    """Hidden states [rows, T, D] of the pruned model and of its parent, on their way through the layers."""

    ours_BTD: Tensor
    parent_BTD: Tensor

    def walk(
        self, block: Block, parent: Block, seen: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[tuple[dict[str, nn.Linear], Callable[[], Evidence]]]:
        """Through a layer by groups, with what their inputs (as `seen` by them) and outputs say once."""
        walks = zip(
            block.anatomy.groups, block.walk(self.ours_BTD), parent.walk(self.parent_BTD), strict=True
        )
        for anatomy, (group, inputs), (_, parent_inputs) in walks:
            pairs = zip(map(seen, inputs) if seen else inputs, parent_inputs, strict=True)
            if anatomy.adds_to_hidden:
                hidden = zip(in_pieces(self.ours_BTD), in_pieces(self.parent_BTD), strict=True)
                yield group, partial(added_to_hidden, next(iter(group.values())).weight.data, pairs, hidden)
            else:
                yield group, partial(read_by_others, pairs)
