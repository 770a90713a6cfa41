"""The objective of an embedding model: each text gets the vector that its teacher gives it.

    loss = SquareHead of the layers + weight L mean over texts of (1 - cos(u, v))

u, v: vectors of a text, pooled of the last hidden states of student and teacher; L: the number of layers, so
that the weight is that of one layer's share. There are no labels: any text will do.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from gossamer.architecture.anatomy import Anatomy
from gossamer.tokens.pooling import Pooling
from gossamer.training.distillation import Distillation
from gossamer.training.objective import Loss
from gossamer.training.rows import Rows
from gossamer.training.text_rows import encoder_inputs, one_label_a_text, text_batch, text_vectors

COSINE_WEIGHT = 4.0


@dataclass(frozen=True)
class TextVectors:
    """Texts' vectors are learned of a teacher, without which there is nothing to learn."""

    anatomy: Anatomy
    pooling: Pooling
    weight: float
    own = None
    at_the_head = "cosine"

    def __call__(self, model: PreTrainedModel) -> "TextVectors":
        """The same of any model, which has no head; a pooler that there is takes no part."""
        if getattr(model, "pooler", None) is not None:
            model.pooler.requires_grad_(False)
        return self

    def batch(self, rows: Rows, indices: list[int]) -> dict[str, Tensor]:
        batch = text_batch(rows, indices)
        return {**batch, "labels": one_label_a_text(batch["texts"])}

    def loss(self, model: nn.Module, batch: dict[str, Tensor], learned: Distillation | None) -> Loss:
        assert learned is not None
        outputs = model(**encoder_inputs(self.anatomy, batch), output_hidden_states=True)
        hidden = (outputs.last_hidden_state, learned.teacher.states()[-1])
        ours_ND, theirs_ND = (text_vectors(it, batch["texts"], self.pooling.mode) for it in hidden)
        distance = (1 - cosine_similarity(ours_ND, theirs_ND)).sum()
        total = self.weight * self.anatomy.num_layers * distance
        return Loss(total, torch.zeros_like(total), outputs)
