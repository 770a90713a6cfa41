"""A conversation with a model: the messages so far, as many of them as its context holds."""

from collections.abc import Generator

from gossamer.engine import LLM, Piece, SamplingParams
from gossamer.errors import ConfigError, GossamerError
from gossamer.job.report import Event, Progress, quiet

ROOM_TOKENS = 256  # of the context, kept for an answer (a quarter of a small context)


class Conversation:
    """Messages and answers in turn. The oldest turns are dropped when the context is full, which is said."""

    def __init__(self, llm: LLM, params: SamplingParams, progress: Progress = quiet) -> None:
        self._llm, self._params, self._progress = llm, params, progress
        self.messages: list[dict[str, str]] = []

    def answer(self, text: str) -> Generator[Piece, None, None]:
        """Yield the answer to `text` as it comes. What came before it was left is part of the history.

        ConfigError for a message that the template or the context does not take, which is then forgotten.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._fitting_ids()
            stream = self._llm.stream(ids, self._params)
        except GossamerError:
            self.messages.pop()
            raise
        said: list[str] = []
        try:
            for piece in stream:
                said.append(piece.text)
                yield piece
        finally:
            stream.close()
            self.messages.append({"role": "assistant", "content": "".join(said)})

    def clear(self) -> None:
        """Forget all messages."""
        self.messages.clear()

    def _fitting_ids(self) -> list[int]:
        """Ids of the messages, without the oldest turns where there would be no room for an answer."""
        limit = self._llm.model.architecture.max_position_embeddings
        room = min(ROOM_TOKENS, limit // 4, self._params.max_tokens or limit)
        num_dropped = 0
        ids = self._llm.tokenizer.chat(self.messages, typed=True)
        while len(ids) > limit - room and len(self.messages) > 2:
            del self.messages[:2]
            num_dropped += 1
            ids = self._llm.tokenizer.chat(self.messages, typed=True)
        if num_dropped:
            turns = "the oldest turn was" if num_dropped == 1 else f"the {num_dropped} oldest turns were"
            self._progress(Event("run", f"the context is full: {turns} dropped", lasting=True))
        if len(ids) >= limit:
            raise ConfigError(
                f"the message makes a prompt of {len(ids)} tokens; this model's context holds {limit}, the "
                "answer included. Shorten it."
            )
        return ids
