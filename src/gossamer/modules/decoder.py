"""A checkpoint's decoder, one block at a time: transformers' own modules, filled when they are needed."""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from gossamer.architecture import anatomy as made_of
from gossamer.architecture.anatomy import Anatomy, Place, Role
from gossamer.checkpoint.directory import Checkpoint, Derived
from gossamer.errors import UnsupportedError

TORCH_DTYPE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}
PIECE_TOKENS = 4096
KEPT_BYTES = 1 << 30
Group = dict[str, nn.Linear]  # by checkpoint name
Function = Callable[[Tensor], Tensor]


def tensor(source: Checkpoint, name: str) -> Tensor:
    """One tensor in its stored dtype (a copy); same errors as `Checkpoint.raw`."""
    copied = torch.from_numpy(source.raw(name).copy())
    return copied.view(torch.bfloat16) if source.dtype(name) == "BF16" else copied


def write_tensor(target: Derived, name: str, value: Tensor) -> None:
    """Store one tensor in the dtype that its parent has."""
    dtype = target.parent.dtype(name)
    stored = value.detach().to("cpu", TORCH_DTYPE[dtype]).contiguous()
    target.write(name, (stored.view(torch.uint16) if dtype == "BF16" else stored).numpy(), dtype)


def model_config(anatomy: Anatomy, config: Mapping[str, Any]) -> PretrainedConfig:
    """transformers' configuration object for a `config.json`."""
    return CONFIG_MAPPING[anatomy.model_type].from_dict(dict(config))


def refuse_quantized(source: Checkpoint) -> None:
    """Raise UnsupportedError if the directory's linears are already integers."""
    if "quantization_config" in source.config:
        raise UnsupportedError(
            f"{source.path}: already quantized; give the directory it was made from (quantize comes last)"
        )


@dataclass(frozen=True)
class Block:
    """Layer `index` of a decoder: transformers' own module, in float32, and what it is made of.

    `prefix` stands before the names of its tensors in the checkpoint; `rotary` computes the cosines and
    sines of positions.
    """

    index: int
    prefix: str
    anatomy: made_of.Block
    layer: nn.Module
    rotary: nn.Module

    @property
    def groups(self) -> list[Group]:
        """The linears that now share an input, by checkpoint name: q,k,v | o | gate,up | down."""
        return [
            {f"{self.prefix}{linear.name}": self.linear(linear.role) for linear in group.linears}
            for group in self.anatomy.groups
        ]

    def linear(self, role: Role) -> nn.Linear:
        """The module of one matrix."""
        module = self.layer.get_submodule(self.anatomy.linears[role].name)
        assert isinstance(module, nn.Linear)
        return module

    def norm(self, place: Place) -> nn.Module:
        """The module of one norm."""
        return self.layer.get_submodule(self.anatomy.norms[place].name)

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        """The layer's output [B, T, D], from the input that `walk` takes; gradients flow through it."""
        return self.layer(hidden_BTD, **self._positions(hidden_BTD))

    def walk(self, hidden_BTD: Tensor) -> Iterator[tuple[Group, Iterable[Tensor]]]:
        """Go through the layer group by group: yields each group and its input [rows, T, K] in pieces.

        Attention is causal, over positions 0..T-1 or the layer's window of them.

        What the caller does to a group's weights before it asks for the next one counts from there on, so
        later groups see the changed earlier ones (GPTQ's "true sequential") for about one forward pass.
        At the end `hidden_BTD` holds the layer's output.
        """
        self.layer.requires_grad_(False)
        pieces = in_pieces(hidden_BTD)
        for place, first, (last, linear), input_of in self._sublayers():
            yield first, (self._before(place, h_BTD) for h_BTD in pieces)
            num_bytes = 4 * hidden_BTD[..., 0].numel() * linear.in_features
            keep = place == "attention" or num_bytes <= KEPT_BYTES
            kept = [input_of(h_BTD) for h_BTD in pieces] if keep else []
            yield last, kept or (input_of(h_BTD) for h_BTD in pieces)
            for h_BTD in pieces:
                h_BTD += linear(kept.pop(0) if keep else input_of(h_BTD))
            self._after(place, pieces)

    def follow(self, hidden_BTD: Tensor) -> Iterator[tuple[Group, Iterator[Tensor]]]:
        """As `walk`, for a layer that nobody changes: each piece of input is computed when it is asked for.

        It can be had once. Nothing is kept: where a group's outputs are added to the hidden states, those of
        a piece move on as the next one is asked for.
        """
        self.layer.requires_grad_(False)
        pieces = in_pieces(hidden_BTD)
        for place, first, (last, linear), input_of in self._sublayers():
            yield first, (self._before(place, h_BTD) for h_BTD in pieces)
            moved = _moved(pieces, input_of, linear)
            yield last, moved
            collections.deque(moved, maxlen=0)  # what the caller did not ask for
            self._after(place, pieces)

    def _sublayers(self) -> Iterator[tuple[Place, Group, tuple[Group, nn.Linear], Function]]:
        """Of each: its place, the group that reads its input, and the one whose output is added, with its."""
        first, second, third, fourth = self.groups
        yield "attention", first, (second, self.linear("o")), self._attention
        yield "feed_forward", third, (fourth, self.linear("down")), self._activated

    def _before(self, place: Place, hidden_BTD: Tensor) -> Tensor:
        """What a sublayer is given."""
        return self.norm(place)(hidden_BTD) if self.anatomy.order == "pre" else hidden_BTD

    def _after(self, place: Place, pieces: Iterable[Tensor]) -> None:
        """What becomes of hidden states to which a sublayer's output was added."""
        for h_BTD in pieces if self.anatomy.order == "post" else ():
            h_BTD.copy_(self.norm(place)(h_BTD))

    def _attention(self, hidden_BTD: Tensor) -> Tensor:
        """What the output projection is given: the heads' mixed values [B, T, A E]."""
        module, _, name = self.anatomy.linears["o"].name.rpartition(".")
        attention: Any = self.layer.get_submodule(module)
        normed_BTD = self._before("attention", hidden_BTD)
        o_proj = getattr(attention, name)
        setattr(attention, name, nn.Identity())
        try:
            return attention(normed_BTD, **self._positions(hidden_BTD))[0]
        finally:
            setattr(attention, name, o_proj)

    def _positions(self, hidden_BTD: Tensor) -> dict[str, Any]:
        """What transformers' attention is told of the places 0..T-1: their rotation, and who sees whom."""
        T, window, device = hidden_BTD.shape[1], self.anatomy.attention.window, hidden_BTD.device
        seen_11TT = None  # itself and all before it
        if window is not None and window < T:
            seen_11TT = torch.ones(1, 1, T, T, dtype=torch.bool, device=device).tril().triu(1 - window)
        rotation = self.rotary(hidden_BTD, torch.arange(T, device=device).unsqueeze(0))
        return {"position_embeddings": rotation, "attention_mask": seen_11TT}

    def _activated(self, hidden_BTD: Tensor) -> Tensor:
        """What the down projection is given: silu(gate) * up [B, T, F]."""
        normed_BTD = self._before("feed_forward", hidden_BTD)
        return nn.functional.silu(self.linear("gate")(normed_BTD)) * self.linear("up")(normed_BTD)


