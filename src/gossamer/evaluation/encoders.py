"""What `evaluate` measures encoders through: transformers, or the engine (see backends.py)."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gossamer.checkpoint.directory import Checkpoint
from gossamer.engine import Encoder
from gossamer.engine.answers import MAX_ANSWER_LEN, STRIDE, Answer, Windows
from gossamer.engine.entities import OUTSIDE
from gossamer.engine.heads import OF_VECTORS, cannot
from gossamer.errors import UnsupportedError
from gossamer.evaluation.backends import directory_of, transformers_model
from gossamer.tokens import encoder as tokens
from gossamer.tokens.pooling import Pooling
from gossamer.tokens.texts import Text, Texts

BATCH_TEXTS = 32

Row = tuple[list[int], list[int]]  # the ids and types of a text's tokens


class EncoderBackend(Protocol):
    """What an evaluation needs of an encoder."""

    task: str
    """What its head is for (see `Anatomy`)."""

    def vectors(self, texts: Sequence[str], prompt: str | None = None) -> NDArray[np.float32]:
        """The vector of each text [n, D], of length 1; the pooling's prompt of that name before each."""
        ...

    def label_scores(self, texts: Sequence[Text]) -> NDArray[np.float32]:
        """What a head for whole texts says of each label [n, labels], before softmax."""
        ...

    def word_labels(self, texts: Sequence[Sequence[str]]) -> list[list[str]]:
        """What a head for tokens says of each word of texts; O of those that the model does not see."""
        ...

    def answers(self, asked: Sequence[tuple[str, str]]) -> list[Answer]:
        """Answers to questions, each with its context, of a head for spans."""
        ...

    @property
    def labels(self) -> list[str]:
        """The labels' names."""
        ...

    @property
    def num_cut(self) -> int:
        """Texts, or pairs, so far that were longer than the model's limit, and lost their ends."""
        ...


def open_encoder(model: str, backend: str, num_threads: int | None, *, offline: bool) -> EncoderBackend:
    """Open an encoder; UnsupportedError for a packed file on another backend than the engine."""
    if backend == "engine":
        return EngineEncoder(model, num_threads, offline=offline)
    return TorchEncoder(directory_of(model, backend), sparse=backend == "gpu", offline=offline)


class EngineEncoder:
    """Gossamer's own engine; a directory is packed once into its cache."""

    def __init__(self, model: str, num_threads: int | None, *, offline: bool) -> None:
        self._encoder = Encoder(model, num_threads, offline=offline)
        self.task = self._encoder.architecture.task

    def vectors(self, texts: Sequence[str], prompt: str | None = None) -> NDArray[np.float32]:
        name = prompt if prompt in self._encoder.pooling.prompts else None
        return np.array(self._encoder.encode(texts, name, normalize_embeddings=True))

    def label_scores(self, texts: Sequence[Text]) -> NDArray[np.float32]:
        return self._encoder.classifier().scores(self._encoder.pooled(self._encoder.token_ids(texts)))

    def word_labels(self, texts: Sequence[Sequence[str]]) -> list[list[str]]:
        found = self._encoder.label_words(texts)
        return [[OUTSIDE if it is None else it["label"] for it in labels] for labels in found]

    def answers(self, asked: Sequence[tuple[str, str]]) -> list[Answer]:
        return self._encoder.answers(asked)

    @property
    def labels(self) -> list[str]:
        return list((self._encoder.token_head or self._encoder.classifier()).labels)

    @property
    def num_cut(self) -> int:
        return self._encoder.num_cut


