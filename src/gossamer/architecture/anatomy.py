"""What a decoder is made of, as one value that everything else reads.

A `Block` lists its linears in groups that share an input, says which norm or linear produces that input, and
where the norms are; `Anatomy` is the blocks between an embedding and a head. Checkpoint shapes, the walk
through a layer, smoothing, the memory estimate, the packed file, synthetic models, `inspect`, `verify` and
the native engine are all driven by it, and none of them knows a family's name. A family (one file in
`families/`) makes this value from a `config.json`.

Names of tensors are Hugging Face's. Within a block they are relative to it: `self_attn.q_proj`.

Shapes: D hidden_size, N outputs, K inputs, A query heads, G key/value heads, E head width, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from gossamer.architecture.rope import Rope

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"

Role = Literal["q", "k", "v", "o", "gate", "up", "down"]
Place = Literal["attention", "feed_forward", "query", "key", "after_attention", "after_feed_forward"]


@dataclass(frozen=True)
class Linear:
    """One matrix [rows, columns] of a block, and whether a bias [rows] is added to its product.

    `prunable` is False for a matrix whose zeros would cost too much for what they save, such as a router.
    """

    role: Role
    name: str
    rows: int
    columns: int
    bias: bool = False
    prunable: bool = True


@dataclass(frozen=True)
class Norm:
    """An RMSNorm over the last `width` numbers; its factor is weight + `offset` (1 in Gemma, else 0)."""

    name: str
    width: int
    offset: float = 0.0


@dataclass(frozen=True)
class Group:
    """Linears that are given the same input, and how that input may be scaled from outside.

    Smoothing divides each input channel by a factor and multiplies the weights by it. The division is folded
    into the `producer` of the input: by `fold` "norm" into a norm's weight, by "rows" into the rows of a
    linear, by "value rows" into the rows of the value projection, where the query heads that share a
    key/value head must share their factors.
    """

    linears: tuple[Linear, ...]
    producer: str
    fold: Literal["norm", "rows", "value rows"]

    @property
    def adds_to_hidden(self) -> bool:
        """Whether it is one linear whose output is added to the hidden states."""
        return self.linears[0].role in ("o", "down")


@dataclass(frozen=True)
class Attention:
    """A query heads, G key/value heads of E numbers each.

    `rope` is None where positions are not encoded; `window` is how many positions a token sees, itself
    included (None: all before it); `softcap` squashes scores to that magnitude (None: not at all).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class FeedForward:
    """`kind` "swiglu": down(silu(gate(x)) * up(x)). With `num_experts`, a router chooses among so many."""

    width: int
    kind: Literal["swiglu"] = "swiglu"
    num_experts: int = 0


@dataclass(frozen=True)
class Block:
    """One layer: attention, then feed-forward, each added to the hidden states.

    `fused`: name of a matrix in files -> the roles of the linears that are its rows, in their order.
    """

    groups: tuple[Group, ...]
    norms: Mapping[Place, Norm]
    attention: Attention
    feed_forward: FeedForward
    fused: Mapping[str, tuple[Role, ...]] = field(default_factory=dict)

    @cached_property
    def linears(self) -> dict[Role, Linear]:
        """All matrices by role, in the order in which they are used."""
        return {linear.role: linear for group in self.groups for linear in group.linears}

    def vectors(self) -> Iterator[tuple[str, int]]:
        """Name and length of every norm's weight and every bias."""
        for norm in self.norms.values():
            yield f"{norm.name}.weight", norm.width
        for linear in self.linears.values():
            if linear.bias:
                yield f"{linear.name}.bias", linear.rows


@dataclass(frozen=True)
class Anatomy:
    """A whole model: embedding, blocks, a last norm, and a head (the embedding itself where they are tied).

    `model_type` is transformers' word for the family. `embedding_scale` multiplies the embedded tokens,
    `logit_softcap` squashes the logits.
    """

    model_type: str
    blocks: tuple[Block, ...] = field(repr=False)
    hidden_size: int
    vocab_size: int
    final_norm: Norm
    norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    embedding_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def attention(self) -> Attention:
        """The first block's, whose heads all blocks have; rope and window may differ from block to block."""
        return self.blocks[0].attention

    def prefix(self, layer: int) -> str:
        """What stands before the names of a block's tensors."""
        return f"model.layers.{layer}."

    def linears(self, layer: int) -> dict[str, Linear]:
        """Full name -> matrix, of one block."""
        return {f"{self.prefix(layer)}{it.name}": it for it in self.blocks[layer].linears.values()}

    def linear_names(self) -> list[str]:
        """Full name of every matrix that may be pruned, block by block."""
        linears = [found for layer in range(self.num_layers) for found in self.linears(layer).items()]
        return [name for name, linear in linears if linear.prunable]

    @cached_property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of an unquantized checkpoint and its shape; a tied head is none."""
        vocabulary = (self.vocab_size, self.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": vocabulary}
        for layer, block in enumerate(self.blocks):
            matrices = self.linears(layer).items()
            shapes |= {f"{name}.weight": (it.rows, it.columns) for name, it in matrices}
            shapes |= {f"{self.prefix(layer)}{name}": (size,) for name, size in block.vectors()}
        shapes[f"{self.final_norm.name}.weight"] = (self.final_norm.width,)
        return shapes if self.tie_word_embeddings else shapes | {f"{HEAD}.weight": vocabulary}
