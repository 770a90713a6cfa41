"""A checkpoint's encoder, one block at a time: as of a decoder, but tokens see one another."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from gossamer.checkpoint.directory import Checkpoint
from gossamer.modules import decoder
from gossamer.modules.decoder import filled, model_config, tensor
from gossamer.tokens.pooling import Pooling


class Block(decoder.Block):
    """Layer `index` of an encoder; rows are whole texts, or pieces of them, without padding."""

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        """The layer's output [B, T, D], from the input that `walk` takes; gradients flow through it."""
        found = self.layer(hidden_BTD)
        return found[0] if isinstance(found, tuple) else found

    def _attention(self, hidden_BTD: Tensor) -> Tensor:
        """What the output projection is given: the heads' mixed values [B, T, D]."""
        module, _, _ = self.anatomy.linears["q"].name.rpartition(".")
        attention: Any = self.layer.get_submodule(module)
        return attention(hidden_BTD)[0]

    def _activated(self, hidden_BTD: Tensor) -> Tensor:
        """What the down projection is given: gelu(up) [B, T, F]."""
        return nn.functional.gelu(self.linear("up")(hidden_BTD))


def blocks(source: Checkpoint, first: int = 0) -> Iterator[Block]:
    """The encoder's layers from `first` on, one in memory at a time."""
    anatomy, config = source.architecture, model_config(source.architecture, source.config)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        skeleton: Any = AutoModel.from_config(config).encoder.layer
    for index, empty in enumerate(skeleton[first:], first):
        layer, prefix = (
            filled(type(empty)(config, index), source, anatomy.prefix(index)),
            anatomy.prefix(index),
        )
        yield Block(index, prefix, anatomy.blocks[index], layer, nn.Identity())


@torch.no_grad()
def embed(source: Checkpoint, ids_BT: Tensor) -> Tensor:
    """Token ids of whole rows -> float32 [B, T, D]: words, positions and the first type, normalized."""
    anatomy = source.architecture
    added = anatomy.added
    assert added is not None
    words_BTD = nn.functional.embedding(ids_BT, tensor(source, f"{anatomy.embedding}.weight").float())
    positions_TD = tensor(source, f"{added.positions}.weight")[added.offset :][: ids_BT.shape[1]].float()
    words_BTD += positions_TD + tensor(source, f"{added.types}.weight")[0].float()
    weight_D, bias_D = (tensor(source, name).float() for name in added.norm.vectors())
    return nn.functional.layer_norm(words_BTD, weight_D.shape, weight_D, bias_D, anatomy.norm_eps)


def similarity(source: Checkpoint, ours_BTD: Tensor, parent_BTD: Tensor) -> float:
    """The mean cosine between rows' vectors as they are pooled, or of another head's model their tokens'."""
    vectors = (ours_BTD, parent_BTD)
    if source.architecture.task == "embedding":
        mode = Pooling.open(source.path, source.architecture).mode
        vectors = [{"mean": it.mean(1), "cls": it[:, 0], "max": it.amax(1)}[mode] for it in vectors]
    return nn.functional.cosine_similarity(*vectors, dim=-1).mean().item()
