"""Gossamer's engine as a model of lm-evaluation-harness, which runs its tasks through it."""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gossamer.engine import LLM, SamplingParams
from gossamer.engine.scoring import score
from gossamer.errors import ConfigError

DEFAULT_TOKENS = 256


class EngineLM(TemplateLM):
    """What lm-eval asks of a model, answered by an `LLM`; tokens are those that transformers would take."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self._llm, self.tokenizer = llm, llm.tokenizer
        self.max_length = llm.model.architecture.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.required_eos()

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, or where there is none the end token."""
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self._llm.model.path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is False:
            return self.tokenizer.encode(string, bos=False)
        return self.tokenizer.prompt(string)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.render_chat(chat_history, add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """What does not fit into the model's context is cut off on the left, as with transformers."""
        pairs = []
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ConfigError(
                    f"an answer of {len(continuation)} tokens; expected 1 to {self.max_length}, what the "
                    "model's context holds"
                )
            context = context[max(0, len(context) + len(continuation) - self.max_length - 1) :]
            pairs.append((context, continuation))
        found = []
        for log_probs, likeliest in score(self._llm.model.native, pairs):
            request = requests[len(found)][0]
            found.append((sum(log_probs), all(likeliest)))
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, found[-1])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """A text longer than the context in windows, each of whose tokens is predicted once."""
        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(total for total, _ in self._loglikelihood_tokens(pairs)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy unless a task samples; a prompt that leaves no room for its answer loses its beginning."""
        found = [""] * len(requests)
        by_options: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_options.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for indices in by_options.values():
            params = sampling(requests[indices[0]].args[1])
            room = self.max_length - (params.max_tokens or 0)
            if room < 1:
                raise ConfigError(
                    f"{requests[indices[0]].task_name or 'the task'} asks for answers of {params.max_tokens} "
                    f"tokens; expected fewer than {self.max_length}, what the context holds of prompt "
                    "and answer together"
                )
            prompts = [self.tok_encode(requests[index].args[0])[-room:] for index in indices]
            for index, generation in zip(indices, self._llm.generate(prompts, params), strict=True):
                found[index] = generation.text
                self.cache_hook.add_partial("generate_until", requests[index].args, generation.text)
        return found


def sampling(options: Mapping[str, Any]) -> SamplingParams:
    """lm-eval's `generation_kwargs` in the engine's words."""
    until = options.get("until") or []
    sampled = bool(options.get("do_sample", float(options.get("temperature") or 0) > 0))
    return SamplingParams(
        max_tokens=int(options.get("max_gen_toks", options.get("max_new_tokens", DEFAULT_TOKENS))),
        temperature=float(options.get("temperature") or 1.0) if sampled else 0.0,
        top_p=float(options.get("top_p") or 1.0) if sampled else 1.0,
        top_k=int(options.get("top_k") or 0) if sampled else 0,
        stop=[until] if isinstance(until, str) else [text for text in until if text],
    )
