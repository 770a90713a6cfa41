"""The block that BERT made standard, and the encoder around it; its family says which heads there are.

h = norm(h + o(attention(q, k, v of h)))            attention without a mask: tokens see one another
h = norm(h + down(gelu(up(h))))
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gossamer.architecture.anatomy import (
    Anatomy,
    Attention,
    Block,
    FeedForward,
    Group,
    Linear,
    Norm,
    Role,
    Task,
)
from gossamer.architecture.config import Config
from gossamer.errors import CheckpointError

TASKS: dict[str, Task] = {
    "Model": "embedding",
    "ForMaskedLM": "masked",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "spans",
}
ENDINGS = tuple(TASKS)  # of the names of classes


@dataclass(frozen=True)
class Added:
    """What is added to embedded tokens: rows of `positions` from `offset` on, and of `types`; then a `norm`.

    `positions` and `types` are names of tables with so many rows.
    """

    positions: str
    num_positions: int
    offset: int
    types: str
    num_types: int
    norm: Norm

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensors and their shapes."""
        width = self.norm.width
        tables = {self.positions: (self.num_positions, width), self.types: (self.num_types, width)}
        vectors = {name: (size,) for name, size in self.norm.vectors().items()}
        return {f"{name}.weight": shape for name, shape in tables.items()} | vectors


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
            "attention": Norm("attention.output.LayerNorm", D, kind="layer"),
            "feed_forward": Norm("output.LayerNorm", D, kind="layer"),
        },
        attention=Attention(num_heads, num_heads, D // num_heads, rope=None, causal=False),
        feed_forward=FeedForward(F, "gelu"),
        order="post",
    )


_QKV: dict[Role, str] = {"q": "query", "k": "key", "v": "value"}


def ending(config: Config) -> str:
    """Which of `ENDINGS` the model's class has; `Model` where the configuration names no class."""
    (name,) = config.get("architectures") or ["Model"]
    return next(it for it in ENDINGS if name.endswith(it))


def labels(config: Config) -> list[str]:
    """Names of the classes of a head, by their numbers; transformers' two where there are none."""
    found = config.get("id2label")
    if not found:
        return [f"LABEL_{index}" for index in range(config.size("num_labels", 2))]
    numbers = [str(index) for index in range(len(found))]
    if not isinstance(found, Mapping) or {*found} != {*numbers}:
        raise CheckpointError(
            f"{config.source}: id2label is {found!r:.80}; expected a name for each number from 0 on"
        )
    return [str(found[number]) for number in numbers]


def plain_head(config: Config, ending: str) -> dict[str, tuple[int, ...]]:
    """The matrix and bias that make scores of labels, or of a span's two ends; nothing for other tasks."""
    name = {
        "ForSequenceClassification": "classifier", "ForTokenClassification": "classifier",
        "ForQuestionAnswering": "qa_outputs",
    }.get(ending)  # fmt: skip
    num_labels = 2 if name == "qa_outputs" else len(labels(config))
    shapes = {f"{name}.weight": (num_labels, config.size("hidden_size")), f"{name}.bias": (num_labels,)}
    return shapes if name else {}


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
        norm=Norm(f"{embeddings}.LayerNorm", hidden_size, kind="layer"),
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
