"""Continuous batching: a step is one native call for all running requests; anyone may join between steps."""

from collections import deque

from gossamer import _native
from gossamer.engine.request import Request
from gossamer.errors import ConfigError

STEP_TOKENS = 512  # a longer step would keep the requests that decode waiting for their next token


class Scheduler:
    """Decodes up to `max_batch` requests together; long prompts enter a piece at a time.

    A step takes at most `STEP_TOKENS` tokens, or twice `max_batch` where that is more. Requests that decode
    go first in every step, so that a long prompt slows them but never stops them; they take at most half of
    a step, so that prompts go on as well.
    """

    def __init__(self, model: _native.Model, max_batch: int = 16) -> None:
        """Raises ConfigError unless `max_batch` is an integer of at least 1."""
        if not isinstance(max_batch, int) or max_batch < 1:
            raise ConfigError(f"max_batch is {max_batch!r}; expected an integer of at least 1.")
        self._model = model
        self._max_batch, self._max_step_tokens = max_batch, max(STEP_TOKENS, 2 * max_batch)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._running

    def add(self, request: Request) -> None:
        """Queue a request; a finished one is left alone."""
        if request.finish_reason is None:
            self._waiting.append(request)

    def drop(self, request: Request) -> None:
        """Forget a request that nobody waits for any more, and free its memory."""
        if request in self._running:
            self._running.remove(request)
        elif request in self._waiting:
            self._waiting.remove(request)
        request.sequence = None

    def step(self) -> list[Request]:
        """Feed one token of each decoding request and what fits of the prompts; returns the requests fed."""
        self._admit()
        fed, ids = [], []
        budget = self._max_step_tokens
        for request in sorted(self._running, key=lambda request: not request.token_ids):
            next_ids = request.next_ids(budget)
            if next_ids.size:
                fed.append(request)
                ids.append(next_ids)
                budget -= next_ids.size
        if not fed:
            return []
        logits_BV = self._model.forward([request.sequence for request in fed], ids, False)
        for request, logits_V in zip(fed, logits_BV, strict=True):
            request.accept(logits_V)
            if request.finish_reason is not None:
                self.drop(request)
        return fed

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_batch:
            request = self._waiting.popleft()
            capacity = len(request.prompt_ids) + request.max_new_tokens
            request.begin(self._model.new_sequence(capacity))
            self._running.append(request)
