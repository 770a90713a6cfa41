"""A checkpoint's encoder, one block at a time: as of a decoder, but tokens see one another."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from gossamer.architecture.anatomy import Norm, Place
from gossamer.architecture.windows import FULL, SLIDING
from gossamer.checkpoint.directory import Checkpoint
from gossamer.modules import decoder
from gossamer.modules.decoder import filled, model_config, tensor
from gossamer.modules.unfused import unfuse
from gossamer.tokens.pooling import Pooling


class Block(decoder.Block):
    """Layer `index` of an encoder; rows are whole texts, or pieces of them, without padding."""

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        """The layer's output [B, T, D], from the input that `walk` takes; gradients flow through it."""
        found = super().__call__(hidden_BTD)
        return found[0] if isinstance(found, tuple) else found

    def norm(self, place: Place) -> nn.Module:
        """The module of one norm; of one that the layer does not have, one that changes nothing."""
        return super().norm(place) if place in self.anatomy.norms else nn.Identity()

    def _attention(self, hidden_BTD: Tensor) -> Tensor:
        """What the output projection is given: the heads' mixed values [B, T, D]."""
        if self.anatomy.order == "pre":
            return super()._attention(hidden_BTD)
        module, _, _ = self.anatomy.linears["q"].name.rpartition(".")
        attention: Any = self.layer.get_submodule(module)
        return attention(hidden_BTD)[0]

    def _positions(self, hidden_BTD: Tensor) -> dict[str, Any]:
        """What transformers' attention is told where the layer itself has to do with the places 0..T-1."""
        heads, T = self.anatomy.attention, hidden_BTD.shape[1]
        if heads.rope is None:
            return {}
        places_T = torch.arange(T, device=hidden_BTD.device)
        layer_type = FULL if heads.window is None else SLIDING
        rotation = self.rotary(hidden_BTD, places_T[None], layer_type)
        seen_11TT = None if heads.window is None else in_window(places_T, heads.window)[None, None]
        return {"position_embeddings": rotation, "attention_mask": seen_11TT}

    def _activated(self, hidden_BTD: Tensor) -> Tensor:
        """What the down projection is given: gelu(up), or gelu(gate) * up, [B, T, F]."""
        input_BTD = self._before("feed_forward", hidden_BTD)
        if self.anatomy.feed_forward.kind == "gelu":
            return nn.functional.gelu(self.linear("up")(input_BTD))
        return nn.functional.gelu(self.linear("gate")(input_BTD)) * self.linear("up")(input_BTD)


def in_window(places_T: Tensor, window: int) -> Tensor:
    """Which tokens see one another, bool [T, T]: those at most half a window apart."""
    return (places_T[:, None] - places_T).abs() <= window // 2


def blocks(source: Checkpoint, first: int, device: str) -> Iterator[Block]:
    """The encoder's layers from `first` on, one in memory at a time, on the device."""
    anatomy, config = source.architecture, model_config(source.architecture, source.config)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        skeleton: Any = AutoModel.from_config(config)
    rotary = (
        type(skeleton.rotary_emb)(config).to(device) if hasattr(skeleton, "rotary_emb") else nn.Identity()
    )
    layers = skeleton.encoder.layer if hasattr(skeleton, "encoder") else skeleton.layers
    for index, empty in enumerate(layers[first:], first):
        layer, prefix = type(empty)(config, index), anatomy.prefix(index)
        unfuse(layer, anatomy.blocks[index])
        yield Block(index, prefix, anatomy.blocks[index], filled(layer, source, prefix).to(device), rotary)


@torch.no_grad()
def embed(source: Checkpoint, ids_BT: Tensor) -> Tensor:
    """Token ids of whole rows -> float32 [B, T, D]: words, positions and the first type, normalized."""
    anatomy = source.architecture
    added = anatomy.added
    assert added is not None
    hidden_BTD = nn.functional.embedding(ids_BT, tensor(source, f"{anatomy.embedding}.weight").float())
    if added.positions:
        positions_TD = tensor(source, f"{added.positions}.weight")[added.offset :][: ids_BT.shape[1]].float()
        hidden_BTD += positions_TD + tensor(source, f"{added.types}.weight")[0].float()
    return normalized(source, added.norm, hidden_BTD)


def normalized(source: Checkpoint, norm: Norm, hidden_BTD: Tensor) -> Tensor:
    """The LayerNorm of hidden states by the checkpoint's tensors, float32."""
    weight_D, *bias = (tensor(source, name).to(hidden_BTD.device).float() for name in norm.vectors())
    eps = source.architecture.norm_eps
    return nn.functional.layer_norm(hidden_BTD, weight_D.shape, weight_D, *bias, eps=eps)


@torch.no_grad()
def similarity(source: Checkpoint, ours_BTD: Tensor, parent_BTD: Tensor) -> float:
    """The mean cosine between rows' vectors as they are pooled, or of another head's model their tokens'.

    Both are hidden states after the last layer, where a last norm has not been applied yet.
    """
    vectors, norm = (ours_BTD, parent_BTD), source.architecture.final_norm
    if norm is not None:
        vectors = [normalized(source, norm, it) for it in vectors]
    if source.architecture.task == "embedding":
        mode = Pooling.open(source.path, source.architecture).mode
        vectors = [{"mean": it.mean(1), "cls": it[:, 0], "max": it.amax(1)}[mode] for it in vectors]
    return nn.functional.cosine_similarity(*vectors, dim=-1).mean().item()
