"""Text to token ids: all that rows of text need of a tokenizer (tokenizer.py has the way back, and chats).

`tokenizer.json` decides the ids (its post-processor decides on BOS); `tokenizer_config.json` names the
special tokens.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import AddedToken

from gossamer.architecture.config import json_object, read_json
from gossamer.errors import CheckpointError, ConfigError, UnsupportedError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Encoder:
    """A model's tokenizer with its special tokens; `bos_id` begins a text (None where the model has none)."""

    def __init__(
        self,
        content: bytes,
        config: Mapping[str, Any] | None = None,
        *,
        generation_config: Mapping[str, Any] | None = None,
        model_config: Mapping[str, Any] | None = None,
        origin: str = "tokenizer.json",
    ) -> None:
        """From the texts of the usual files; `content` is that of tokenizer.json, zero padding allowed."""
        self.bytes = content.rstrip(b"\0")
        self._config: dict[str, Any] = dict(config or {})
        document = json_object(self.bytes, origin)
        if not isinstance(document.get("model"), dict):
            raise CheckpointError(f'{origin}: found no "model" in it; expected a tokenizers file.')
        if str(self._config.get("tokenizer_class", "")).removesuffix("Fast") == "LlamaTokenizer":
            from gossamer.tokens.llama import as_llama_tokenizer

            document, self._config = as_llama_tokenizer(document, self._config)
        self._document = document
        self._tokenizer = _build(document, origin)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._add_special_tokens()
        sources = (generation_config or {}, model_config or {})
        own, given = self._token_id("bos_token"), first_ids(sources, "bos_token_id")
        self.bos_id = own if own is not None else next(iter(given), None)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read a Hugging Face model directory; CheckpointError when it holds no usable tokenizer."""
        return cls(**read_files(Path(path)))

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The named special tokens' texts (`bos_token`, ...), as chat templates see them."""
        named = {name: value for name in NAMED_TOKENS if (value := self._config.get(name))}
        return {name: _added_token(value, name).content for name, value in named.items()}

    def required_bos(self) -> int:
        """`bos_id`; ConfigError where the model has none, though every text that it knows begins with one."""
        if self.bos_id is None:
            raise ConfigError("the tokenizer names no BOS token; rows of text begin with one: set bos_token")
        return self.bos_id

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Token ids of `text`; with `bos`, what tokenizer.json's post-processor adds is added."""
        return self._tokenizer.encode(text, add_special_tokens=bos).ids

    def _token_id(self, name: str) -> int | None:
        """The id of a named special token, or None."""
        token = self.special_tokens.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)

    def _add_special_tokens(self) -> None:
        """Tokens that only tokenizer_config.json knows get their ids in its order, as in transformers."""
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        config = self._config
        listed = config.get("added_tokens_decoder") or {}
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        if not isinstance(listed, dict) or not all(key.isdecimal() for key in listed):
            raise CheckpointError(f"tokenizer_config: added_tokens_decoder is {listed!r:.80}; expected ids.")
        if not isinstance(extra, dict | list):
            raise CheckpointError(
                f"tokenizer_config: extra_special_tokens is {extra!r:.80}; expected a list."
            )
        values = [listed[key] for key in sorted(listed, key=int)] + list(self.special_tokens.values())
        for value in values + (list(extra.values()) if isinstance(extra, dict) else extra):
            token = _added_token(value, "a special token")
            if token.content not in known:
                known.add(token.content)
                self._tokenizer.add_tokens([token])


def read_files(directory: Path) -> dict[str, Any]:
    """What an `Encoder` is made of, from a model directory; CheckpointError where it is not there."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        found = "tokenizer.model only" if (directory / "tokenizer.model").is_file() else "none"
        raise CheckpointError(
            f"{directory}: no tokenizer.json (found: {found}). "
            "Save the tokenizer once with transformers' AutoTokenizer to make one."
        )
    names = ("tokenizer_config", "generation_config", "config")
    files = (directory / f"{name}.json" for name in names)
    config, generation_config, model_config = (read_json(it) if it.is_file() else {} for it in files)
    return {
        "content": file.read_bytes(),
        "config": config,
        "generation_config": generation_config,
        "model_config": model_config,
        "origin": str(file),
    }


def _added_token(value: Any, name: str) -> AddedToken:
    """A special token as tokenizer_config.json writes it: its text, or an object with flags."""
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise CheckpointError(f"tokenizer_config: {name} is {value!r:.80}; expected a text.")
    flags = {
        name: bool(value.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
    }
    return AddedToken(value["content"], **flags)


def _build(document: Mapping[str, Any], origin: str) -> tokenizers.Tokenizer:
    """The tokenizer; CheckpointError where tokenizers cannot make sense of the file."""
    kind = document["model"].get("type")
    if kind not in ("BPE", "Unigram", "WordLevel", "WordPiece", None):
        raise UnsupportedError(
            f"{origin}: tokenizer model {kind!r}; supported are BPE, Unigram, WordLevel, WordPiece."
        )
    try:
        built = tokenizers.Tokenizer.from_buffer(json.dumps(document).encode())
    except ValueError as error:
        raise CheckpointError(f"{origin}: not a tokenizers file ({error}). Restore the file.") from error
    if missing := _undefined_tokens(document.get("post_processor") or {}):
        raise CheckpointError(f"{origin}: post_processor uses {missing[0]!r}, which it does not define.")
    return built


def _undefined_tokens(processor: Mapping[str, Any]) -> list[str]:
    """Special tokens in a valid post-processor's template that would make tokenizers panic."""
    if processor.get("type") == "Sequence":
        return [token for part in processor["processors"] for token in _undefined_tokens(part)]
    if processor.get("type") != "TemplateProcessing":
        return []
    pieces = [*processor["single"], *processor["pair"]]
    used = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
    return [token for token in used if token not in processor["special_tokens"]]


def first_ids(sources: Sequence[Mapping[str, Any]], name: str) -> list[int]:
    """The ids under `name` in the first of the configs that has it: absent, one id or a list."""
    value = next((source[name] for source in sources if name in source), None)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(entry) is int for entry in ids):
        raise CheckpointError(f"{name} is {value!r:.80}; expected token ids.")
    return ids
