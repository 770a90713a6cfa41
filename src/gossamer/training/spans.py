"""The objective of a head that marks answers: the first and the last token of each, among those of its text.

    loss = mean over texts of (cross-entropy of the first token + that of the last) / 2
    kl   = mean over texts of t^2 (KL of the first token + that of the last) / 2

as transformers' models for question answering have it, each text by itself. KL is of a teacher's softmax over
the tokens of a text to the student's, both of logits divided by the temperature t.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gossamer.architecture.anatomy import Anatomy
from gossamer.data.questions import FIRST, LAST
from gossamer.training.distillation import Distillation
from gossamer.training.head_loss import HeadTeacher, TeacherLogits
from gossamer.training.objective import Loss
from gossamer.training.rows import Rows
from gossamer.training.text_rows import PADDING, encoder_inputs, one_label_a_text, text_batch, types


@dataclass(frozen=True)
class Spans:
    """A text is a question and a window of its context; `end_id` ends the former, and the latter."""

    anatomy: Anatomy
    end_id: int
    own = "cross_entropy"
    at_the_head = "kl"

    def __call__(self, model: PreTrainedModel) -> "Spans":
        return self

    def batch(self, rows: Rows, indices: list[int]) -> dict[str, Tensor]:
        """Beside the texts their `marks`, `FIRST` and `LAST` added up; labels count texts."""
        batch = text_batch(rows, indices)
        batch |= {"marks": batch["labels"], "labels": one_label_a_text(batch["texts"])}
        assert self.anatomy.added is not None
        return batch if self.anatomy.added.num_types < 2 else {**batch, "types": types(batch, self.end_id)}

    def loss(self, model: nn.Module, batch: dict[str, Tensor], learned: Distillation | None) -> Loss:
        outputs = model(**encoder_inputs(self.anatomy, batch), output_hidden_states=True)
        there_BT = batch["texts"] != PADDING
        texts_M, marks_M = batch["texts"][there_BT], batch["marks"][there_BT]
        logits_M2 = torch.stack([outputs.start_logits, outputs.end_logits], -1)[there_BT].float()
        own = torch.zeros((), device=texts_M.device)
        for bit, logits_M in zip((FIRST, LAST), logits_M2.unbind(-1), strict=True):
            is_marked_M = (marks_M > 0) & (marks_M & bit > 0)
            own = own + (_logsumexp(logits_M, texts_M).sum() - logits_M[is_marked_M].sum()) / 2
        weight = 1.0 if learned is None else learned.own_weight
        teacher = None if learned is None else learned.at_the_head(there_BT)
        total = weight * own if teacher is None else weight * own + _divergence(teacher, logits_M2, texts_M)
        return Loss(total, own.detach(), outputs)


def _divergence(teacher: HeadTeacher, logits_M2: Tensor, texts_M: Tensor) -> Tensor:
    """t^2 KL over the tokens of each text, half of its first one's and half of its last one's, added up."""
    assert isinstance(teacher, TeacherLogits)
    t, found = teacher.temperature, torch.zeros((), device=texts_M.device)
    theirs_M2 = teacher.logits(0, len(texts_M)).float()
    for both in zip(theirs_M2.unbind(-1), logits_M2.unbind(-1), strict=True):
        log_p_M, log_q_M = (it / t - _logsumexp(it / t, texts_M)[texts_M] for it in both)
        found = found + t**2 * (log_p_M.exp() * (log_p_M - log_q_M)).sum() / 2
    return found


def _logsumexp(logits_M: Tensor, texts_M: Tensor) -> Tensor:
    """Of the tokens of each text, which are numbered from 0 on: [N]."""
    num_texts = int(texts_M.max()) + 1 if len(texts_M) else 0
    highest_N = logits_M.new_full((num_texts,), -torch.inf)
    highest_N = highest_N.scatter_reduce(0, texts_M, logits_M.detach(), "amax")
    sums_N = logits_M.new_zeros(num_texts).index_add(0, texts_M, (logits_M - highest_N[texts_M]).exp())
    return highest_N + sums_N.log()
