"""Several sources of text as one without end, in proportion to their weights."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from gossamer.data.sources import documents, parse_weight
from gossamer.errors import ConfigError

PIECE_CHARACTERS = 4096
SHUFFLE_PIECES = 1024


def mixture(sources: Sequence[str], seed: int, *, offline: bool = False) -> Iterator[str]:
    """Pieces of the sources' documents without end, shuffled, in proportion to the weights.

    A weight is a share of the characters. Documents are cut at line ends into pieces of at most
    `PIECE_CHARACTERS`, so that sources interleave finely; a source that is used up begins again.
    """
    weighted = [parse_weight(source) for source in sources]
    if not weighted:
        raise ConfigError("no dataset given; pass at least one SRC")
    streams = [_shuffled(name, seed + index, offline) for index, (name, _) in enumerate(weighted)]
    given = [0.0] * len(streams)
    while True:
        next_index = min(range(len(streams)), key=lambda i: given[i])
        piece = next(streams[next_index])
        given[next_index] += len(piece) / weighted[next_index][1]
        yield piece


def _shuffled(source: str, seed: int, offline: bool) -> Iterator[str]:
    """Pieces of one source for ever, shuffled through a buffer of `SHUFFLE_PIECES`."""
    chance = random.Random(seed)
    buffer: list[str] = []
    for piece in _endless_pieces(source, seed, offline):
        if len(buffer) < SHUFFLE_PIECES:
            buffer.append(piece)
            continue
        slot = chance.randrange(SHUFFLE_PIECES)
        buffer[slot], piece = piece, buffer[slot]
        yield piece


def _endless_pieces(source: str, seed: int, offline: bool) -> Iterator[str]:
    if source == "python:doctests":
        from gossamer.data import doctests

        yield from doctests.documents(seed)
    while True:
        empty = True
        for text in documents(source, offline=offline):
            for piece in pieces(text):
                empty = False
                yield piece
        if empty:
            raise ConfigError(f"dataset {source!r} holds no text")


def pieces(text: str, limit: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a text at line ends into pieces of at most `limit` characters (a longer line stays whole)."""
    piece: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        if piece and length + len(line) > limit:
            yield "".join(piece)
            piece, length = [], 0
        piece.append(line)
        length += len(line)
    if piece:
        yield "".join(piece)
