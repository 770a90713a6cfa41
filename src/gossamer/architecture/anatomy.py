"""What a model is made of, as one value that everything else reads.

A `Block` lists its linears in groups that share an input, says which norm or linear produces that input, and
where the norms are; `Anatomy` is the blocks between an embedding and a head. Checkpoint shapes, the walk
through a layer, smoothing, the packed file, synthetic models, `inspect` and the native engine are all driven
by it, and none of them knows a family's name. A family (a file in `families/`) makes it of a `config.json`.

Names of tensors are Hugging Face's. Within a block they are relative to it: `self_attn.q_proj`.

Shapes: D hidden_size, N outputs, K inputs, A query heads, G key/value heads, E head width, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from gossamer.architecture.rope import Rope

if TYPE_CHECKING:
    from gossamer.architecture.encoder import Added

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"  # a decoder's

Role = Literal["q", "k", "v", "o", "gate", "up", "down"]
Task = Literal["generation", "embedding", "masked", "sequence", "tokens", "spans"]
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
    """Of `width` numbers: "rms" or "layer"; its factor is weight + `offset` (Gemma: 1)."""

    name: str
    width: int
    offset: float = 0.0
    kind: Literal["rms", "layer"] = "rms"
    bias: bool = False

    def vectors(self) -> dict[str, int]:
        """Name and length of its weight, and of its bias where it has one."""
        return {f"{self.name}.{it}": self.width for it in ("weight", "bias")[: 1 + self.bias]}


@dataclass(frozen=True)
class Group:
    """Linears that are given the same input, and how that input may be scaled from outside.

    Smoothing divides each input channel by a factor and multiplies the weights by it. The division is folded
    into the `producer` of the input: by `fold` "norm" into a norm's weight, by "rows" into the rows of a
    linear, by "value rows" into the rows of the value projection, where the query heads that share a
    key/value head must share their factors, by "none" nowhere (then there is no producer that it could be).
    """

    linears: tuple[Linear, ...]
    producer: str
    fold: Literal["norm", "rows", "value rows", "none"]

    @property
    def adds_to_hidden(self) -> bool:
        """Whether it is one linear whose output is added to the hidden states."""
        return self.linears[0].role in ("o", "down")


@dataclass(frozen=True)
class Attention:
    """A query heads, G key/value heads of E numbers each.

    `rope` is None where positions are not encoded; `window` is how many positions a token sees, itself
    included (None: all before it); `softcap` squashes scores to that magnitude (None: not at all). Where it
    is not `causal`, it sees what is behind it as well, as in an encoder: of a window as much as before it.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None
    window: int | None = None
    softcap: float | None = None
    causal: bool = True


@dataclass(frozen=True)
class FeedForward:
    """`kind`: down(silu(gate(x)) * up(x)), the same with gelu, or down(gelu(up(x))); a router's experts."""

    width: int
    kind: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    num_experts: int = 0


@dataclass(frozen=True)
class Block:
    """One layer: attention, then feed-forward, each added to the hidden states.

    `order`: whether the norm of a sublayer, if it has one, is applied to its input ("pre"), or to that sum.
    `fused`: name of a matrix in files -> the roles of the linears that are its rows, in their order.
    """

    groups: tuple[Group, ...]
    norms: Mapping[Place, Norm]
    attention: Attention
    feed_forward: FeedForward
    fused: Mapping[str, tuple[Role, ...]] = field(default_factory=dict)
    order: Literal["pre", "post"] = "pre"

    @cached_property
    def linears(self) -> dict[Role, Linear]:
        """All matrices by role, in the order in which they are used."""
        return {linear.role: linear for group in self.groups for linear in group.linears}

    def vectors(self) -> Iterator[tuple[str, int]]:
        """Name and length of every norm's weight and every bias."""
        for norm in self.norms.values():
            yield from norm.vectors().items()
        for linear in self.linears.values():
            if linear.bias:
                yield f"{linear.name}.bias", linear.rows


@dataclass(frozen=True)
class Anatomy:
    """A whole model: embedding, blocks, maybe a last norm, a head (the embedding itself where they are tied).

    `model_type` is transformers' word for the family, `task` what its head is for. `embedding_scale`
    multiplies the embedded tokens, `logit_softcap` squashes the logits. An encoder has no `head`; `added`
    goes to what it embeds. No stage computes with tensors `beside` all these; files may lack `optional` ones,
    and nothing reads those whose names match `ignored`.
    """

    model_type: str
    blocks: tuple[Block, ...] = field(repr=False)
    hidden_size: int
    vocab_size: int
    final_norm: Norm | None
    norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    embedding_scale: float = 1.0
    logit_softcap: float | None = None
    embedding: str = EMBEDDING
    head: str | None = HEAD
    task: Task = "generation"
    block: str = "model.layers"
    added: "Added | None" = None
    beside: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    optional: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ignored: str = r".*rotary_emb\.inv_freq"

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def is_encoder(self) -> bool:
        """Whether tokens see those behind them, so that nothing is foretold."""
        return not self.attention.causal

    @property
    def attention(self) -> Attention:
        """The first block's, whose heads all blocks have; rope and window may differ from block to block."""
        return self.blocks[0].attention

    @property
    def logits(self) -> str | None:
        """Name of the matrix that makes the logits: the head, or the embedding where they are tied."""
        return self.embedding if self.tie_word_embeddings else self.head

    def prefix(self, layer: int) -> str:
        """What stands before the names of a block's tensors."""
        return f"{self.block}.{layer}."

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
        shapes: dict[str, tuple[int, ...]] = {f"{self.embedding}.weight": vocabulary}
        for layer, block in enumerate(self.blocks):
            matrices = self.linears(layer).items()
            shapes |= {f"{name}.weight": (it.rows, it.columns) for name, it in matrices}
            shapes |= {f"{self.prefix(layer)}{name}": (size,) for name, size in block.vectors()}
        if self.final_norm is not None:
            shapes |= {name: (size,) for name, size in self.final_norm.vectors().items()}
        head = {} if self.head is None or self.tie_word_embeddings else {f"{self.head}.weight": vocabulary}
        return {**shapes, **head, **self.beside}
