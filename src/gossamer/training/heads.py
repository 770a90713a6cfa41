"""The heads of transformers' models, as what is made of hidden states and a last linear over that."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import PreTrainedModel

from gossamer.training.head_loss import HeadTeacher, head_loss


@dataclass(frozen=True)
class Head:
    """Logits are `last` of `features` of hidden states [N, D], of each token by itself."""

    features: Callable[[Tensor], Tensor]
    last: nn.Linear

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        return self.last(self.features(hidden_ND))

    def loss(
        self, hidden_ND: Tensor, targets_N: Tensor, teacher: HeadTeacher | None, weight: float
    ) -> tuple[Tensor, Tensor]:
        """`head_loss` of tokens; a bias is one more column of the weights, whose input is 1."""
        features_ND, w_VD = self.features(hidden_ND), self.last.weight
        if self.last.bias is not None:
            features_ND = nn.functional.pad(features_ND, (0, 1), value=1.0)
            w_VD = torch.cat([w_VD, self.last.bias[:, None]], 1)
        return head_loss(features_ND, w_VD, targets_N, teacher, weight)


def head_of(model: PreTrainedModel) -> Head:
    """The head of a decoder, or of an encoder for masked tokens, classes of texts or of tokens, or spans."""
    whole: Any = model
    if hasattr(whole, "cls"):
        return Head(whole.cls.predictions.transform, whole.cls.predictions.decoder)
    if hasattr(whole, "lm_head") and not isinstance(whole.lm_head, nn.Linear):
        head = whole.lm_head
        return Head(lambda hidden_ND: head.layer_norm(gelu(head.dense(hidden_ND))), head.decoder)
    if hasattr(whole, "head"):
        return Head(whole.head, whole.decoder if hasattr(whole, "decoder") else whole.classifier)
    if hasattr(whole, "qa_outputs"):
        return Head(nn.Identity(), whole.qa_outputs)
    if not hasattr(whole, "classifier"):
        return Head(nn.Identity(), whole.get_output_embeddings())
    if not isinstance(whole.classifier, nn.Linear):
        head = whole.classifier
        return Head(lambda hidden_ND: torch.tanh(head.dense(hidden_ND)), head.out_proj)
    pooler = whole.base_model.pooler
    if pooler is None:
        return Head(nn.Identity(), whole.classifier)
    return Head(lambda hidden_ND: pooler(hidden_ND[:, None]), whole.classifier)
