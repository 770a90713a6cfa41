"""Several sources of text as one stream of pieces, in proportion to their weights."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar

from gossamer.data.sources import documents, parse_weight
from gossamer.data.tables import BadRows
from gossamer.errors import ConfigError

PIECE_CHARACTERS = 4096
SHUFFLE_PIECES = 1024
Item = TypeVar("Item")


class Piece(NamedTuple):
    """A part of a document of one source, by the source's number."""

    source: int
    text: str


class Mixture:
    """Pieces of the sources' documents, shuffled, in proportion to the weights.

    A weight is a share of the characters. Documents are cut at line ends into pieces of at most
    `piece_characters` (a longer line stays whole), so that sources interleave finely; with `truncate` they
    are not, and end after four times as many characters. The mixture ends where a source is used up, as its
    share could not be kept; with `repeat` the source begins again. `num_documents` counts those that were
    read of each source, and `used_up` is the one that ended the mixture.
    """

    def __init__(
        self,
        sources: Sequence[str],
        seed: int,
        *,
        piece_characters: int = PIECE_CHARACTERS,
        repeat: bool = False,
        truncate: bool = False,
        bad: BadRows | None = None,
        offline: bool = False,
    ) -> None:
        self._weighted = [parse_weight(source) for source in sources]
        if not self._weighted:
            raise ConfigError("no dataset given; pass at least one SRC")
        self._seed, self._piece_characters = seed, piece_characters
        self._repeat, self.truncate, self._bad, self._offline = repeat, truncate, bad, offline
        self.num_documents = [0] * len(sources)
        self.used_up: str | None = None

    def __iter__(self) -> Iterator[Piece]:
        streams = [self._shuffled(index) for index in range(len(self._weighted))]
        weights = [weight for _, weight in self._weighted]
        ended = yield from in_proportion(streams, weights, lambda piece: len(piece.text))
        self.used_up = self._weighted[ended][0]

    def _shuffled(self, index: int) -> Iterator[Piece]:
        """Pieces of one source, shuffled through a buffer of `SHUFFLE_PIECES`."""
        chance = random.Random(self._seed + index)
        buffer: list[Piece] = []
        for piece in self._in_order(index):
            if len(buffer) < SHUFFLE_PIECES:
                buffer.append(piece)
                continue
            slot = chance.randrange(SHUFFLE_PIECES)
            buffer[slot], piece = piece, buffer[slot]
            yield piece
        chance.shuffle(buffer)
        yield from buffer

    def _in_order(self, index: int) -> Iterator[Piece]:
        name = self._weighted[index][0]
        while True:
            empty = True
            for text in self._documents(name):
                self.num_documents[index] += 1
                for part in self._parts(text):
                    empty = False
                    yield Piece(index, part)
            if empty:
                raise ConfigError(f"dataset {name!r} holds no text")
            if not self._repeat:
                return

    def _parts(self, text: str) -> Iterator[str]:
        if not self.truncate:
            yield from pieces(text, self._piece_characters)
        elif text:
            yield text[: 4 * self._piece_characters]

    def _documents(self, name: str) -> Iterator[str]:
        if name == "python:doctests":  # without end
            from gossamer.data import doctests

            return doctests.documents(self._seed)
        return documents(name, offline=self._offline, bad=self._bad)


def in_proportion(
    streams: Sequence[Iterator[Item]], weights: Sequence[float], size: Callable[[Item], int]
) -> Generator[Item, None, int]:
    """Items of the streams, their sizes in proportion to the weights, until a stream ends: returns which."""
    given = [0.0] * len(streams)
    while True:
        index = min(range(len(streams)), key=lambda i: given[i])
        item = next(streams[index], None)
        if item is None:
            return index
        given[index] += size(item) / weights[index]
        yield item


def pieces(text: str, limit: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a text at line ends into pieces of at most `limit` characters (a longer line stays whole)."""
    ends = [*accumulate(map(len, text.splitlines(keepends=True)))]
    begin = index = 0
    while begin < len(text):
        index = max(index + 1, bisect_right(ends, begin + limit, index))
        yield text[begin : ends[index - 1]]
        begin = ends[index - 1]
