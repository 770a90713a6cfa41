"""A packed model opened for inference: the mapped file, its tokenizer and the native forward pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gossamer import _native
from gossamer.architecture.anatomy import Anatomy
from gossamer.engine.options import KvCacheDtype
from gossamer.engine.request import Request
from gossamer.engine.sampling import SamplingParams, model_defaults
from gossamer.errors import CheckpointError, ConfigError, FormatError
from gossamer.job.report import Event, Progress, quiet
from gossamer.machine import default_threads
from gossamer.packed.cache import open_packed
from gossamer.packed.reader import Packed
from gossamer.tokens.tokenizer import Tokenizer

LOGITS_CHUNK = 256  # tokens whose logits are computed in one call

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class OpenModel:
    """A model ready for requests: its native forward pass, its tokenizer and its architecture's limits."""

    path: Path
    native: _native.Model
    tokenizer: Tokenizer
    architecture: Anatomy
    num_threads: int
    generation_config: Mapping[str, Any]

    @classmethod
    def open(
        cls,
        path: str | Path,
        num_threads: int | None = None,
        progress: Progress = quiet,
        kv_cache_dtype: KvCacheDtype = "auto",
        *,
        offline: bool = False,
    ) -> "OpenModel":
        """Map a .goss file and validate it (FormatError says what is wrong with it, UnsupportedError that
        it is an encoder).

        A checkpoint directory, or a model of the hub, is packed once into the cache. `num_threads` None: see
        `default_threads`; `kv_cache_dtype`: see `native_model`; `offline`: never touch the network.
        """
        threads = num_threads_of(num_threads)
        packed = open_packed(path, progress, offline=offline)
        packed.refuse_encoder()
        tokenizer = tokenizer_of(packed)
        native = native_model(packed, threads, kv_cache_dtype)
        return cls(packed.path, native, tokenizer, packed.architecture, threads, packed.generation_config)

    def sampling_defaults(
        self, wanted: Literal["auto", "none"], stage: str, progress: Progress
    ) -> dict[str, Any]:
        """The model's own sampling options, if `wanted`; says so, for they change what comes out."""
        found = model_defaults(self.generation_config) if wanted == "auto" else {}
        if found:
            shown = ", ".join(f"{name} {value}" for name, value in found.items())
            line = f"the model's own options, where others are not given: {shown} (--generation-config)"
            progress(Event(stage, line, lasting=True))
        return found

    def request(self, prompt: Prompt, params: SamplingParams) -> Request:
        """A request for text (tokenized with BOS) or for token ids; ConfigError when it cannot be served."""
        ids = self._checked(self.tokenizer.prompt(prompt) if isinstance(prompt, str) else prompt)
        self._checked(params.stop_token_ids)
        limit = self.architecture.max_position_embeddings
        if not ids:
            raise ConfigError("the prompt has no tokens; expected at least one.")
        if len(ids) > limit:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens; this model's context holds {limit}. Shorten the prompt."
            )
        room = limit - len(ids)
        max_new_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        return Request(ids, params, self.tokenizer, max_new_tokens)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32 [T, V]: the logits after each of the T ids, for evaluation."""
        ids_T = np.asarray(self._checked(ids), dtype=np.int32)
        limit = self.architecture.max_position_embeddings
        if not 0 < ids_T.size <= limit:
            raise ConfigError(f"found {ids_T.size} token ids; expected 1 to {limit}, this model's context.")
        sequence = self.native.new_sequence(ids_T.size)
        chunks = [ids_T[start : start + LOGITS_CHUNK] for start in range(0, ids_T.size, LOGITS_CHUNK)]
        return np.concatenate([self.native.forward([sequence], [chunk], True) for chunk in chunks])

    def _checked(self, ids: Sequence[int]) -> list[int]:
        if not isinstance(ids, Sequence | np.ndarray):
            raise ConfigError(f"found the prompt {ids!r}; expected a text or a list of token ids.")
        size = self.architecture.vocab_size
        for index in ids:
            if not isinstance(index, int | np.integer) or not 0 <= index < size:
                raise ConfigError(f"found token id {index!r}; this model's ids are 0 to {size - 1}.")
        return [int(index) for index in ids]


def native_model(packed: Packed, num_threads: int, kv_cache_dtype: KvCacheDtype = "auto") -> _native.Model:
    """The forward pass, with keys and values cached as f32, bf16 or i8 (a scale a position and head)."""
    kv = cached_type(packed, kv_cache_dtype)
    return _native.Model(packed.buffer, packed.native_tensors(), packed.native_config(), num_threads, kv)


def cached_type(packed: Packed, kv_cache_dtype: KvCacheDtype) -> Literal["f32", "bf16", "i8"]:
    """The type that "auto" means for this model, or the one asked for; ConfigError for an unknown one.

    Auto is f32 where decoder linears are f32, so that such models compute in float32 throughout, else bf16.
    """
    if kv_cache_dtype not in get_args(KvCacheDtype):
        raise ConfigError(f"kv_cache_dtype is {kv_cache_dtype!r}; expected auto, f32, bf16 or i8.")
    if kv_cache_dtype != "auto":
        return kv_cache_dtype
    return "f32" if any(packed.matrices[name].values == "f32" for name in packed.decoder) else "bf16"


def num_threads_of(num_threads: int | None) -> int:
    """The number that was asked for, or `default_threads`; ConfigError for what is none."""
    threads = default_threads() if num_threads is None else num_threads
    if not isinstance(threads, int) or threads < 1:
        raise ConfigError(f"num_threads is {num_threads!r}; expected an integer of at least 1.")
    return threads


def tokenizer_of(packed: Packed) -> Tokenizer:
    """The tokenizer in the file; FormatError where there is none."""
    content = packed.tokenizer_json
    if content is None:
        raise FormatError(f"{packed.path}: holds no tokenizer, so it can be measured but not asked.")
    try:
        return Tokenizer(
            content,
            packed.tokenizer_config,
            chat_template=packed.chat_template,
            generation_config=packed.generation_config,
            model_config=packed.config,
        )
    except CheckpointError as error:
        raise FormatError(f"{packed.path}: {error}") from error
