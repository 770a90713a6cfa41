"""From logits to the next token, as transformers' logits processors do it.

The order is transformers': repetition penalty, temperature, top-k, top-p, min-p, then one draw; from
temperature on, native/engine/sampling.cpp does it. Each request owns its random generator and draws once a
token, so a seed gives the same text alone or in a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer import _native
from gossamer.errors import ConfigError
from gossamer.tokens.encoder import valid_text

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class SamplingParams:
    """How to generate: `max_tokens` None means up to the context's end, `temperature` 0 means greedy.

    `stop`: texts that end the generation, special tokens by their text included; they are not part of what
    is generated. `stop_token_ids`: ids that do, beside the model's own end tokens. `logprobs`: tell the log
    probability of each token, and of so many likeliest ones at its place (0: of it alone); None: of none.
    `echo`: what comes out begins with the prompt, whose tokens have log probabilities too; `max_tokens` may
    be 0 then.
    """

    max_tokens: int | None = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None
    echo: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        low = 0 if self.echo else 1
        _check_count("max_tokens", self.max_tokens, low=low, none="up to the context's end")
        _check_count("logprobs", self.logprobs, low=0, none="no log probabilities")
        _check_count("top_k", self.top_k, low=0)
        _check_count("seed", self.seed, low=None, none="a random seed")
        _check_number("temperature", self.temperature, low=0.0)
        _check_number("top_p", self.top_p, low=0.0, high=1.0, open_low=True)
        _check_number("min_p", self.min_p, low=0.0, high=1.0)
        _check_number("repetition_penalty", self.repetition_penalty, low=0.0, open_low=True)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(f"stop is {self.stop!r}; expected a list of non-empty strings.")
        object.__setattr__(self, "stop", tuple(map(valid_text, self.stop)))
        ids = self.stop_token_ids
        if not isinstance(ids, Sequence) or not all(type(index) is int and index >= 0 for index in ids):
            raise ConfigError(f"stop_token_ids is {self.stop_token_ids!r}; expected a list of token ids.")


def model_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling options of a model's generation_config.json, as fields of `SamplingParams`.

    `do_sample` false says that its temperature and what goes with it are not meant; true without a
    temperature means 1. ConfigError for values that cannot be.
    """
    sampled = (
        () if generation_config.get("do_sample") is False else ("temperature", "top_k", "top_p", "min_p")
    )
    given = {name: generation_config.get(name) for name in (*sampled, "repetition_penalty")}
    found = {name: value for name, value in given.items() if value is not None}
    if generation_config.get("do_sample") is True:
        found.setdefault("temperature", 1.0)
    try:
        SamplingParams(**found)
    except ConfigError as error:
        raise ConfigError(
            f"the model's generation_config.json: {error} Mend it, or --generation-config none."
        ) from error
    return found


class Sampler:
    """Chooses one request's tokens; knows its parameters, its random generator and the ids seen so far."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self.params = params
        seed = None if params.seed is None else params.seed % 2**64
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._seen = set(prompt_ids)

    def choose(self, logits_V: Logits) -> int:
        """The next token's id for one row of raw logits."""
        params = self.params
        if params.repetition_penalty != 1.0:
            logits_V = repetition_penalty(logits_V, self._seen, params.repetition_penalty)
        chosen = int(np.argmax(logits_V)) if params.temperature == 0 else self._draw(logits_V)
        self._seen.add(chosen)
        return chosen

    def _draw(self, logits_V: Logits) -> int:
        params = self.params
        k = min(params.top_k, logits_V.size)
        uniform = self._generator.random()
        return _native.sample(
            _native.isa(), logits_V, params.temperature, k, params.top_p, params.min_p, uniform
        )


def log_probabilities(
    logits_V: Logits, index: int, num_likeliest: int
) -> tuple[float, list[tuple[int, float]]]:
    """Natural log of the model's own probability of `index`, before any sampling option.

    Beside it (id, log p) of as many likeliest tokens, the likeliest first.
    """
    return _native.log_probabilities(_native.isa(), logits_V, index, num_likeliest)


def repetition_penalty(logits_V: Logits, seen: set[int], penalty: float) -> Logits:
    """Divide the positive and multiply the negative logits of ids already seen, prompt included."""
    indices = np.fromiter(seen, dtype=np.int64, count=len(seen))
    limits = np.finfo(np.float32)
    logits_V = logits_V.copy()
    values = logits_V[indices].astype(np.float64)
    with np.errstate(over="ignore"):
        values = np.where(values < 0, values * penalty, values / penalty)
    logits_V[indices] = np.clip(values, limits.min, limits.max)
    return logits_V


def _check_count(name: str, value: object, *, low: int | None, none: str = "") -> None:
    if value is None and none:
        return
    if isinstance(value, int) and not isinstance(value, bool) and (low is None or value >= low):
        return
    bound = "" if low is None else f" of at least {low}"
    raise ConfigError(f"{name} is {value!r}; expected an integer{bound}{f' (None: {none})' if none else ''}.")


def _check_number(name: str, value: Any, *, low: float, high: float = np.inf, open_low: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
    if is_number and low <= value <= high and not (open_low and value == low):
        return
    interval = f"{'(' if open_low else '['}{low}, {high}{')' if high == np.inf else ']'}"
    raise ConfigError(f"{name} is {value!r}; expected a number in {interval}.")
