"""The engine for one caller: texts in, texts out."""

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gossamer.engine.model import OpenModel, Prompt
from gossamer.engine.options import KvCacheDtype
from gossamer.engine.request import Generation, Piece, Request
from gossamer.engine.sampling import SamplingParams
from gossamer.engine.scheduler import Scheduler
from gossamer.job.report import Progress, quiet
from gossamer.tokens.tokenizer import Message, Tokenizer

GREEDY = SamplingParams()


class LLM:
    """A packed model that generates text.

    llm = LLM("model.goss")
    [answer] = llm.generate("Once upon a time", SamplingParams(max_tokens=50))
    for piece in llm.stream("Once upon a time"):
        print(piece.text, end="")

    Not for several threads at once (the server's one engine thread batches requests of many).
    """

    def __init__(
        self,
        path: str | Path,
        num_threads: int | None = None,
        *,
        max_batch: int = 16,
        kv_cache_dtype: KvCacheDtype = "auto",
        offline: bool = False,
        progress: Progress = quiet,
    ) -> None:
        """Open a .goss file, or a directory or `org/name[@revision]` of the hub, packed once into the cache.

        `num_threads` None takes GOSSAMER_THREADS or the physical cores. At most `max_batch` requests are
        decoded together; more wait. `kv_cache_dtype`: keys and values in "f32", "bf16" or "i8"; "auto" is f32
        for float32 models, else bf16.
        """
        self._ask(OpenModel.open(path, num_threads, progress, kv_cache_dtype, offline=offline), max_batch)

    @classmethod
    def of(cls, model: OpenModel, max_batch: int = 16) -> Self:
        """The same for a model that is open."""
        llm = cls.__new__(cls)
        llm._ask(model, max_batch)
        return llm

    def _ask(self, model: OpenModel, max_batch: int) -> None:
        self.model, self._scheduler = model, Scheduler(model.native, max_batch)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.tokenizer

    def generate(
        self, prompts: str | Sequence[str] | Sequence[Sequence[int]], params: SamplingParams = GREEDY
    ) -> list[Generation]:
        """Generate for one text, or for several texts or lists of token ids; results in their order."""
        many = [prompts] if isinstance(prompts, str) else prompts
        requests = [self.model.request(prompt, params) for prompt in many]
        self._run(requests)
        return [request.result() for request in requests]

    def chat(self, messages: Sequence[Message], params: SamplingParams = GREEDY) -> Generation:
        """Answer a chat: `[{"role": "user", "content": ...}, ...]` through the model's own template.

        Control tokens that a message names are ordinary text.
        """
        [generation] = self.generate([self.tokenizer.chat(messages, typed=True)], params)
        return generation

    def stream(self, prompt: Prompt, params: SamplingParams = GREEDY) -> Generator[Piece, None, None]:
        """Yield pieces of text as they become certain; their texts joined are `generate`'s text.

        For a chat, stream `tokenizer.chat(messages, typed=True)`. Closing the iterator drops the request.
        """
        request = self.model.request(prompt, params)
        self._scheduler.add(request)
        try:
            while request.pieces or request.finish_reason is None:
                if request.pieces:
                    yield request.pieces.popleft()
                else:
                    self._scheduler.step()
        finally:
            self._scheduler.drop(request)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32 [T, V]: the logits after each of the T ids."""
        return self.model.logits(ids)

    def _run(self, requests: Sequence[Request]) -> None:
        """Step until all are finished; an interruption leaves none behind."""
        for request in requests:
            self._scheduler.add(request)
        try:
            while any(request.finish_reason is None for request in requests):
                self._scheduler.step()
        finally:
            for request in requests:
                self._scheduler.drop(request)
