"""How an encoder is given rows of texts, several to a row, and how its objectives find these again."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.architecture.anatomy import Anatomy
from gossamer.architecture.windows import FULL, SLIDING
from gossamer.modules.encoder import in_window
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


def text_vectors(hidden_BTD: Tensor, texts_BT: Tensor, mode: str) -> Tensor:
    """The vectors of the texts [N, D], float32, not normalized, by `Pooling.mode`."""
    if mode == "cls":
        return hidden_BTD[begins(texts_BT)].float()
    there_BT = texts_BT != PADDING
    tokens_MD, texts_M = hidden_BTD[there_BT].float(), texts_BT[there_BT]
    num_texts = int(begins(texts_BT).sum())
    sums_ND = tokens_MD.new_zeros(num_texts, tokens_MD.shape[1])
    if mode == "max":
        index_MD = texts_M[:, None].expand_as(tokens_MD)
        return sums_ND.scatter_reduce(0, index_MD, tokens_MD, "amax", include_self=False)
    counts_N = torch.bincount(texts_M, minlength=num_texts)
    return sums_ND.index_add(0, texts_M, tokens_MD) / counts_N[:, None]


def states_at(hidden_BTD: Tensor, kept_BT: Tensor, means_of: Tensor | None = None) -> Tensor:
    """The hidden states [N, D] at kept places; those of texts' first tokens stand for means of `means_of`."""
    if means_of is None:
        return hidden_BTD[kept_BT]
    return text_vectors(hidden_BTD, means_of, "mean")[kept_BT[begins(means_of)]].to(hidden_BTD.dtype)


def encoder_inputs(anatomy: Anatomy, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What transformers' encoder is told of a `text_batch`: tokens of a text see one another, and no others.

    Of windows it is told by the type of layer. Positions begin anew with each text, at the row that the
    family says.
    """
    assert anatomy.added is not None
    texts_BT = batch["texts"]
    seen_B1TT: Any = (texts_BT[:, :, None] == texts_BT[:, None, :]).unsqueeze(1)
    if windows := {it.attention.window for it in anatomy.blocks if it.attention.window is not None}:
        places_T = torch.arange(texts_BT.shape[1], device=texts_BT.device)
        seen_B1TT = {FULL: seen_B1TT, SLIDING: seen_B1TT & in_window(places_T, windows.pop())}
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": seen_B1TT,
        "position_ids": batch["position_ids"] + anatomy.added.offset,
        **({"token_type_ids": batch["types"]} if "types" in batch else {}),
    }
