"""XLM-RoBERTa: RoBERTa over a vocabulary of many languages."""

from gossamer.architecture.anatomy import Anatomy
from gossamer.architecture.config import Config
from gossamer.architecture.families import roberta

ENDINGS = roberta.ENDINGS
SUMMARY = "XLMRobertaModel"


def anatomy(config: Config) -> Anatomy:
    """Tensors have RoBERTa's names."""
    return roberta.anatomy(config, "xlm-roberta")
