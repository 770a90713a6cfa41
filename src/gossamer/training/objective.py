"""What a model is trained to do: what a batch of rows holds for it, and the loss of what it makes of that.

`RowTrainer` asks an `Objective` for both, and knows no more of tokens, heads and labels. The loss has up to
three parts: what the labels ask for, what is learned of a teacher at the head, and what is learned of the
teacher's layers, which `SquareHead` adds to any objective.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gossamer.training.distillation import Distillation
from gossamer.training.head_loss import head_loss
from gossamer.training.rows import IGNORED, Rows


class Loss(NamedTuple):
    """Sums over the labels of a micro-batch: `total`, and what of it the labels ask for, without its weight.

    `outputs` are the model's.
    """

    total: Tensor
    own: Tensor
    outputs: Any


class Objective(Protocol):
    """One way to train; `own` and `at_the_head` are what the log calls the two parts of its loss.

    `own` is what labels ask for, and None where there are none to learn.
    """

    @property
    def own(self) -> str | None: ...

    @property
    def at_the_head(self) -> str: ...

    def batch(self, rows: Rows, indices: list[int]) -> dict[str, Tensor]:
        """The rows of one micro-batch; its loss is a sum over the places where `labels` are not `IGNORED`."""
        ...

    def loss(self, model: nn.Module, batch: dict[str, Tensor], learned: Distillation | None) -> Loss:
        """Of a micro-batch, by the model as it is wrapped for several processes; under autocast."""
        ...


class NextToken:
    """Each labelled token is foretold by those before it.

    Logits are computed only for tokens that have a label, and never all at once (`head_loss`).
    """

    own, at_the_head = "cross_entropy", "kl"

    def __init__(self, model: PreTrainedModel) -> None:
        self.head: Any = model.get_output_embeddings()

    def batch(self, rows: Rows, indices: list[int]) -> dict[str, Tensor]:
        return rows.collate(indices)

    def loss(self, model: nn.Module, batch: dict[str, Tensor], learned: Distillation | None) -> Loss:
        outputs = model(
            input_ids=batch["input_ids"],
            position_ids=batch.get("position_ids"),
            output_hidden_states=True,
            logits_to_keep=1,
            use_cache=False,
        )
        targets_BT = batch["labels"][:, 1:]
        kept_BT = targets_BT != IGNORED
        hidden_ND = outputs.hidden_states[-1][:, :-1][kept_BT]
        teacher = None if learned is None else learned.at_the_head(nn.functional.pad(kept_BT, (0, 1)))
        weight = 1.0 if learned is None else learned.own_weight
        total, own = head_loss(hidden_ND, self.head.weight, targets_BT[kept_BT], teacher, weight)
        return Loss(total, own, outputs)


def num_labels(batch: dict[str, Tensor]) -> Tensor:
    """How many labels of a micro-batch are not `IGNORED`."""
    return torch.count_nonzero(batch["labels"] != IGNORED)
