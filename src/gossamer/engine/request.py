"""One prompt on its way through the engine: what is fed next, what came out, and why it ended."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gossamer import _native
from gossamer.engine.sampling import Logits, Sampler, SamplingParams, log_probability
from gossamer.engine.text import StopText, TextStream
from gossamer.tokens.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """What one step added: certain text, and the tokens since the last piece; the last piece says why."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Timings:
    """Seconds a request waited, until its first token, and from its first to its last."""

    queued_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True)
class Generation:
    """A finished request; `token_ids` are all tokens chosen, the one that ended it included."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    num_prompt_tokens: int
    timings: Timings
    logprobs: list[float] | None = None


@dataclass(eq=False)
class Request:
    """A prompt, its parameters and its state; `pieces` fills while the scheduler steps."""

    prompt_ids: Sequence[int]
    params: SamplingParams
    tokenizer: Tokenizer
    max_new_tokens: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pieces: deque[Piece] = field(default_factory=deque)
    finish_reason: FinishReason | None = None
    sequence: _native.Sequence | None = None

    def __post_init__(self) -> None:
        self._sampler = Sampler(self.params, self.prompt_ids)
        self._stream = TextStream(self.tokenizer)
        self._stops = StopText(self.params.stop, self.tokenizer.special_ids if self.params.stop else None)
        self._end_ids = self.tokenizer.eos_ids | frozenset(self.params.stop_token_ids)
        self._texts: list[str] = []
        self._num_given = 0  # tokens that a piece has already reported
        self._added_s = time.perf_counter()
        self._begun_s = self._first_s = self._last_s = self._added_s
        if self.max_new_tokens == 0:
            self._finish("length", "")

    def begin(self, sequence: _native.Sequence) -> None:
        """The scheduler has room: from now on the request is being computed."""
        self.sequence = sequence
        self._begun_s = time.perf_counter()

    def next_ids(self, limit: int) -> NDArray[np.int32]:
        """At most `limit` ids to feed: the rest of the prompt, then the token chosen last."""
        assert self.sequence is not None
        fed = self.sequence.length
        ids = self.prompt_ids[fed : fed + limit] if fed < len(self.prompt_ids) else self.token_ids[-1:]
        return np.asarray(ids, dtype=np.int32)

    def accept(self, logits_V: Logits) -> None:
        """Take the logits after all that was fed; once the prompt is in, choose the next token."""
        assert self.sequence is not None
        if self.sequence.length < len(self.prompt_ids):
            return
        token = self._sampler.choose(logits_V)
        self._last_s = time.perf_counter()
        if not self.token_ids:
            self._first_s = self._last_s
        self.token_ids.append(token)
        if self.params.logprobs:
            self.logprobs.append(log_probability(logits_V, token))
        self._advance(token)

    def result(self) -> Generation:
        """The whole generation, once `finish_reason` is set."""
        assert self.finish_reason is not None
        queued_s, prefill_s = self._begun_s - self._added_s, self._first_s - self._begun_s
        return Generation(
            text="".join(self._texts),
            token_ids=self.token_ids,
            finish_reason=self.finish_reason,
            num_prompt_tokens=len(self.prompt_ids),
            timings=Timings(queued_s, prefill_s, self._last_s - self._first_s),
            logprobs=self.logprobs if self.params.logprobs else None,
        )

    def _advance(self, token: int) -> None:
        """Turn a new token into text, and end the request where it must end."""
        if token in self._end_ids:
            return self._finish("stop", "")
        mark = self._stops.marks.get(token)
        certain = self._stream.push(token) if mark is None else self._stream.flush() + mark
        text = self._stops.push(certain)
        if self._stops.stopped:
            self._give(text, "stop")
        elif len(self.token_ids) == self.max_new_tokens:
            self._finish("length", text)
        elif text:
            self._give(text, None)
        return None

    def _finish(self, reason: FinishReason, text: str) -> None:
        """Give out what was held back: no further token can change it."""
        self._give(text + self._stops.push(self._stream.flush()) + self._stops.flush(), reason)

    def _give(self, text: str, reason: FinishReason | None) -> None:
        new = slice(self._num_given, len(self.token_ids))
        logprobs = tuple(self.logprobs[new]) if self.params.logprobs else None
        self.pieces.append(Piece(text, tuple(self.token_ids[new]), logprobs, reason))
        self._num_given = len(self.token_ids)
        self._texts.append(text)
        self.finish_reason = reason
