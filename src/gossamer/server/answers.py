"""What the API sends back: whole answers and the chunks of a stream, for chats and for plain completions."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gossamer.engine import Generation, Piece
from gossamer.server import logprobs
from gossamer.tokens.tokenizer import Tokenizer

Json = dict[str, Any]


class Answer(Protocol):
    """The shape of one kind of answer, with its id and its time."""

    def whole(self, generations: Sequence[Generation]) -> Json:
        """The answer in one object."""
        ...

    def opening(self) -> list[Json]:
        """The chunks before any text."""
        ...

    def chunks(self, index: int, piece: Piece) -> list[Json]:
        """The chunks for one piece of choice `index`."""
        ...

    def closing(self, counts: Json) -> Json:
        """The last chunk, which carries the usage."""
        ...


@dataclass(frozen=True)
class ChatAnswer:
    """chat.completion and chat.completion.chunk."""

    model: str
    tokenizer: Tokenizer
    identity: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, generations: Sequence[Generation]) -> Json:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": generation.text, "refusal": None},
                "logprobs": self._logprobs(generation),
                "finish_reason": generation.finish_reason,
            }
            for index, generation in enumerate(generations)
        ]
        return self._object("chat.completion", choices) | {"usage": usage(generations)}

    def opening(self) -> list[Json]:
        return [self._chunk(0, {"role": "assistant", "content": ""}, None, None)]

    def chunks(self, index: int, piece: Piece) -> list[Json]:
        found, chunks = self._logprobs(piece), []
        if piece.text:
            chunks.append(self._chunk(index, {"content": piece.text}, found, None))
        if piece.finish_reason:
            chunks.append(self._chunk(index, {}, None if piece.text else found, piece.finish_reason))
        return chunks

    def closing(self, counts: Json) -> Json:
        return self._object("chat.completion.chunk", []) | {"usage": counts}

    def _logprobs(self, of: Generation | Piece) -> Json | None:
        return None if of.logprobs is None else logprobs.of_chat(of.logprobs, self.tokenizer)

    def _chunk(self, index: int, delta: Json, found: Json | None, reason: str | None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": found, "finish_reason": reason}
        return self._object("chat.completion.chunk", [choice])

    def _object(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.identity,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


@dataclass(frozen=True)
class CompletionAnswer:
    """text_completion, whole or in chunks."""

    model: str
    tokenizer: Tokenizer
    identity: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, generations: Sequence[Generation]) -> Json:
        choices = [self._choice(index, generation) for index, generation in enumerate(generations)]
        return self._object(choices) | {"usage": usage(generations)}

    def opening(self) -> list[Json]:
        return []

    def chunks(self, index: int, piece: Piece) -> list[Json]:
        if not piece.text and not piece.logprobs and piece.finish_reason is None:
            return []
        return [self._object([self._choice(index, piece)])]

    def closing(self, counts: Json) -> Json:
        return self._object([]) | {"usage": counts}

    def _choice(self, index: int, of: Generation | Piece) -> Json:
        found = None if of.logprobs is None else logprobs.of_completion(of.logprobs, self.tokenizer)
        return {"index": index, "text": of.text, "logprobs": found, "finish_reason": of.finish_reason}

    def _object(self, choices: list[Json]) -> Json:
        return {
            "id": self.identity,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def usage(generations: Sequence[Generation]) -> Json:
    """Token counts over all choices; the token that ended a generation counts."""
    prompt = sum(generation.num_prompt_tokens for generation in generations)
    completion = sum(len(generation.token_ids) for generation in generations)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
