"""The objectives of encoders with a head: labelled places are foretold of all that their text says.

`MaskedTokens` hides tokens, which are the labels; in `Classes` labels are of texts, at their first tokens, or
of tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gossamer.architecture.anatomy import Anatomy
from gossamer.training.distillation import Distillation
from gossamer.training.heads import head_of
from gossamer.training.objective import Loss
from gossamer.training.rows import IGNORED, Rows
from gossamer.training.text_rows import PADDING, begins, encoder_inputs, states_at, text_batch, types

MASKED, BY_MASK, BY_RANDOM = 0.15, 0.8, 0.1  # of the tokens, and of those that are masked (BERT's shares)


class Classes:
    """Cross-entropy of the head's logits at labelled places, and KL to the teacher's there."""

    own, at_the_head = "cross_entropy", "kl"

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, end_id: int | None = None) -> None:
        """end_id: what ends a text, behind which there may be another that belongs to it."""
        self.end_id = end_id
        self.anatomy, self.head, of_texts = anatomy, head_of(model), anatomy.task == "sequence"
        heads: list[Any] = [getattr(model, name, None) for name in ("cls", "lm_head", "head")]
        self.of_all_tokens = None if of_texts else next(filter(None, heads), None)
        self.of_means = of_texts and getattr(model.config, "classifier_pooling", "") == "mean"
        if self.of_means:  # its own head, which nobody reads, would take its mean by another mask
            model.config.classifier_pooling = "cls"

    def batch(self, rows: Rows, indices: list[int]) -> dict[str, Tensor]:
        batch = text_batch(rows, indices)
        assert self.anatomy.added is not None
        if self.end_id is None or self.anatomy.added.num_types < 2:
            return batch
        return {**batch, "types": types(batch, self.end_id)}

    def loss(self, model: nn.Module, batch: dict[str, Tensor], learned: Distillation | None) -> Loss:
        with _of_one_token(self.of_all_tokens):
            outputs = model(**encoder_inputs(self.anatomy, batch), output_hidden_states=True)
        kept_BT = batch["labels"] != IGNORED
        means_of = batch["texts"] if self.of_means else None
        teacher = None if learned is None else learned.at_the_head(kept_BT, means_of)
        weight = 1.0 if learned is None else learned.own_weight
        hidden_ND = states_at(outputs.hidden_states[-1], kept_BT, means_of)
        total, own = self.head.loss(hidden_ND, batch["labels"][kept_BT], teacher, weight)
        return Loss(total, own, outputs)


class MaskedTokens(Classes):
    """Of 15% of a row's tokens it is to be said what they were, whatever stands there.

    That is `mask_id` in 80% of the cases, any token in 10%, and the token itself in the rest. The places are
    chosen by `seed` and the row's number, marks around texts aside; every row has one at least.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, mask_id: int, seed: int) -> None:
        super().__init__(model, anatomy)
        self.mask_id, self.seed = mask_id, seed

    def batch(self, rows: Rows, indices: list[int]) -> dict[str, Tensor]:
        batch = text_batch(rows, indices)
        ids_BT, texts_BT = batch["input_ids"], batch["texts"]
        labels_BT = torch.full_like(ids_BT, IGNORED)
        after_BT = nn.functional.pad(texts_BT[:, 1:], (0, 1), value=PADDING)
        words_BT = (texts_BT != PADDING) & ~begins(texts_BT) & (texts_BT == after_BT)
        for row, index in enumerate(indices):
            places_N = words_BT[row].nonzero()[:, 0].numpy()
            chance = np.random.default_rng([self.seed, index])
            count = min(len(places_N), max(1, round(MASKED * len(places_N))))
            chosen_M = torch.from_numpy(chance.permutation(places_N)[:count])
            labels_BT[row, chosen_M] = ids_BT[row, chosen_M]
            how_M = torch.from_numpy(chance.random(count))
            any_M = torch.from_numpy(chance.integers(0, self.anatomy.vocab_size, count))
            there_M = torch.where(how_M < BY_MASK + BY_RANDOM, any_M, ids_BT[row, chosen_M])
            ids_BT[row, chosen_M] = torch.where(how_M < BY_MASK, self.mask_id, there_M)
        return {**batch, "labels": labels_BT}


@contextmanager
def _of_one_token(head: nn.Module | None) -> Iterator[None]:
    """A head of every token computes the first alone: `Head.loss` does what there is to do."""
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda module, args: (args[0][:, :1],))
    try:
        yield
    finally:
        hook.remove()