class TorchEncoder:
    """transformers' model (see `transformers_model`); batches are padded."""

    def __init__(self, model: str, *, sparse: bool = False, offline: bool = False) -> None:
        source = Checkpoint.open(model, offline=offline)
        if not source.architecture.is_encoder:
            raise UnsupportedError(
                f"{source.path}: a {source.architecture.model_type} is no encoder; --kind sts, retrieval, "
                "classification, tokens and qa measure those"
            )
        self.task, self._source = source.architecture.task, source
        self._pooling = Pooling.open(source.path, source.architecture)
        self._texts = Texts(tokens.Encoder.open(source.path), self._pooling.max_length)
        kind = source.config.get("architectures", ["AutoModel"])[0]
        self._model = transformers_model(source, kind, sparse=sparse)
        self.labels: list[str] = [label for _, label in sorted(self._model.config.id2label.items())]

    def vectors(self, texts: Sequence[str], prompt: str | None = None) -> NDArray[np.float32]:
        import torch

        if self.task not in OF_VECTORS:
            raise cannot("encode", self._source.architecture, self._source.path)
        before = self._pooling.prompts.get(prompt or self._pooling.default_prompt or "", "")

        def pooled(batch: dict[str, Any]) -> Any:
            h_BTD, mask_BT1 = self._model.base_model(**batch)[0].float(), batch["attention_mask"][..., None]
            if self._pooling.mode == "cls":
                return h_BTD[:, 0]
            if self._pooling.mode == "max":
                return h_BTD.masked_fill(mask_BT1 == 0, -torch.inf).amax(1)
            return (h_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)

        texts = [before + text for text in texts]
        return np.stack(self._batches(self._rows(texts), lambda it: _of_length_1(pooled(it))))

    def label_scores(self, texts: Sequence[Text]) -> NDArray[np.float32]:
        return np.stack(self._batches(self._rows(texts), lambda batch: self._model(**batch).logits))

    def word_labels(self, texts: Sequence[Sequence[str]]) -> list[list[str]]:
        rows = [self._texts.encode_words(words) for words in texts]
        given = [(it.ids, it.type_ids) for it in rows]
        likeliest = self._batches(given, lambda batch: self._model(**batch).logits.argmax(-1))
        found: list[list[str]] = []
        for words, row, labels_T in zip(texts, rows, likeliest, strict=True):
            label_of = dict(reversed([*zip(row.word_ids, labels_T, strict=False)]))
            labels = [label_of.get(index) for index in range(len(words))]
            found.append([OUTSIDE if it is None else self.labels[int(it)] for it in labels])
        return found

    def answers(self, asked: Sequence[tuple[str, str]]) -> list[Answer]:
        import torch

        def ends(batch: dict[str, Any]) -> Any:
            found = self._model(**batch)
            return torch.stack([found.start_logits, found.end_logits], -1)

        windows = [Windows.of(*pair, self._texts, STRIDE) for pair in asked]
        rows = [(it.ids, it.type_ids) for each in windows for it in each.encoded]
        scores = (it[: len(ids)] for it, (ids, _) in zip(self._batches(rows, ends), rows, strict=True))
        return [each.best([next(scores) for _ in each.encoded], MAX_ANSWER_LEN) for each in windows]

    @property
    def num_cut(self) -> int:
        return self._texts.num_cut

    def _rows(self, texts: Sequence[Text]) -> list[Row]:
        return [(it.ids, it.type_ids) for it in self._texts.encode(texts)]

    def _batches(self, rows: Sequence[Row], function: Any) -> list[NDArray[Any]]:
        """What a function makes of each row; where that has a value for each token, padding has one too."""
        import torch

        order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
        found: list[Any] = [None] * len(rows)
        for first in range(0, len(order), BATCH_TEXTS):
            chosen = order[first : first + BATCH_TEXTS]
            ids, types = zip(*(rows[index] for index in chosen), strict=True)
            width = max(map(len, ids))
            parts = {
                "input_ids": ids,
                "token_type_ids": types,
                "attention_mask": [[1] * len(row) for row in ids],
            }
            batch = {
                name: torch.tensor(
                    [row + [0] * (width - len(row)) for row in part], device=self._model.device
                )
                for name, part in parts.items()
            }
            with torch.no_grad():
                for index, value in zip(chosen, function(batch).float().cpu().numpy(), strict=True):
                    found[index] = value
        return found


def _of_length_1(vectors: Any) -> Any:
    import torch

    return torch.nn.functional.normalize(vectors, dim=-1)
