"""BERT: words, positions and types are added, then blocks with a norm after each sublayer."""

from gossamer.architecture import encoder, postnorm
from gossamer.architecture.anatomy import Anatomy
from gossamer.architecture.config import Config

ENDINGS = encoder.ENDINGS
SUMMARY = "BertModel"
TRANSFORM = "cls.predictions.transform"


def anatomy(config: Config) -> Anatomy:
    """Every block alike; the first position has row 0."""
    config = config.with_defaults(vocab_size=30522, max_position_embeddings=512, type_vocab_size=2)
    D, ending = config.size("hidden_size"), encoder.ending(config)
    prefix = "bert." if ending.startswith("For") else ""
    pooler = {f"{prefix}pooler.dense.weight": (D, D), f"{prefix}pooler.dense.bias": (D,)}
    beside, optional = encoder.plain_head(config, ending), {}
    ignored = rf"{prefix}embeddings\.position_ids|cls\.seq_relationship\..*"
    if ending == "ForMaskedLM":
        beside = {
            f"{TRANSFORM}.dense.weight": (D, D),
            **{f"{TRANSFORM}.{name}": (D,) for name in ("dense.bias", "LayerNorm.weight", "LayerNorm.bias")},
            "cls.predictions.bias": (config.size("vocab_size"),),
        }
        ignored += r"|cls\.predictions\.decoder\..*"
    if ending == "ForSequenceClassification":
        beside |= pooler
    elif ending == "Model":
        optional = pooler
    else:
        ignored += r"|bert\.pooler\..*"
    return postnorm.model(
        config, "bert", prefix, offset=0, task=encoder.TASKS[ending], beside=beside, optional=optional,
        ignored=ignored,
    )  # fmt: skip
