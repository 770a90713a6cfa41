"""Names in texts: f1 of the spans found in labelled words, as conlleval and seqeval count them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.data.columns import example_rows
from gossamer.data.labelled import class_number, read_words
from gossamer.engine.entities import spans
from gossamer.errors import ConfigError
from gossamer.evaluation.encoders import EncoderBackend
from gossamer.evaluation.scores import Scores, f1


@dataclass(frozen=True)
class LabelledWords:
    """Texts as words, and the label of each, by name or number; `places` of the rows, for messages."""

    texts: list[list[str]]
    labels: list[list[Any]]
    places: list[str]

    def measure(self, backend: EncoderBackend) -> Scores:
        if backend.task != "tokens":
            raise ConfigError(
                f"--kind tokens needs a model with a head for tokens; this one's is for {backend.task}"
            )
        names = backend.labels
        wanted = [
            [names[class_number(label, names, place)] for label in labels]
            for labels, place in zip(self.labels, self.places, strict=True)
        ]
        return span_scores(backend.word_labels(self.texts), wanted)


def span_scores(found: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> Scores:
    """A span is right if its kind, its first and its last word are; the texts' are counted together."""
    pairs = [({*spans(ours)}, {*spans(right)}) for ours, right in zip(found, wanted, strict=True)]
    return f1(*zip(*((len(ours & right), len(ours), len(right)) for ours, right in pairs), strict=True))


def read_labelled_words(file: Path, limit: int) -> LabelledWords:
    """The first `limit` rows, or all (0), of the fields that `finetune --format tokens` reads."""
    task = LabelledWords([], [], [])
    for where, row in example_rows(file, "tokens"):
        if limit and len(task.texts) == limit:
            break
        words, labels = read_words(row, where)
        task.texts.append(words)
        task.labels.append(labels)
        task.places.append(where)
    if not task.texts:
        raise ConfigError(f"{file} has no examples")
    return task
