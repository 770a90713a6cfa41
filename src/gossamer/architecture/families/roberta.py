"""RoBERTa: BERT's blocks; the first position has the row behind that of padding, and heads are others."""

from gossamer.architecture import encoder, postnorm
from gossamer.architecture.anatomy import Anatomy
from gossamer.architecture.config import Config

ENDINGS = encoder.ENDINGS
SUMMARY = "RobertaModel"


def anatomy(config: Config, model_type: str = "roberta") -> Anatomy:
    """Every block alike; `model_type` of one that is told apart by its name only."""
    config = config.with_defaults(pad_token_id=1, bos_token_id=0, eos_token_id=2)
    (pad,) = config.token_ids("pad_token_id") or (1,)
    D, ending = config.size("hidden_size"), encoder.ending(config)
    prefix = "roberta." if ending.startswith("For") else ""
    pooler = {f"{prefix}pooler.dense.weight": (D, D), f"{prefix}pooler.dense.bias": (D,)}
    beside = encoder.plain_head(config, ending)
    ignored = rf"{prefix}embeddings\.position_ids" + (rf"|{prefix}pooler\..*" if prefix else "")
    if ending == "ForMaskedLM":
        vectors = ("dense.bias", "layer_norm.weight", "layer_norm.bias")
        beside = {
            "lm_head.dense.weight": (D, D),
            **{f"lm_head.{name}": (D,) for name in vectors},
            "lm_head.bias": (config.size("vocab_size"),),
        }
        ignored += r"|lm_head\.decoder\..*"
    if ending == "ForSequenceClassification":
        beside = {f"classifier.out_proj.{name.rpartition('.')[2]}": shape for name, shape in beside.items()}
        beside |= {"classifier.dense.weight": (D, D), "classifier.dense.bias": (D,)}
    return postnorm.model(
        config, model_type, prefix, offset=pad + 1, task=encoder.TASKS[ending], beside=beside,
        optional=pooler if ending == "Model" else {}, ignored=ignored,
    )  # fmt: skip
