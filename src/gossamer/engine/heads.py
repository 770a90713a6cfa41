"""What a model's head says of a text, by its first token's hidden states, or of each token: in NumPy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypedDict

import numpy as np
from numpy.typing import NDArray

from gossamer import _native
from gossamer.architecture.anatomy import Anatomy, Task
from gossamer.architecture.config import Config
from gossamer.architecture.encoder import labels
from gossamer.errors import UnsupportedError
from gossamer.packed.reader import Packed
from gossamer.tokens.pooling import PoolingMode

Floats = NDArray[np.float32]
MODERN_DENSE, MODERN_NORM = "head.dense", "head.norm"  # of ModernBERT

SERVED: dict[Task, str] = {
    "embedding": "makes vectors of texts (Encoder.encode, rerank)",
    "masked": "guesses masked words (Encoder.encode and rerank use the vectors below its head)",
    "sequence": "scores whole texts or pairs of them (Encoder.classify; rerank, where it has one label)",
    "tokens": "labels each token (Encoder.tag, label_words)",
    "spans": "marks answers to questions in texts (Encoder.answer)",
}
CALLS: dict[Task, str] = {  # of an Encoder, for people to try
    "embedding": "encode(['Once upon a time'])",
    "masked": "encode(['Once upon a time'])",
    "sequence": "classify(['Once upon a time'])",
    "tokens": "tag(['Once upon a time'])",
    "spans": "answer('When was it?', 'Once upon a time.')",
}
OF_VECTORS = ("embedding", "masked")  # tasks of models whose vectors are of texts' meanings


class Label(TypedDict):
    """A label's name and its probability."""

    label: str
    score: float


@dataclass(frozen=True)
class Dense:
    """tanh(h @ w + bias), or where there is a norm, as in ModernBERT, that of gelu(h @ w + bias)."""

    w_DD: Floats
    bias_D: Floats
    norm_D: Floats | None
    norm_bias_D: Floats
    eps: float

    @classmethod
    def open(cls, packed: Packed, name: str, norm: str) -> Self:
        """From the tensors of these names, of which a bias and the norm may be missing."""
        anatomy = packed.architecture

        def vector(name: str) -> Floats:
            zeros = np.zeros(anatomy.hidden_size, np.float32)
            return packed.vector(name) if name in anatomy.beside else zeros

        norm_D = packed.vector(f"{norm}.weight") if f"{norm}.weight" in anatomy.beside else None
        w_DD, bias_D = packed.vector(f"{name}.weight"), vector(f"{name}.bias")
        return cls(w_DD, bias_D, norm_D, vector(f"{norm}.bias"), anatomy.norm_eps)

    def __call__(self, states_ND: Floats) -> Floats:
        """float32 [N, D] of as many hidden states."""
        x_ND = states_ND @ self.w_DD.T + self.bias_D
        if self.norm_D is None:
            return np.tanh(x_ND)
        level = _native.isa()
        return _native.layernorm(
            level, _native.gelu(level, x_ND)[0], self.norm_D, self.norm_bias_D, self.eps
        )[0]


