"""The block that Llama made standard, and the decoder around it; families say how theirs differs.

h = h + o(attention(q, k, v of norm(h)))
h = h + down(silu(gate(n)) * up(n))         n = norm(h)
"""

from collections.abc import Collection, Mapping, Sequence

from gossamer.architecture.anatomy import (
    Anatomy,
    Attention,
    Block,
    FeedForward,
    Group,
    Linear,
    Norm,
    Place,
    Role,
)
from gossamer.architecture.config import Config
from gossamer.architecture.rope import Rope
from gossamer.errors import CheckpointError, UnsupportedError


def attention(config: Config, rope: Rope | None) -> Attention:
    """Heads as the configuration has them; CheckpointError where they do not fit together.

    Where it does not say, there are as many key/value heads as query heads, which share out the hidden size.
    """
    num_heads = config.size("num_attention_heads")
    num_kv_heads = config.size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{config.source}: {num_heads} query heads do not divide by {num_kv_heads} key heads"
        )
    head_dim = config.size("head_dim", config.size("hidden_size") // num_heads)
    if head_dim % 2:
        raise UnsupportedError(f"{config.source}: head_dim {head_dim} is odd; rotary embeddings need pairs")
    return Attention(num_heads, num_kv_heads, head_dim, rope)


def biases(config: Config) -> list[Role]:
    """The linears that have a bias, by the two flags of Llama's configuration."""
    attention: list[Role] = ["q", "k", "v", "o"]
    feed_forward: list[Role] = ["gate", "up", "down"]
    return attention * config.flag("attention_bias") + feed_forward * config.flag("mlp_bias")


def block(
    config: Config, heads: Attention, biases: Collection[Role] = (), norms: Mapping[Place, Norm] | None = None
) -> Block:
    """A block with a bias in the linears of these roles, and with further norms beside its two."""
    D, F = config.size("hidden_size"), config.size("intermediate_size")
    q, kv = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    shapes: dict[Role, tuple[int, int]] = {
        "q": (q, D), "k": (kv, D), "v": (kv, D), "o": (D, q), "gate": (F, D), "up": (F, D), "down": (D, F)
    }  # fmt: skip

    def linears(module: str, *roles: Role) -> tuple[Linear, ...]:
        return tuple(
            Linear(role, f"{module}.{role}_proj", *shapes[role], bias=role in biases) for role in roles
        )

    before: dict[Place, Norm] = {
        "attention": Norm("input_layernorm", D),
        "feed_forward": Norm("post_attention_layernorm", D),
    }
    groups = (
        Group(linears("self_attn", "q", "k", "v"), "input_layernorm", "norm"),
        Group(linears("self_attn", "o"), "self_attn.v_proj", "value rows"),
        Group(linears("mlp", "gate", "up"), "post_attention_layernorm", "norm"),
        Group(linears("mlp", "down"), "mlp.up_proj", "rows"),
    )
    return Block(groups, before | dict(norms or {}), heads, FeedForward(F))


def model(config: Config, model_type: str, blocks: Sequence[Block]) -> Anatomy:
    """The decoder around these blocks."""
    bos, hidden_size = config.token_ids("bos_token_id"), config.size("hidden_size")
    return Anatomy(
        model_type=model_type,
        blocks=tuple(blocks),
        hidden_size=hidden_size,
        vocab_size=config.size("vocab_size"),
        final_norm=Norm("model.norm", hidden_size),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=config.flag("tie_word_embeddings"),
        max_position_embeddings=config.size("max_position_embeddings", 2048),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=config.token_ids("eos_token_id"),
    )
