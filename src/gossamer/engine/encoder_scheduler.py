"""Batching for encoders: a step is one native call for texts of all who wait, each given its turn."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gossamer.engine.encoder import Encoder, Floats, TokenIds

STEP_TOKENS = 4096  # some passes of the engine; those who come meanwhile wait no longer than this takes


@dataclass(frozen=True)
class Pooled:
    """Says that a request's vectors are all there."""

    finish_reason: str = "stop"


@dataclass(eq=False)
class EncoderRequest:
    """Texts on their way through the engine; `vectors` fills while the scheduler steps."""

    rows: Sequence[TokenIds]
    pieces: deque[Pooled] = field(default_factory=deque)
    vectors: list[Floats] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)

    def result(self) -> Floats:
        """float32 [N, D]: what `Encoder.pooled` makes of the rows."""
        return np.stack(self.vectors)


class EncoderScheduler:
    """Computes texts of waiting requests together: one of each in turn, up to `STEP_TOKENS` tokens a step."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._waiting: dict[EncoderRequest, None] = {}  # in the order in which they came

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting

    def add(self, request: EncoderRequest) -> None:
        """Queue a request of at least one row."""
        self._waiting[request] = None

    def drop(self, request: EncoderRequest) -> None:
        """Forget a request that nobody waits for any more."""
        self._waiting.pop(request, None)

    def step(self) -> None:
        """Compute what fits of the texts, at least one; requests that are then whole leave."""
        chosen = self._choose()
        vectors_ND = self._encoder.pooled([row for _, row in chosen])
        for (request, _), vector_D in zip(chosen, vectors_ND, strict=True):
            request.vectors.append(vector_D)
        for request in [it for it in self._waiting if len(it.vectors) == len(it.rows)]:
            request.pieces.append(Pooled())
            self.drop(request)

    def _choose(self) -> list[tuple[EncoderRequest, TokenIds]]:
        """Round after round, the next row of every request, until one does not fit."""
        lines = deque((request, iter(request.rows[len(request.vectors) :])) for request in self._waiting)
        chosen: list[tuple[EncoderRequest, TokenIds]] = []
        num_tokens = 0
        while lines:
            request, rows = lines.popleft()
            if (row := next(rows, None)) is None:
                continue
            num_tokens += len(row.ids)
            if chosen and num_tokens > STEP_TOKENS:
                break
            chosen.append((request, row))
            lines.append((request, rows))
        return chosen
