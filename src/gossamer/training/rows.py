"""Rows of tokens to train on, as arrays. Tokenizing and packing is done before training begins."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gossamer.data.supervised import IGNORED
from gossamer.data.whole_texts import fitted

Example = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Rows(Dataset[int]):
    """S rows of T tokens, in the order of training; all arrays are int32.

    marked_ids_ST: the tokens, and ~token (negative) where an example or a document begins: attention does not
    cross that border, positions restart there, and nothing predicts that token. labels_ST: what is to be
    predicted (-100: no loss at this token; None: all tokens but those). lengths_S: how many tokens of each
    row are not padding (None: all). num_padding: so many rows of padding follow. digest: sha256 of all this,
    where it is known.
    """

    marked_ids_ST: np.ndarray
    labels_ST: np.ndarray | None = None
    lengths_S: np.ndarray | None = None
    num_padding: int = 0
    digest: str | None = None

    def __len__(self) -> int:
        return len(self.marked_ids_ST) + self.num_padding

    @property
    def row_length(self) -> int:
        return self.marked_ids_ST.shape[1]

    def __getitem__(self, index: int) -> int:
        return index

    def padded(self, multiple: int) -> "Rows":
        """These rows, and behind them as many rows of padding (without loss) as make up a multiple."""
        return replace(self, num_padding=self.num_padding + -len(self) % multiple)

    def num_tokens(self, num_rows: int) -> int:
        """How many tokens of the first `num_rows` rows are not padding."""
        if self.lengths_S is None:
            return min(num_rows, len(self.marked_ids_ST)) * self.row_length
        return int(self.lengths_S[:num_rows].sum())

    def hash(self) -> str:
        """sha256 of all tokens, borders and labels in their order."""
        if self.digest is not None:
            return self.digest
        digest = hashlib.sha256()
        for array in (self.marked_ids_ST, self.labels_ST):
            if array is not None:
                digest.update(f"{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def collate(self, indices: list[int]) -> dict[str, Tensor]:
        """The rows of one micro-batch as tensors, cut to the length of the longest one, and their numbers.

        `position_ids` are there where a row holds more than one example, `token_mask` where there is padding.
        """
        num_rows = len(self.marked_ids_ST)
        there = [index for index in indices if index < num_rows]
        lengths_B = np.full(len(indices), self.row_length)
        if self.lengths_S is not None:
            lengths_B[: len(there)] = self.lengths_S[there]
        lengths_B[len(there) :] = 0
        width = max(1, int(lengths_B.max()))
        marked_BT = np.zeros((len(indices), width), np.int64)
        marked_BT[: len(there)] = self.marked_ids_ST[there, :width]
        padding_BT = np.arange(width) >= lengths_B[:, None]
        marked_BT[padding_BT] = 0
        begins_BT = marked_BT < 0
        begins_BT[:, 0] = True
        ids_BT = np.where(marked_BT < 0, ~marked_BT, marked_BT)
        labels_BT = np.where(begins_BT, IGNORED, ids_BT)
        if self.labels_ST is not None:
            labels_BT[: len(there)] = self.labels_ST[there, :width]
        labels_BT[padding_BT] = IGNORED
        batch = {"input_ids": ids_BT, "labels": labels_BT, "rows": np.array(indices)}
        if begins_BT[:, 1:].any():
            places_T = np.arange(width)
            batch["position_ids"] = places_T - np.maximum.accumulate(np.where(begins_BT, places_T, 0), axis=1)
        if padding_BT.any():
            batch["token_mask"] = ~padding_BT
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def packed_rows(
    examples: Sequence[Example], row_length: int, num_epochs: int, seed: int, *, of_firsts: bool = False
) -> Rows:
    """Put the examples (input_ids, labels) of every epoch into rows: several to a row, and none is split.

    Every epoch has a new order, in which each example goes to the fullest open row that has room for it.
    of_firsts: whether the label of an example's first token counts, which nothing in the row foretells.
    """
    shuffler = random.Random(seed)
    rows: list[list[Example]] = []
    for _ in range(num_epochs):
        order = shuffler.sample(examples, len(examples))
        rows += fitted(order, lambda example: len(example[0]), row_length)
    ids, labels = (np.full((len(rows), row_length), fill, np.int32) for fill in (0, IGNORED))
    for row, members in enumerate(rows):
        start = 0
        for example_ids, example_labels in members:
            end = start + len(example_ids)
            ids[row, start:end], labels[row, start:end] = example_ids, example_labels
            ids[row, start] = ~ids[row, start]
            if not of_firsts:
                labels[row, start] = IGNORED
            start = end
    return Rows(ids, labels, np.array([sum(len(e[0]) for e in row) for row in rows]))
