"""Rows of tokens as arrays. Tokenizing and packing is done before training begins."""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gossamer.data.supervised import IGNORED

Example = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Rows(Dataset[int]):
    """S rows of T tokens, in the order of training; all arrays are int32.

    input_ids_ST: the tokens; labels_ST: what is to be predicted (-100: no loss at this token); positions_ST:
    of each token in its example, so that they restart at 0 where an example begins (None: each row is one
    sequence); lengths_S: how many tokens of each row are not padding (None: all).
    """

    input_ids_ST: np.ndarray
    labels_ST: np.ndarray
    positions_ST: np.ndarray | None = None
    lengths_S: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids_ST)

    @property
    def row_length(self) -> int:
        return self.input_ids_ST.shape[1]

    def __getitem__(self, index: int) -> int:
        return index

    def padded(self, multiple: int) -> "Rows":
        """These rows, and behind them as many rows of padding (without loss) as make up a multiple."""
        count, row_length = self.input_ids_ST.shape
        if not (missing := -count % multiple):
            return self
        positions_ST = (
            np.tile(np.arange(row_length), (count, 1)) if self.positions_ST is None else self.positions_ST
        )
        lengths_S = np.full(count, row_length) if self.lengths_S is None else self.lengths_S
        ids, positions = (np.pad(a, ((0, missing), (0, 0))) for a in (self.input_ids_ST, positions_ST))
        labels = np.pad(self.labels_ST, ((0, missing), (0, 0)), constant_values=IGNORED)
        return Rows(ids, labels, positions, np.pad(lengths_S, (0, missing)))

    def num_tokens(self, num_rows: int) -> int:
        """How many tokens of the first `num_rows` rows are not padding."""
        if self.lengths_S is None:
            return min(num_rows, len(self)) * self.row_length
        return int(self.lengths_S[:num_rows].sum())

    def hash(self) -> str:
        """sha256 of all tokens, labels and positions in their order."""
        digest = hashlib.sha256()
        for array in (self.input_ids_ST, self.labels_ST, self.positions_ST):
            if array is not None:
                digest.update(f"{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def collate(self, indices: list[int]) -> dict[str, Tensor]:
        """The rows of one micro-batch as tensors, cut to the length of the longest one."""
        if self.positions_ST is None or self.lengths_S is None:
            return {
                "input_ids": _tensor(self.input_ids_ST[indices]),
                "labels": _tensor(self.labels_ST[indices]),
            }
        lengths = self.lengths_S[indices]
        width = max(1, int(lengths.max()))
        return {
            "input_ids": _tensor(self.input_ids_ST[indices, :width]),
            "labels": _tensor(self.labels_ST[indices, :width]),
            "position_ids": _tensor(self.positions_ST[indices, :width]),
            "token_mask": torch.from_numpy(np.arange(width) < lengths[:, None]),
        }


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))


def next_token_rows(rows: Iterable[np.ndarray], num_rows: int) -> Rows:
    """The first `num_rows` rows [T] of a text, in which every token but a row's first is to be predicted."""
    ids_ST = np.stack([row.astype(np.int32) for row in islice(rows, num_rows)])
    return Rows(ids_ST, ids_ST)


def packed_rows(examples: Sequence[Example], row_length: int, num_epochs: int, seed: int) -> Rows:
    """Put the examples (input_ids, labels) of every epoch into rows: several to a row, and none is split.

    Every epoch has a new order, in which each example goes to the fullest open row that has room for it.
    """
    shuffler = random.Random(seed)
    rows: list[list[Example]] = []
    for _ in range(num_epochs):
        rows += _pack(shuffler.sample(examples, len(examples)), row_length)
    ids, labels, positions = (np.full((len(rows), row_length), fill, np.int32) for fill in (0, IGNORED, 0))
    for row, members in enumerate(rows):
        start = 0
        for example_ids, example_labels in members:
            end = start + len(example_ids)
            ids[row, start:end], labels[row, start:end] = example_ids, example_labels
            labels[row, start] = IGNORED  # the token before it belongs to another example
            positions[row, start:end] = np.arange(end - start)
            start = end
    return Rows(ids, labels, positions, np.array([sum(len(e[0]) for e in row) for row in rows]))


def _pack(examples: Sequence[Example], row_length: int, num_open: int = 16) -> list[list[Example]]:
    """Best fit over `num_open` open rows. If an example fits in none, the fullest is closed."""
    closed: list[list[Example]] = []
    open_rows: list[tuple[int, list[Example]]] = []
    for example in examples:
        fitting = [i for i, (used, _) in enumerate(open_rows) if used + len(example[0]) <= row_length]
        if fitting:
            best = max(fitting, key=lambda i: open_rows[i][0])
            used, members = open_rows[best]
            members.append(example)
            open_rows[best] = (used + len(example[0]), members)
            continue
        if len(open_rows) == num_open:
            fullest = max(range(num_open), key=lambda i: open_rows[i][0])
            closed.append(open_rows.pop(fullest)[1])
        open_rows.append((len(example[0]), [example]))
    return closed + [members for _, members in open_rows]
