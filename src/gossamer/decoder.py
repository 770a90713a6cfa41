"""transformers' own Llama, filled from a checkpoint: whole to train, layer by layer to compress."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from gossamer.architecture.llama import GROUPS
from gossamer.checkpoint.directory import Checkpoint, Derived
from gossamer.errors import UnsupportedError

TORCH_DTYPE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}
PIECE_TOKENS = 4096
KEPT_BYTES = 1 << 30


def tensor(source: Checkpoint, name: str) -> Tensor:
    """One tensor in its stored dtype (a copy); same errors as `Checkpoint.raw`."""
    copied = torch.from_numpy(source.raw(name).copy())
    return copied.view(torch.bfloat16) if source.dtype(name) == "BF16" else copied


def write_tensor(target: Derived, name: str, value: Tensor) -> None:
    """Store one tensor in the dtype that its parent has."""
    dtype = target.parent.dtype(name)
    stored = value.detach().to("cpu", TORCH_DTYPE[dtype]).contiguous()
    target.write(name, (stored.view(torch.uint16) if dtype == "BF16" else stored).numpy(), dtype)


def llama_config(source: Checkpoint) -> LlamaConfig:
    """transformers' configuration of the checkpoint."""
    return LlamaConfig.from_dict(dict(source.config))


def load_model(source: Checkpoint, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The whole model in `dtype`, on the CPU; raises UnsupportedError for a quantized directory."""
    refuse_quantized(source)
    config = llama_config(source)
    config.dtype = dtype
    model = LlamaForCausalLM(config)
    nn.Module.to(model, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensor(source, name))
    model.eval()
    return model


def write_model(model: LlamaForCausalLM, target: Derived) -> None:
    """Store every weight under its Hugging Face name, in the parent's dtypes; shards are gathered."""
    weights = model.state_dict()
    for name in target.parent.names:
        weight = weights[name]
        write_tensor(target, name, weight.full_tensor() if isinstance(weight, DTensor) else weight)


def refuse_quantized(source: Checkpoint) -> None:
    """Raise UnsupportedError if the directory's linears are already integers."""
    if "quantization_config" in source.config:
        raise UnsupportedError(
            f"{source.path}: already quantized; give the directory it was made from (quantize comes last)"
        )


@dataclass(frozen=True)
class Block:
    """Decoder layer `index`: transformers' own module, in float32, filled from the checkpoint."""

    index: int
    layer: LlamaDecoderLayer
    rotary: LlamaRotaryEmbedding

    @cached_property
    def linears(self) -> dict[str, nn.Linear]:
        """The seven linears by checkpoint name, in the order q k v o gate up down."""
        return {name: linear for group in self.groups for name, linear in group.items()}

    @cached_property
    def groups(self) -> list[dict[str, nn.Linear]]:
        """The linears that share an input: q,k,v | o | gate,up | down."""
        prefix = f"model.layers.{self.index}"
        return [{f"{prefix}.{name}": self._linear(name) for name in group} for group in GROUPS]

    def _linear(self, name: str) -> nn.Linear:
        linear = self.layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return linear

    @torch.no_grad()
    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        """The layer's output [B, T, D] under causal attention, positions 0..T-1."""
        positions_1T = torch.arange(hidden_BTD.shape[1]).unsqueeze(0)
        position_embeddings = self.rotary(hidden_BTD, positions_1T)
        return self.layer(hidden_BTD, position_embeddings=position_embeddings, position_ids=positions_1T)

    def walk(self, hidden_BTD: Tensor) -> Iterator[tuple[dict[str, nn.Linear], Iterable[Tensor]]]:
        """Go through the layer group by group: yields each group and its input [rows, T, K] in pieces.

        What the caller does to a group's weights before it asks for the next one counts from there on, so
        later groups see the changed earlier ones (GPTQ's "true sequential") for about one forward pass.
        At the end `hidden_BTD` holds the layer's output.
        """
        layer, (qkv, o, gate_up, down) = self.layer.requires_grad_(False), self.groups
        rows = max(1, PIECE_TOKENS // hidden_BTD.shape[1])
        pieces = hidden_BTD.split(rows)
        yield qkv, (layer.input_layernorm(h_BTD) for h_BTD in pieces)
        mixed = [self._attention(h_BTD) for h_BTD in pieces]
        yield o, mixed
        for h_BTD in pieces:
            h_BTD += layer.self_attn.o_proj(mixed.pop(0))
        yield gate_up, (layer.post_attention_layernorm(h_BTD) for h_BTD in pieces)
        num_bytes = 4 * hidden_BTD[..., 0].numel() * layer.mlp.down_proj.in_features
        gated = [self._gated(h_BTD) for h_BTD in pieces] if num_bytes <= KEPT_BYTES else None
        yield down, gated or (self._gated(h_BTD) for h_BTD in pieces)
        for index, h_BTD in enumerate(pieces):
            h_BTD += layer.mlp.down_proj(gated[index] if gated else self._gated(h_BTD))

    def _attention(self, hidden_BTD: Tensor) -> Tensor:
        """What o_proj is given: the heads' mixed values [B, T, A E]."""
        attention: Any = self.layer.self_attn
        positions_1T = torch.arange(hidden_BTD.shape[1]).unsqueeze(0)
        normed_BTD = self.layer.input_layernorm(hidden_BTD)
        o_proj, attention.o_proj = attention.o_proj, nn.Identity()
        try:
            return attention(normed_BTD, self.rotary(normed_BTD, positions_1T), attention_mask=None)[0]
        finally:
            attention.o_proj = o_proj

    def _gated(self, hidden_BTD: Tensor) -> Tensor:
        """What down_proj is given: silu(gate) * up [B, T, F]."""
        mlp, normed_BTD = self.layer.mlp, self.layer.post_attention_layernorm(hidden_BTD)
        return mlp.act_fn(mlp.gate_proj(normed_BTD)) * mlp.up_proj(normed_BTD)


def blocks(source: Checkpoint) -> Iterator[Block]:
    """The decoder layers, one in memory at a time."""
    refuse_quantized(source)
    config = llama_config(source)
    config._attn_implementation = "sdpa"
    rotary = LlamaRotaryEmbedding(config)
    for index in range(source.architecture.num_layers):
        layer = LlamaDecoderLayer(config, index).float().eval()
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter.copy_(tensor(source, f"model.layers.{index}.{name}"))
        yield Block(index, layer, rotary)


def write_block(target: Derived, block: Block) -> None:
    """Store every parameter of the layer, in the parent's dtypes."""
    for name, parameter in block.layer.named_parameters():
        write_tensor(target, f"model.layers.{block.index}.{name}", parameter)


@torch.no_grad()
def embed(source: Checkpoint, ids_BT: Tensor) -> Tensor:
    """Token ids -> float32 [B, T, D]."""
    return nn.functional.embedding(ids_BT, tensor(source, "model.embed_tokens.weight").float())


@torch.no_grad()
def head_logits(source: Checkpoint, hidden_BTD: Tensor) -> Tensor:
    """The last layer's output -> float32 logits [B, T, V]."""
    norm = LlamaRMSNorm(source.architecture.hidden_size, source.architecture.rms_norm_eps)
    norm.weight.copy_(tensor(source, "model.norm.weight"))
    tied = source.architecture.tie_word_embeddings
    head_VD = tensor(source, "model.embed_tokens.weight" if tied else "lm_head.weight").float()
    return norm(hidden_BTD) @ head_VD.T
