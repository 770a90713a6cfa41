"""What the API sends back: whole answers and the chunks of a stream, for chats and for plain completions."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gossamer.engine import Generation, Piece

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
    identity: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, generations: Sequence[Generation]) -> Json:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": generation.text, "refusal": None},
                "logprobs": None,
                "finish_reason": generation.finish_reason,
            }
            for index, generation in enumerate(generations)
        ]
        return self._object("chat.completion", choices) | {"usage": usage(generations)}

    def opening(self) -> list[Json]:
        return [self._chunk(0, {"role": "assistant", "content": ""}, None)]

    def chunks(self, index: int, piece: Piece) -> list[Json]:
        text = [self._chunk(index, {"content": piece.text}, None)] if piece.text else []
        return text + ([self._chunk(index, {}, piece.finish_reason)] if piece.finish_reason else [])

    def closing(self, counts: Json) -> Json:
        return self._object("chat.completion.chunk", []) | {"usage": counts}

    def _chunk(self, index: int, delta: Json, reason: str | None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
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
    identity: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, generations: Sequence[Generation]) -> Json:
        choices = [
            self._choice(index, generation.text, generation.finish_reason)
            for index, generation in enumerate(generations)
        ]
        return self._object(choices) | {"usage": usage(generations)}

    def opening(self) -> list[Json]:
        return []

    def chunks(self, index: int, piece: Piece) -> list[Json]:
        if not piece.text and piece.finish_reason is None:
            return []
        return [self._object([self._choice(index, piece.text, piece.finish_reason)])]

    def closing(self, counts: Json) -> Json:
        return self._object([]) | {"usage": counts}

    def _choice(self, index: int, text: str, reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

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
