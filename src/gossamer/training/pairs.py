"""The objective of an embedding model on pairs of texts: their cosine is to be what people said.

    loss = mean over pairs of (cos(u, v) - score)^2

as sentence-transformers' CosineSimilarityLoss has it. Each pair counts by itself, so that the loss does not
depend on how many fit into a micro-batch, as CoSENT's would, which compares the pairs of one.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from gossamer.data.labelled import SCORE_STEPS
from gossamer.training.distillation import Distillation
from gossamer.training.objective import Loss
from gossamer.training.rows import IGNORED, Rows
from gossamer.training.text_rows import encoder_inputs, text_batch
from gossamer.training.vectors import TextVectors, text_vectors


@dataclass(frozen=True)
class PairScores(TextVectors):
    """Texts in rows are pairs, one behind the other; the label of a pair is at its second text's first token.

    A score is divided by `highest`, which is then 1.
    """

    highest: float = 1.0
    own = "squared_error"
    at_the_head = "kl"

    def batch(self, rows: Rows, indices: list[int]) -> dict[str, Tensor]:
        return text_batch(rows, indices)

    def loss(self, model: nn.Module, batch: dict[str, Tensor], learned: Distillation | None) -> Loss:
        outputs = model(**encoder_inputs(self.anatomy, batch), output_hidden_states=True)
        vectors_ND = text_vectors(outputs.last_hidden_state, batch["texts"], self.pooling.mode)
        labels_P = batch["labels"][batch["labels"] != IGNORED]
        scores_P = labels_P.float() / (SCORE_STEPS * self.highest)
        own = (cosine_similarity(vectors_ND[0::2], vectors_ND[1::2]) - scores_P).square().sum()
        weight = 1.0 if learned is None else learned.own_weight
        return Loss(weight * own, own.detach(), outputs)