def _moved(pieces: Iterable[Tensor], input_of: Function, linear: nn.Linear) -> Iterator[Tensor]:
    """The linear's input for each piece of hidden states; its output is added to them afterwards."""
    for h_BTD in pieces:
        x_BTK = input_of(h_BTD)
        yield x_BTK
        h_BTD += linear(x_BTK)


def in_pieces(rows_BT: Tensor) -> tuple[Tensor, ...]:
    """Rows of T tokens (and what belongs to each token) in parts that are small enough to compute on."""
    return rows_BT.split(max(1, PIECE_TOKENS // rows_BT.shape[1]))


def empty_model(config: PretrainedConfig) -> Any:
    """transformers' model of that configuration, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def blocks(source: Checkpoint, first: int = 0, device: str = "cpu") -> Iterator[Block]:
    """The model's layers from `first` on, one in memory at a time, on the device."""
    refuse_quantized(source)
    if source.architecture.is_encoder:
        from gossamer.modules import encoder

        yield from encoder.blocks(source, first, device)
        return
    anatomy, config = source.architecture, model_config(source.architecture, source.config)
    config._attn_implementation = "sdpa"
    skeleton = empty_model(config).get_decoder()
    rotary = type(skeleton.rotary_emb)(config).to(device)
    for index, empty in enumerate(skeleton.layers[first:], first):
        layer, prefix = type(empty)(config, index), anatomy.prefix(index)
        if anatomy.blocks[index].fused:
            from gossamer.modules.unfused import unfuse

            unfuse(layer, anatomy.blocks[index])
        yield Block(index, prefix, anatomy.blocks[index], filled(layer, source, prefix).to(device), rotary)


@torch.no_grad()
def filled(layer: nn.Module, source: Checkpoint, prefix: str) -> nn.Module:
    """A layer in float32 with the checkpoint's parameters."""
    for name, parameter in layer.float().eval().named_parameters():
        parameter.copy_(tensor(source, f"{prefix}{name}"))
    return layer


def write_block(target: Derived, block: Block) -> None:
    """Store every parameter of the layer, in the parent's dtypes."""
    for name, parameter in block.layer.named_parameters():
        write_tensor(target, f"{block.prefix}{name}", parameter)


@torch.no_grad()
def embed(source: Checkpoint, ids_BT: Tensor) -> Tensor:
    """Token ids -> float32 [B, T, D]."""
    if source.architecture.is_encoder:
        from gossamer.modules import encoder

        return encoder.embed(source, ids_BT)
    return nn.functional.embedding(ids_BT, tensor(source, f"{source.architecture.embedding}.weight").float())
