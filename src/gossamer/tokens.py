"""Text to token ids and back, as transformers does it, without transformers.

`tokenizer.json` decides the ids (its post-processor decides on BOS); `tokenizer_config.json` names the
special tokens; the chat template is a program of its own (see chat.py).
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken

from gossamer.errors import CheckpointError, ConfigError, UnsupportedError

if TYPE_CHECKING:
    from gossamer.chat import ChatTemplate

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LLAMA_DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

Message = Mapping[str, Any]


class Tokenizer:
    """A model's tokenizer with its special tokens and chat template.

    `bos_id` begins a text (None where the model has none); `eos_ids` end a generation: those of the
    generation config (else the model's) and the tokenizer's own.
    """

    def __init__(
        self,
        content: bytes,
        config: Mapping[str, Any] | None = None,
        *,
        chat_template: str | None = None,
        generation_config: Mapping[str, Any] | None = None,
        model_config: Mapping[str, Any] | None = None,
        origin: str = "tokenizer.json",
    ) -> None:
        """From the texts of the usual files; `content` is that of tokenizer.json, zero padding allowed."""
        self.bytes = content.rstrip(b"\0")
        self.chat_template = chat_template or _inline_template(config or {})
        self._config: dict[str, Any] = dict(config or {})
        document = _parse_tokenizer(self.bytes, origin)
        if _is_llama_class(self._config, document):
            self._config = LLAMA_DEFAULTS | self._config
            document = _as_llama_class(document, self._config)
        self._tokenizer = _build(document, origin)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._add_special_tokens()
        self._special_ids = frozenset(
            index for index, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._byte_fallback = '"ByteFallback"' in json.dumps(document.get("decoder"))
        sources = (generation_config or {}, model_config or {})
        begin, ends = (_first_ids(sources, name) for name in ("bos_token_id", "eos_token_id"))
        own_begin, own_end = self._token_id("bos_token"), self._token_id("eos_token")
        self.bos_id = own_begin if own_begin is not None else next(iter(begin), None)
        self.eos_ids = frozenset(ends if own_end is None else [*ends, own_end])

    @classmethod
    def open(cls, path: str | Path) -> "Tokenizer":
        """Read a Hugging Face model directory; CheckpointError when it holds no usable tokenizer."""
        directory = Path(path)
        file = directory / "tokenizer.json"
        if not file.is_file():
            found = "tokenizer.model only" if (directory / "tokenizer.model").is_file() else "none"
            raise CheckpointError(
                f"{directory}: no tokenizer.json (found: {found}). "
                "Save the tokenizer once with transformers' AutoTokenizer to make one."
            )
        template = directory / "chat_template.jinja"
        return cls(
            file.read_bytes(),
            _read_json(directory / "tokenizer_config.json"),
            chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
            generation_config=_read_json(directory / "generation_config.json"),
            model_config=_read_json(directory / "config.json"),
            origin=str(file),
        )

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

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

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 come out as U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token(self, index: int) -> str:
        """The vocabulary's own spelling of one id ("" for an id without a token)."""
        return self._tokenizer.id_to_token(index) or ""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The chat as one text by the model's template; ConfigError without a template or when it objects."""
        return self._chat.render(messages, self.special_tokens, add_generation_prompt)

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a chat: `[{"role": ..., "content": ...}, ...]` through the model's template."""
        return self.encode(self.render(messages, add_generation_prompt), bos=False)

    def is_special(self, index: int) -> bool:
        """Whether the id is a special token, which never shows in decoded text."""
        return index in self._special_ids

    def may_continue(self, index: int) -> bool:
        """Whether the bytes of this id may be read differently once the next id is known."""
        return self._byte_fallback and BYTE_TOKEN.fullmatch(self.token(index)) is not None

    @cached_property
    def _chat(self) -> "ChatTemplate":
        from gossamer.chat import ChatTemplate  # most callers never chat

        return ChatTemplate(self.chat_template)

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


def _inline_template(config: Mapping[str, Any]) -> str | None:
    """tokenizer_config.json's template: one text, or a list of named ones of which "default" counts."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"tokenizer_config: chat_template is {template!r:.80}; expected a text.")
    return template


def _is_llama_class(config: Mapping[str, Any], document: Mapping[str, Any]) -> bool:
    """Whether transformers would rebuild the tokenizer as its SentencePiece-like LlamaTokenizer."""
    return (
        str(config.get("tokenizer_class", "")).removesuffix("Fast") == "LlamaTokenizer"
        and '"ByteLevel"' not in json.dumps(document.get("pre_tokenizer"))
        and document["model"].get("type") == "BPE"
    )


def _as_llama_class(document: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' LlamaTokenizer makes of a tokenizer.json: the leading space is a pre-tokenizer."""
    prefix_space = config.get("add_prefix_space") is not False
    scheme = ("always" if config.get("legacy") else "first") if prefix_space else "never"
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        **document,
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {**document["model"], "fuse_unk": True, "byte_fallback": True, "dropout": None},
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


def _parse_tokenizer(content: bytes, origin: str) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{origin}: not a JSON text ({error}). Restore the file.") from error
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise CheckpointError(
            f'{origin}: found no "model" in it; expected a tokenizers file. Restore the file.'
        )
    return document


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


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not a JSON text ({error}). Restore the file.") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{file}: found a {type(document).__name__}, expected a JSON object.")
    return document


def _first_ids(sources: Sequence[Mapping[str, Any]], name: str) -> list[int]:
    """The ids under `name` in the first of the configs that has it: absent, one id or a list."""
    value = next((source[name] for source in sources if name in source), None)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(entry) is int for entry in ids):
        raise CheckpointError(f"{name} is {value!r:.80}; expected token ids.")
    return ids
