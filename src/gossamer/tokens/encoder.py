"""Text to token ids: all that rows of text need of a tokenizer (tokenizer.py has the way back, and chats).

`tokenizer.json` decides the ids (its post-processor decides on BOS); `tokenizer_config.json` names the
special tokens.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers

from gossamer.architecture.config import json_object, read_json
from gossamer.errors import CheckpointError, ConfigError, UnsupportedError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Encoder:
    """A model's tokenizer; `bos_id` begins a text (None where the model has none).

    `special_tokens`: the texts of `bos_token`, `eos_token`, ..., as chat templates see them.
    """

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
        self._tokenizer.encode_special_tokens = self._config.get("split_special_tokens") is True
        self.special_tokens = self._named_tokens()
        self._check_rows((model_config or {}).get("vocab_size"), origin)
        sources = (generation_config or {}, model_config or {})
        own, given = self._token_id("bos_token"), first_ids(sources, "bos_token_id")
        self.bos_id = own if own is not None else next(iter(given), None)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read a Hugging Face model directory; CheckpointError when it holds no usable tokenizer."""
        return cls(**read_files(Path(path)))

    def required_bos(self) -> int:
        """`bos_id`; ConfigError where the model has none, though every text that it knows begins with one."""
        if self.bos_id is None:
            raise ConfigError("the tokenizer names no BOS token; rows of text begin with one: set bos_token")
        return self.bos_id

    def to_json(self) -> str:
        """The tokenizer as one tokenizer.json, with all that was read beside it."""
        return self._tokenizer.to_str()

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Token ids of `text`; with `bos`, what tokenizer.json's post-processor adds is added.

        Halves of surrogate pairs, which Python's texts can hold and UTF-8 cannot, count as U+FFFD.
        """
        return self._tokenizer.encode(valid_text(text), add_special_tokens=bos).ids

    def _token_id(self, name: str) -> int | None:
        """The id of a named special token, or None."""
        token = self.special_tokens.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)

    def _named_tokens(self) -> dict[str, str]:
        """The texts of `bos_token` and its like; those that tokenizer.json does not have get ids."""
        listed = ("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens")
        named = {name: value for name, value in self._config.items() if name.endswith("_token")}
        texts = {name: value for name, value in named.items() if value and not isinstance(value, bool)}
        known = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
        if not self._config.keys() & listed and all(text in known for text in texts.values()):
            return texts
        from gossamer.tokens.special import add_special_tokens

        return add_special_tokens(self._tokenizer, self._config)

    def _check_rows(self, num_rows: Any, origin: str) -> None:
        """Raise CheckpointError for a token without a row in the embedding (None: of an unknown model)."""
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        if isinstance(num_rows, int) and max(ids.values(), default=-1) >= num_rows:
            from gossamer.tokens.special import beyond_the_rows

            raise beyond_the_rows(ids, num_rows, origin)


def read_files(directory: Path) -> dict[str, Any]:
    """What an `Encoder` is made of, from a model directory; CheckpointError where it is not there."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        from gossamer.tokens.special import no_tokenizer

        raise no_tokenizer(directory)
    names = ("tokenizer_config", "generation_config", "config")
    files = (directory / f"{name}.json" for name in names)
    config, generation_config, model_config = (read_json(it) if it.is_file() else {} for it in files)
    content, older = file.read_bytes(), ("special_tokens_map.json", "added_tokens.json")
    if "added_tokens_decoder" not in config and any((directory / name).is_file() for name in older):
        from gossamer.tokens.older_files import with_older_files

        config = with_older_files(directory, config, json_object(content, str(file)), NAMED_TOKENS)
    return {
        "content": content,
        "config": config,
        "generation_config": generation_config,
        "model_config": model_config,
        "origin": str(file),
    }


def valid_text(text: str) -> str:
    """The text with U+FFFD for every half of a surrogate pair."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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
