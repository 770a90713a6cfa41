"""Answers to questions as spans of a text, which is read in windows that overlap."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypedDict

import numpy as np
import tokenizers
from numpy.typing import NDArray

from gossamer.engine.entities import without_blanks
from gossamer.errors import ConfigError
from gossamer.tokens.texts import Texts

STRIDE = 128  # tokens that two windows share, as SQuAD's usual programs have it
MAX_ANSWER_LEN = 30  # tokens


class Answer(TypedDict):
    """`answer` is context[start:end]; `score` is its probability, and `no_answer_score` that of none.

    These are of all spans of the windows, and of none: a softmax of the sums of starts' and ends' scores. The
    score of none is the first token's in both, in the window where it is lowest.
    """

    answer: str
    score: float
    start: int
    end: int
    no_answer_score: float


@dataclass(frozen=True)
class Windows:
    """A question with the windows of its context."""

    context: str
    encoded: Sequence[tokenizers.Encoding]

    @classmethod
    def of(cls, question: str, context: str, texts: Texts, stride: int) -> Self:
        """Of the texts' `max_length` tokens at most; ConfigError for a context in which nothing stands."""
        if not context.strip():
            raise ConfigError(f"found the context {context!r:.40}; expected a text to look for the answer in")
        return cls(context, texts.encode_windows(question, context, stride))

    def best(self, scores: Sequence[NDArray[np.float32]], max_answer_len: int) -> Answer:
        """The best span of at most so many tokens, by each window's scores [T, 2] of starts and of ends."""
        none = min(float(start + end) for (start, end) in (scores_T2[0] for scores_T2 in scores))
        sums, best, place = [np.array([none])], -np.inf, (0, 0)
        for window, scores_T2 in zip(self.encoded, scores, strict=True):
            inside = np.array([sequence == 1 for sequence in window.sequence_ids])
            start_T, end_T = np.where(inside[:, None], scores_T2.astype(np.float64), -np.inf).T
            for more in range(min(max_answer_len, len(start_T))):
                sum_N = start_T[: len(start_T) - more] + end_T[more:]
                sums.append(sum_N)
                first = int(sum_N.argmax())
                if sum_N[first] > best:
                    best, place = sum_N[first], (window.offsets[first][0], window.offsets[first + more][1])
        every_N = np.concatenate(sums)
        total = every_N.max() + np.log(np.exp(every_N - every_N.max()).sum())
        start, end = without_blanks(self.context, *place)
        return Answer(
            answer=self.context[start:end],
            score=float(np.exp(best - total)),
            start=start,
            end=end,
            no_answer_score=float(np.exp(none - total)),
        )
