"""Continuous batching: a step is one native call for all running requests; anyone may join between steps."""

from collections import deque
from collections.abc import Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from gossamer import _native
from gossamer.engine.request import Request
from gossamer.errors import ConfigError

STEP_TOKENS = 512  # a longer step would keep the requests that decode waiting for their next token
STEP_TARGETS = 256  # tokens of prompts whose log probabilities a step computes: what `Model.score` takes

Fed = tuple[Request, NDArray[np.int32]]  # and the tokens that it is given in a step


class Scheduler:
    """Decodes up to `max_batch` requests together; long prompts enter a piece at a time.

    A step takes at most `STEP_TOKENS` tokens, or twice `max_batch` where that is more. Requests that decode
    go first in every step, so that a long prompt slows them but never stops them; they take at most half of
    a step, so that prompts go on as well.

    Prompts whose tokens get log probabilities take a native call of their own, of at most `STEP_TARGETS`.
    They wait in a line of their own, so that an evaluation's thousands keep nobody else waiting, and they of
    nobody: the next to run is of the kind of which fewer are running, and where nothing runs, the other than
    the last.
    """

    def __init__(self, model: _native.Model, max_batch: int = 16) -> None:
        """Raises ConfigError unless `max_batch` is an integer of at least 1."""
        if not isinstance(max_batch, int) or max_batch < 1:
            raise ConfigError(f"max_batch is {max_batch!r}; expected an integer of at least 1.")
        self._model = model
        self._max_batch, self._max_step_tokens = max_batch, max(STEP_TOKENS, 2 * max_batch)
        self._to_score: deque[Request] = deque()
        self._to_decode: deque[Request] = deque()
        self._running: list[Request] = []
        self._last = self._to_score  # the line from which the last one came

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._to_score and not self._to_decode and not self._running

    def add(self, request: Request) -> None:
        """Queue a request; a finished one is left alone."""
        if request.finish_reason is None:
            (self._to_score if request.scores_prompt else self._to_decode).append(request)

    def drop(self, request: Request) -> None:
        """Forget a request that nobody waits for any more, and free its memory."""
        for line in (self._running, self._to_score, self._to_decode):
            if request in line:
                line.remove(request)
        request.sequence = None

    def step(self) -> list[Request]:
        """Feed one token of each decoding request and what fits of the prompts; returns the requests fed."""
        self._admit()
        fed, scored = [], []
        budget, targets = self._max_step_tokens, STEP_TARGETS
        for request in sorted(self._running, key=lambda request: not request.token_ids):
            ids = request.next_ids(min(budget, targets) if request.scores_prompt else budget)
            if ids.size:
                (scored if request.scores_prompt else fed).append((request, ids))
                budget -= ids.size
                targets -= ids.size if request.scores_prompt else 0
        if fed:
            self._decode(fed)
        if scored:
            self._score(scored)
        both = [request for request, _ in (*fed, *scored)]
        for request in both:
            if request.finish_reason is not None:
                self.drop(request)
        return both

    def _decode(self, fed: Sequence[Fed]) -> None:
        logits_BV = self._model.forward(_sequences(fed), [ids for _, ids in fed], False)
        for (request, _), logits_V in zip(fed, logits_BV, strict=True):
            request.accept(logits_V)

    def _score(self, fed: Sequence[Fed]) -> None:
        targets = [request.targets(ids) for request, ids in fed]
        most = max(request.params.logprobs or 0 for request, _ in fed)
        scores = iter(self._model.score(_sequences(fed), [ids for _, ids in fed], targets, most))
        for request, ids in fed:
            request.accept_scores(list(islice(scores, ids.size)))

    def _admit(self) -> None:
        while (self._to_score or self._to_decode) and len(self._running) < self._max_batch:
            num_scored = sum(request.scores_prompt for request in self._running)
            scores = 2 * num_scored < len(self._running) if self._running else self._last is self._to_decode
            lines = (self._to_score, self._to_decode) if scores else (self._to_decode, self._to_score)
            self._last = lines[0] or lines[1]
            request = self._last.popleft()
            capacity = len(request.prompt_ids) + request.max_new_tokens
            request.begin(self._model.new_sequence(capacity))
            self._running.append(request)


def _sequences(fed: Sequence[Fed]) -> list[_native.Sequence]:
    return [sequence for request, _ in fed if (sequence := request.sequence) is not None]
