"""The examples of a fine-tuning run, of several sources: all of them, or a mixture in given shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from gossamer.data.mixture import in_proportion
from gossamer.data.sources import parse_weight
from gossamer.data.supervised import Format, supervised_examples
from gossamer.data.tables import BadRows
from gossamer.errors import ConfigError
from gossamer.tokens.tokenizer import Tokenizer


class Example(NamedTuple):
    """Tokens and labels of one row of a source, by the source's number."""

    source: int
    ids: list[int]
    labels: list[int]


@dataclass
class Examples:
    """What was read: `pairs` of tokens and labels, and of each source `num_documents` and `num_tokens`.

    `num_documents` are rows that there are, and a token counts as often as it is in the examples. `used_up`:
    the source that ended a mixture.
    """

    num_documents: list[int]
    num_tokens: list[int]
    pairs: list[tuple[list[int], list[int]]] = field(default_factory=list)
    used_up: str | None = None


def read_examples(
    sources: Sequence[str],
    format: Format,
    tokenizer: Tokenizer,
    max_length: int,
    *,
    num_examples: int | None = None,
    repeat: bool = False,
    bad: BadRows | None = None,
    offline: bool = False,
    classes: Sequence[str] = (),
) -> Examples:
    """Every example of every source; with a weight or `num_examples`, a mixture of at most so many.

    A weight is a share of the tokens, 1 where none is given. The mixture ends where a source is used up, as
    its share could not be kept. With `repeat` the source begins again, until there are `num_examples`, or,
    without these, until all sources were used up. Sources are read from their beginnings; whoever makes rows
    of the examples shuffles them. `classes` are those of labels. Raises what `supervised_examples` does.
    """
    if not sources:
        raise ConfigError("no dataset given; pass at least one SRC")
    names, weights = zip(*(parse_weight(source) for source in sources), strict=True)
    is_mixture = num_examples is not None or list(names) != list(sources)
    found = Examples([0] * len(names), [0] * len(names))
    read = [False] * len(names)

    def stream(index: int) -> Iterator[Example]:
        seen: list[Example] = []
        given = (names[index], format, tokenizer, max_length, bad, offline, classes)
        for ids, labels in supervised_examples(*given):
            seen.append(Example(index, ids, labels))
            found.num_documents[index] += 1
            yield seen[-1]
        read[index] = True
        while is_mixture and repeat and seen and not (num_examples is None and all(read)):
            yield from seen

    streams = [stream(index) for index in range(len(names))]

    def mixture() -> Iterator[Example]:
        ended = yield from in_proportion(streams, weights, lambda example: len(example.ids))
        found.used_up = None if repeat and all(read) else names[ended]

    chosen = mixture() if is_mixture else (example for stream in streams for example in stream)
    for example in islice(chosen, num_examples):
        found.pairs.append((example.ids, example.labels))
        found.num_tokens[example.source] += len(example.ids)
    return found
