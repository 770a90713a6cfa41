"""ModernBERT: an encoder with norms before sublayers, rope, gated GELU, and windows in most layers.

h = h + o(attention(q, k, v of norm(h)))         layer 0 has no norm there; embedded tokens are normalized
h = h + down(gelu(gate(n)) * up(n))              n = norm(h); after the last layer, another norm
"""

from collections.abc import Mapping

from gossamer.architecture import encoder
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
from gossamer.architecture.windows import FULL, SLIDING, named_types
from gossamer.errors import CheckpointError, UnsupportedError

ENDINGS = encoder.ENDINGS
SUMMARY = "ModernBertModel"
FUSED: Mapping[str, tuple[Role, ...]] = {"attn.Wqkv": ("q", "k", "v"), "mlp.Wi": ("gate", "up")}
POOLINGS = ("cls", "mean")
THETAS = {FULL: ("global_rope_theta", 160_000.0), SLIDING: ("local_rope_theta", 10_000.0)}


def anatomy(config: Config) -> Anatomy:
    """Blocks of up to three kinds: the first one, and those with and without a window."""
    config = config.with_defaults(
        vocab_size=50368, hidden_size=768, intermediate_size=1152, num_hidden_layers=22,
        num_attention_heads=12, max_position_embeddings=8192, norm_eps=1e-5, local_attention=128,
        bos_token_id=50281, eos_token_id=50282,
    )  # fmt: skip
    config.expect(hidden_activation="gelu", rope_scaling=None)
    D, ending = config.size("hidden_size"), encoder.ending(config)
    prefix = "model." if ending.startswith("For") else ""
    heads = {layer_type: attention(config, layer_type) for layer_type in (FULL, SLIDING)}
    types = layer_types(config)
    later = {layer_type: block(config, heads[layer_type]) for layer_type in {*types}}
    blocks = [block(config, heads[types[0]], is_first=True), *(later[it] for it in types[1:])]
    bos = config.token_ids("bos_token_id")
    return Anatomy(
        model_type="modernbert",
        blocks=tuple(blocks),
        hidden_size=D,
        vocab_size=config.size("vocab_size"),
        final_norm=norm(config, f"{prefix}final_norm"),
        norm_eps=config.number("norm_eps"),
        tie_word_embeddings=False,
        max_position_embeddings=config.size("max_position_embeddings"),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=config.token_ids("eos_token_id"),
        embedding=f"{prefix}embeddings.tok_embeddings",
        head=None,
        task=encoder.TASKS[ending],
        block=f"{prefix}layers",
        added=(added := encoder.Added(norm(config, f"{prefix}embeddings.norm"))),
        beside=added.shapes() | head(config, ending),
        ignored=r"decoder\.weight" if ending == "ForMaskedLM" else r"(?!)",
    )


def norm(config: Config, name: str) -> Norm:
    """A LayerNorm, whose bias is a matter of the configuration."""
    return Norm(name, config.size("hidden_size"), kind="layer", bias=config.flag("norm_bias"))


def layer_types(config: Config) -> list[str]:
    """Of each layer, whether its tokens see all others or a window of them.

    Where `layer_types` does not say, all do in the first layer and every `global_attn_every_n_layers`-th.
    """
    if config.get("layer_types") is not None:
        return named_types(config)
    interval = config.size("global_attn_every_n_layers", 3)
    return [SLIDING if layer % interval else FULL for layer in range(config.num_layers())]


def attention(config: Config, layer_type: str) -> Attention:
    """Heads of a layer of that type; a window has `local_attention` // 2 tokens on each side."""
    D, num_heads = config.size("hidden_size"), config.size("num_attention_heads")
    half = config.size("local_attention") // 2
    if D % num_heads:
        raise CheckpointError(f"{config.source}: hidden_size {D} does not divide by {num_heads} heads")
    config.expect(head_dim=D // num_heads, sliding_window=half)
    if D // num_heads % 2:
        raise UnsupportedError(
            f"{config.source}: head_dim {D // num_heads} is odd; rotary embeddings need pairs"
        )
    key, default = THETAS[layer_type]
    parameters = config.section("rope_parameters") or Config({}, config.source)
    if settings := parameters.section(layer_type):
        settings.expect(rope_type="default", type="default", partial_rotary_factor=1.0)
    theta = config.number(key, default)
    rope = Rope(settings.number("rope_theta", theta) if settings else theta)
    window = 2 * half + 1 if layer_type == SLIDING else None
    return Attention(num_heads, num_heads, D // num_heads, rope, window, causal=False)


def block(config: Config, heads: Attention, is_first: bool = False) -> Block:
    """A block, whose biases are a matter of the configuration."""
    D, F = config.size("hidden_size"), config.size("intermediate_size")
    in_attention, in_mlp = config.flag("attention_bias"), config.flag("mlp_bias")
    norms: dict[Place, Norm] = {
        "attention": norm(config, "attn_norm"),
        "feed_forward": norm(config, "mlp_norm"),
    }
    if is_first:
        del norms["attention"]
    q, k, v = (Linear(role, f"attn.{role}_proj", D, D, in_attention) for role in FUSED["attn.Wqkv"])
    gate, up = (Linear(role, f"mlp.{role}_proj", F, D, in_mlp) for role in FUSED["mlp.Wi"])
    groups = (
        Group((q, k, v), "", "none") if is_first else Group((q, k, v), "attn_norm", "norm"),
        Group((Linear("o", "attn.Wo", D, D, in_attention),), v.name, "value rows"),
        Group((gate, up), "mlp_norm", "norm"),
        Group((Linear("down", "mlp.Wo", D, F, in_mlp),), up.name, "rows"),
    )
    return Block(groups, norms, heads, FeedForward(F, "geglu"), FUSED)


def head(config: Config, ending: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a task: a linear with GELU and a norm, then what makes scores of labels or words."""
    if ending == "Model":
        return {}
    D = config.size("hidden_size")
    config.expect(classifier_activation="gelu")
    if ending == "ForMaskedLM":
        config.expect(tie_word_embeddings=True)
    if (found := config.get("classifier_pooling") or POOLINGS[0]) not in POOLINGS:
        raise CheckpointError(f"{config.source}: classifier_pooling is {found!r:.80}; expected cls or mean")
    shapes: dict[str, tuple[int, ...]] = {"head.dense.weight": (D, D)}
    if config.flag("classifier_bias"):
        shapes["head.dense.bias"] = (D,)
    shapes |= {name: (size,) for name, size in norm(config, "head.norm").vectors().items()}
    if ending == "ForMaskedLM" and config.flag("decoder_bias", True):
        shapes["decoder.bias"] = (config.size("vocab_size"),)
    return shapes | encoder.plain_head(config, ending, of_spans="classifier")
