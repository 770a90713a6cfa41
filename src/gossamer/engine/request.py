"""One prompt on its way through the engine: what is fed next, what came out, and why it ended."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gossamer import _native
from gossamer.engine.sampling import Logits, Sampler, SamplingParams, log_probabilities
from gossamer.engine.text import StopText, TextStream
from gossamer.tokens.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]

Score = tuple[float | None, Sequence[tuple[int, float]]]  # log p of a token, and (id, log p) of the likeliest
NO_SCORE: Score = (None, ())


@dataclass(frozen=True)
class TokenLogprob:
    """The natural log of a token's probability after those before it, and (id, log p) of the likeliest there.

    A prompt's first token comes after nothing: None, and no likeliest. `offset`: the characters of the whole
    text that were certain before it, where its own text begins (but for bytes that are no UTF-8).
    """

    token_id: int
    logprob: float | None
    likeliest: tuple[tuple[int, float], ...]
    offset: int


@dataclass(frozen=True)
class Piece:
    """What one step added: certain text, and the tokens since the last piece; the last piece says why.

    `token_ids` are those that were generated; under `echo`, `logprobs` begin with the prompt's.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Timings:
    """Seconds a request waited, until its first token, and from its first to its last."""

    queued_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True)
class Generation:
    """A finished request; `token_ids` are all tokens chosen, the one that ended it included.

    Under `echo`, `text` and `logprobs` begin with the prompt's.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    num_prompt_tokens: int
    timings: Timings
    logprobs: list[TokenLogprob] | None = None


@dataclass(eq=False)
class Request:
    """A prompt, its parameters and its state; `pieces` fills while the scheduler steps."""

    prompt_ids: Sequence[int]
    params: SamplingParams
    tokenizer: Tokenizer
    max_new_tokens: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    pieces: deque[Piece] = field(default_factory=deque)
    finish_reason: FinishReason | None = None
    sequence: _native.Sequence | None = None

    def __post_init__(self) -> None:
        self._sampler = Sampler(self.params, self.prompt_ids)
        self._stream = TextStream(self.tokenizer)
        self._stops = StopText(self.params.stop, self.tokenizer.special_ids if self.params.stop else None)
        self._end_ids = self.tokenizer.eos_ids | frozenset(self.params.stop_token_ids)
        self._texts: list[str] = []
        self._num_given = self._num_logprobs_given = 0  # what pieces have already reported
        self._num_echoed = 0  # tokens of the prompt
        self._num_characters = 0  # of the text that is certain, given out or not
        self._added_s = time.perf_counter()
        self._begun_s = self._first_s = self._last_s = self._added_s
        if self.params.echo:
            self._echo([NO_SCORE] * (len(self.prompt_ids) if self.params.logprobs is None else 1))
        elif self.max_new_tokens == 0:
            self._finish("length", "")

    @property
    def scores_prompt(self) -> bool:
        """Whether tokens of the prompt wait for their log probabilities: see `targets`."""
        echoes = self.params.echo and self.params.logprobs is not None
        return echoes and self._num_echoed < len(self.prompt_ids)

    def begin(self, sequence: _native.Sequence) -> None:
        """The scheduler has room: from now on the request is being computed."""
        self.sequence = sequence
        self._begun_s = time.perf_counter()

    def next_ids(self, limit: int) -> NDArray[np.int32]:
        """At most `limit` ids to feed: the rest of the prompt, then the token chosen last.

        While the prompt is scored, its last token waits: nothing of the prompt comes after it.
        """
        assert self.sequence is not None
        fed, end = self.sequence.length, len(self.prompt_ids) - self.scores_prompt
        ids = self.prompt_ids[fed : min(fed + limit, end)] if fed < end else self.token_ids[-1:]
        return np.asarray(ids, dtype=np.int32)

    def targets(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """What the prompt has after each of `ids`, which `next_ids` gave while it is scored."""
        return np.asarray(self.prompt_ids[self._num_echoed : self._num_echoed + ids.size], dtype=np.int32)

    def accept_scores(self, scores: Sequence[Score]) -> None:
        """Take what `Model.score` says of the targets that were asked."""
        self._first_s = self._last_s = time.perf_counter()
        self._echo(scores)

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
        if self.params.logprobs is not None:
            self._note(token, log_probabilities(logits_V, token, self.params.logprobs))
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
            logprobs=None if self.params.logprobs is None else self.logprobs,
        )

    def _echo(self, scores: Sequence[Score]) -> None:
        """Give out the prompt's next tokens, special ones by their text, but for a BOS at its beginning."""
        text = ""
        for index, score in zip(self.prompt_ids[self._num_echoed :], scores, strict=False):
            self._note(index, score)
            begins = self._num_echoed == 0 and index == self.tokenizer.bos_id
            if self.tokenizer.is_special(index) and not begins:
                text += self._counted(self._stream.flush() + self.tokenizer.token_text(index))
            else:
                text += self._counted(self._stream.push(index))
            self._num_echoed += 1
        if self._num_echoed == len(self.prompt_ids) and self.max_new_tokens == 0:
            self._finish("length", text)
        else:
            self._give(text, None)

    def _note(self, token: int, score: Score) -> None:
        """Keep the log probabilities, where they are wanted, of the token whose text comes next."""
        if self.params.logprobs is not None:
            logprob, likeliest = score
            top = tuple(likeliest[: self.params.logprobs])
            self.logprobs.append(TokenLogprob(token, logprob, top, self._num_characters))

    def _counted(self, text: str) -> str:
        self._num_characters += len(text)
        return text

    def _advance(self, token: int) -> None:
        """Turn a new token into text, and end the request where it must end."""
        if token in self._end_ids:
            return self._finish("stop", "")
        mark = self._stops.marks.get(token)
        certain = self._counted(self._stream.push(token) if mark is None else self._stream.flush())
        text = self._stops.push(certain + (mark or ""))
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
        new, logprobs = tuple(self.token_ids[self._num_given :]), None
        if self.params.logprobs is not None:
            logprobs = tuple(self.logprobs[self._num_logprobs_given :])
        self.pieces.append(Piece(text, new, logprobs, reason))
        self._num_given, self._num_logprobs_given = len(self.token_ids), len(self.logprobs)
        self._texts.append(text)
        self.finish_reason = reason
