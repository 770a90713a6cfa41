"""The block that BERT made standard, and the encoder around it; its family says which heads there are.

h = norm(h + o(attention(q, k, v of h)))            attention without a mask: tokens see one another
h = norm(h + down(gelu(up(h))))
"""

from collections.abc import Mapping
from typing import Any

from gossamer.architecture.anatomy import Anatomy, Attention, Block, FeedForward, Group, Linear, Norm, Role
from gossamer.architecture.config import Config
from gossamer.architecture.encoder import Added
from gossamer.errors import CheckpointError


def block(config: Config) -> Block:
    """A block, all of whose linears have a bias."""
    D, F, num_heads = (
        config.size(key) for key in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    if D % num_heads:
        raise CheckpointError(f"{config.source}: hidden_size {D} does not divide by {num_heads} heads")

    def linear(role: Role, name: str, rows: int = D, columns: int = D) -> Linear:
        return Linear(role, name, rows, columns, bias=True)

    q, k, v = (linear(role, f"attention.self.{name}") for role, name in _QKV.items())
    groups = (
        Group((q, k, v), "", "none"),
        Group((linear("o", "attention.output.dense"),), v.name, "value rows"),
        Group((linear("up", "intermediate.dense", F, D),), "", "none"),
        Group((linear("down", "output.dense", D, F),), "", "none"),
    )
    return Block(
        groups=groups,
        norms={
            "attention": Norm("attention.output.LayerNorm", D, kind="layer", bias=True),
            "feed_forward": Norm("output.LayerNorm", D, kind="layer", bias=True),
        },
        attention=Attention(num_heads, num_heads, D // num_heads, rope=None, causal=False),
        feed_forward=FeedForward(F, "gelu"),
        order="post",
    )


_QKV: dict[Role, str] = {"q": "query", "k": "key", "v": "value"}


def model(
    config: Config,
    model_type: str,
    prefix: str,
    offset: int,
    beside: Mapping[str, tuple[int, ...]],
    **heads: Any,
) -> Anatomy:
    """The encoder of such blocks: `prefix` stands before all its names, positions begin at `offset`.

    `beside` are the tensors of its head; `heads` is what the anatomy says of its `task`, and of `optional`
    and `ignored` tensors. UnsupportedError for what other BERTs compute.
    """
    config.expect(
        hidden_act="gelu", position_embedding_type="absolute", is_decoder=False, add_cross_attention=False,
        chunk_size_feed_forward=0,
    )  # fmt: skip
    if heads["task"] == "masked":
        config.expect(tie_word_embeddings=True)
    hidden_size, num_positions = config.size("hidden_size"), config.size("max_position_embeddings")
    if num_positions <= offset:
        raise CheckpointError(
            f"{config.source}: max_position_embeddings is {num_positions}; expected more than {offset}, the "
            "first position's row"
        )
    embeddings = f"{prefix}embeddings"
    added = Added(
        positions=f"{embeddings}.position_embeddings",
        num_positions=num_positions,
        offset=offset,
        types=f"{embeddings}.token_type_embeddings",
        num_types=config.size("type_vocab_size"),
        norm=Norm(f"{embeddings}.LayerNorm", hidden_size, kind="layer", bias=True),
    )
    bos = config.token_ids("bos_token_id")
    return Anatomy(
        model_type=model_type,
        blocks=(block(config),) * config.num_layers(),
        hidden_size=hidden_size,
        vocab_size=config.size("vocab_size"),
        final_norm=None,
        norm_eps=config.number("layer_norm_eps"),
        tie_word_embeddings=False,
        max_position_embeddings=num_positions - offset,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=config.token_ids("eos_token_id"),
        embedding=f"{embeddings}.word_embeddings",
        head=None,
        block=f"{prefix}encoder.layer",
        added=added,
        beside={**added.shapes(), **beside},
        **heads,
    )
