"""A head beside tied embeddings: what transformers makes of a file that says the same thing twice."""

from typing import TYPE_CHECKING, Any

import numpy as np

from gossamer.checkpoint.weights import STORAGE, Entry, to_float32

if TYPE_CHECKING:
    from gossamer.checkpoint.directory import Checkpoint

_CHUNK_ROWS = 4096


def resolve_tied_head(checkpoint: "Checkpoint") -> tuple[dict[str, Any], dict[str, Entry]]:
    """Configuration and tensors of a directory whose config ties the head to the embedding, and has a head.

    Where both are there and differ, the model is not tied, whatever its config says. Where they are equal,
    or only the head is there, the one stands for both.
    """
    config, entries, anatomy = checkpoint.config, checkpoint.entries, checkpoint.architecture
    embedding, head = f"{anatomy.embedding}.weight", f"{anatomy.head}.weight"
    others = {name: entry for name, entry in entries.items() if name != head}
    if embedding not in entries:
        return dict(config), {embedding: entries[head], **others}
    if _equal(entries[embedding], entries[head]):
        return dict(config), others
    return {**config, "tie_word_embeddings": False}, dict(entries)


def _equal(one: Entry, other: Entry) -> bool:
    """Whether two matrices hold the same numbers, compared some rows at a time."""
    if one.shape != other.shape or not {one.dtype, other.dtype} <= STORAGE.keys():
        return False
    a_VD, b_VD = one.array(), other.array()
    return all(
        np.array_equal(
            to_float32(a_VD[begin : begin + _CHUNK_ROWS], one.dtype),
            to_float32(b_VD[begin : begin + _CHUNK_ROWS], other.dtype),
        )
        for begin in range(0, len(a_VD), _CHUNK_ROWS)
    )