@dataclass(frozen=True)
class SequenceHead:
    """`dense` of a text's vector, as `pooling` makes it, then a score for each of L labels.

    `labels` have probabilities that sum to 1, or, where `are_independent`, one of their own each.
    """

    labels: Sequence[str]
    are_independent: bool
    pooling: PoolingMode
    dense: Dense
    out_LD: Floats
    out_bias_L: Floats

    @classmethod
    def open(cls, packed: Packed) -> Self | None:
        """The head in the file, None where its task is another; FormatError for NaN or infinite weights."""
        anatomy = packed.architecture
        if anatomy.task != "sequence":
            return None
        config = Config(packed.config, str(packed.path))
        dense, out = _names(anatomy)
        names = labels(config)
        return cls(
            labels=names,
            are_independent=len(names) == 1 or config.get("problem_type") == "multi_label_classification",
            pooling="mean" if config.get("classifier_pooling") == "mean" else "cls",
            dense=Dense.open(packed, dense, MODERN_NORM),
            out_LD=packed.vector(f"{out}.weight"),
            out_bias_L=packed.vector(f"{out}.bias"),
        )

    def scores(self, vectors_ND: Floats) -> Floats:
        """float32 [N, L] before softmax or sigmoid, of texts' vectors."""
        # row by row: NumPy's products of several rows at once depend on how many there are
        rows = [self.dense(h_D[None]) @ self.out_LD.T + self.out_bias_L for h_D in vectors_ND]
        return np.concatenate(rows) if rows else np.empty((0, len(self.labels)), np.float32)

    def probabilities(self, scores_NL: Floats) -> Floats:
        """float32 [N, L]: sigmoids where labels are independent, else a softmax."""
        return sigmoid(scores_NL) if self.are_independent else softmax(scores_NL)

    def named(self, values_NL: Floats) -> list[list[Label]]:
        """Each text's labels with their values, the highest first."""
        return [
            [
                Label(label=self.labels[int(index)], score=float(value_L[index]))
                for index in np.argsort(-value_L, kind="stable")
            ]
            for value_L in values_NL
        ]


@dataclass(frozen=True)
class TokenHead:
    """h @ out + bias of each token: a score for each of L labels, or for being an answer's start and end.

    h is what `dense` makes of hidden states where the family has such a thing.
    """

    labels: Sequence[str]
    dense: Dense | None
    out_LD: Floats
    out_bias_L: Floats

    @classmethod
    def open(cls, packed: Packed) -> Self | None:
        """The head in the file, None where its task is another; FormatError for NaN or infinite weights."""
        anatomy = packed.architecture
        if (task := anatomy.task) not in ("tokens", "spans"):
            return None
        out = "classifier" if "classifier.weight" in anatomy.beside else "qa_outputs"
        names = labels(Config(packed.config, str(packed.path))) if task == "tokens" else ["start", "end"]
        is_modern = f"{MODERN_DENSE}.weight" in anatomy.beside
        dense = Dense.open(packed, MODERN_DENSE, MODERN_NORM) if is_modern else None
        return cls(names, dense, packed.vector(f"{out}.weight"), packed.vector(f"{out}.bias"))

    def scores(self, states_TD: Floats) -> Floats:
        """float32 [T, L] before softmax, of one text's tokens."""
        features_TD = states_TD if self.dense is None else self.dense(states_TD)
        return features_TD @ self.out_LD.T + self.out_bias_L

    def likeliest(self, scores_NL: Floats) -> list[Label]:
        """Of each of N tokens the likeliest label with its probability."""
        p_NL = softmax(scores_NL)
        return [Label(label=self.labels[int(p_L.argmax())], score=float(p_L.max())) for p_L in p_NL]


def _names(anatomy: Anatomy) -> tuple[str, str]:
    """The head's first linear and its second, as the family names them."""
    if "classifier.out_proj.weight" in anatomy.beside:
        return "classifier.dense", "classifier.out_proj"
    if f"{MODERN_DENSE}.weight" in anatomy.beside:
        return MODERN_DENSE, "classifier"
    pooler = next(name for name in anatomy.beside if name.endswith("pooler.dense.weight"))
    return pooler.removesuffix(".weight"), "classifier"


def sigmoid(values: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow."""
    return np.float32(0.5) * (np.tanh(np.float32(0.5) * values) + np.float32(1))


def softmax(scores_NL: Floats) -> Floats:
    """float32 [N, L]: probabilities of each row."""
    e_NL = np.exp(scores_NL - scores_NL.max(axis=1, keepdims=True))
    return e_NL / e_NL.sum(axis=1, keepdims=True)


def cannot(what: str, anatomy: Anatomy, source: object) -> UnsupportedError:
    """The error of a model that is asked for what its head is not for."""
    return UnsupportedError(
        f"{source}: found a {anatomy.model_type} that {SERVED[anatomy.task]}; it cannot {what}"
    )
