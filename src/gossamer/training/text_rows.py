"""How an encoder is given rows of texts, several to a row, and how its objectives find these again."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.architecture.anatomy import Anatomy
from gossamer.training.rows import IGNORED, Rows

PADDING = -1


def text_batch(rows: Rows, indices: list[int]) -> dict[str, Tensor]:
    """The rows of one micro-batch; `texts` [B, T] number them from 0 on, and say `PADDING` of padding."""
    batch = rows.collate(indices)
    ids_BT = batch["input_ids"]
    if "position_ids" not in batch:
        batch["position_ids"] = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    begins_BT = batch["position_ids"] == 0
    if "token_mask" in batch:
        begins_BT = begins_BT & batch["token_mask"]
    texts_BT = begins_BT.flatten().cumsum(0).view_as(ids_BT) - 1
    batch["texts"] = (
        texts_BT.masked_fill(~batch["token_mask"], PADDING) if "token_mask" in batch else texts_BT
    )
    return batch


def begins(texts_BT: Tensor) -> Tensor:
    """Where texts begin: bool [B, T]."""
    before_BT = torch.nn.functional.pad(texts_BT[:, :-1], (1, 0), value=PADDING)
    return (texts_BT != before_BT) & (texts_BT != PADDING)


def one_label_a_text(texts_BT: Tensor) -> Tensor:
    """Labels that count texts: 0 where one begins."""
    return torch.where(begins(texts_BT), 0, IGNORED)


def types(batch: Mapping[str, Tensor], end_id: int) -> Tensor:
    """0, and 1 for the second of two texts that belong together: what follows a text's first `end_id`."""
    ends_BT = (batch["input_ids"] == end_id).long()
    before_BT = ends_BT.cumsum(1) - ends_BT
    at_begin_BT = torch.where(begins(batch["texts"]), before_BT, 0).cummax(1).values
    return ((before_BT > at_begin_BT) & (batch["texts"] != PADDING)).long()


def encoder_inputs(anatomy: Anatomy, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What transformers' encoder is told of a `text_batch`: tokens of a text see one another, and no others.

    Positions begin anew with each text, at the row that the family says.
    """
    assert anatomy.added is not None
    texts_BT = batch["texts"]
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": (texts_BT[:, :, None] == texts_BT[:, None, :]).unsqueeze(1),
        "position_ids": batch["position_ids"] + anatomy.added.offset,
        **({"token_type_ids": batch["types"]} if "types" in batch else {}),
    }
