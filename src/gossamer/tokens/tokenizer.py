"""Text to token ids and back, and chats: what the engine, training and evaluation need of a tokenizer."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import tokenizers

from gossamer.architecture.config import LFS_POINTER
from gossamer.errors import CheckpointError, ConfigError
from gossamer.tokens.encoder import Encoder, first_ids, read_files, valid_text
from gossamer.tokens.pieces import PieceCache
from gossamer.tokens.typed import TypedChats

if TYPE_CHECKING:
    from gossamer.tokens.chat import ChatTemplate

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
METASPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's space
# The characters that byte-level tokens are written in -> their bytes: GPT-2's table, in which bytes that are
# no visible character of Latin-1 have those from U+0100 up.
_VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(0x100) if byte not in _VISIBLE]
BYTE_LEVEL = {chr(byte): byte for byte in _VISIBLE} | {chr(0x100 + n): byte for n, byte in enumerate(_OTHERS)}

Message = Mapping[str, Any]


class Tokenizer(Encoder):
    """An encoder that also decodes, and that knows how a text ends and the model's chat template (chat.py).

    `eos_ids` end a generation: those of the generation config (else the model's) and the tokenizer's own.
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
        """As an `Encoder` is made; `chat_template` counts before the one in tokenizer_config.json."""
        super().__init__(
            content, config, generation_config=generation_config, model_config=model_config, origin=origin
        )
        self.chat_template = chat_template or _inline_template(config or {})
        self._added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(index for index, token in self._added.items() if token.special)
        decoder = json.dumps(self._document.get("decoder"))
        self._byte_fallback, self._byte_level = '"ByteFallback"' in decoder, '"ByteLevel"' in decoder
        self._eos_id = self._token_id("eos_token")
        ends = first_ids((generation_config or {}, model_config or {}), "eos_token_id")
        self.eos_ids = frozenset(ends if self._eos_id is None else [*ends, self._eos_id])

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read a Hugging Face model directory; CheckpointError when it holds no usable tokenizer."""
        return cls(**read_files(Path(path)), chat_template=read_template(Path(path)))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of many texts, int32 [n] each, without BOS, as `PieceCache` makes them fast."""
        texts = [*map(valid_text, texts)]
        if self._pieces is not None:
            return self._pieces.encode_batch(texts)
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in found]

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def adds_bos(self) -> bool:
        """Whether a text that it encodes begins with BOS, so that the model never sees one without."""
        return self.bos_id is not None and self.encode("")[:1] == [self.bos_id]

    def required_mask(self) -> int:
        """The id that hides a token; ConfigError where the tokenizer names none."""
        if (found := self._token_id("mask_token")) is None:
            raise ConfigError("the tokenizer names no token that hides another; set mask_token in its config")
        return found

    def required_eos(self) -> int:
        """The id that ends an answer: the tokenizer's end token, or the only one that the configs name.

        ConfigError where there is none, or where there are several and the tokenizer names none of them.
        """
        if self._eos_id is not None:
            return self._eos_id
        if len(self.eos_ids) != 1:
            found = f"several end tokens, {sorted(self.eos_ids)}" if self.eos_ids else "no end token"
            raise ConfigError(
                f"found {found}, and the tokenizer names none; set eos_token in tokenizer_config.json"
            )
        return min(self.eos_ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 come out as U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def prompt(self, text: str) -> list[int]:
        """Token ids of a text to go on from, with one BOS where it begins with that already.

        What is no text in UTF-8 becomes U+FFFD; control tokens that it names are control tokens.
        """
        ids = self.encode(text)
        return ids[1:] if ids[:2] == [self.bos_id] * 2 else ids

    def chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, *, typed: bool = False
    ) -> list[int]:
        """Token ids of a chat: `[{"role": ..., "content": ...}, ...]` through the model's template.

        As transformers makes them; but `typed` by people, messages hold no control tokens, whatever they
        name, and U+FFFD for what is no text in UTF-8. ConfigError without a template, or when it objects.
        """
        if typed:
            messages = self._typed.hide(messages)
        text = self.render_chat(messages, add_generation_prompt)
        ids = self._typed.encode(text) if typed else None
        return self.encode(text, bos=False) if ids is None else ids

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """A chat as the text that `chat` gives the ids of; same errors."""
        return self._chat.render(messages, self.special_tokens, add_generation_prompt)

    def check_template(self) -> None:
        """Raise ConfigError where the model has no chat template, or one that does not parse."""
        self._chat.check()

    def generation_spans(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Where the template's `{% generation %}` blocks stand in `text`, which `render_chat` gave."""
        return self._chat.generation_spans(messages, self.special_tokens, text)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of `text`, without BOS, and which characters (begin, end) each stands for."""
        encoded = self._bare.encode(valid_text(text))
        return encoded.ids, encoded.offsets

    @cached_property
    def _bare(self) -> tokenizers.Tokenizer:
        """The tokenizer without its post-processor, which may cut spaces off the offsets."""
        bare = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        bare.post_processor = tokenizers.processors.TemplateProcessing(single="$A", special_tokens=[])
        bare.encode_special_tokens = self._tokenizer.encode_special_tokens
        return bare

    @property
    def eos_texts(self) -> list[str]:
        """What the end tokens are in a text."""
        texts = map(self._tokenizer.id_to_token, self.eos_ids)
        return [text for text in texts if text]

    def is_special(self, index: int) -> bool:
        """Whether the id is a special token, which never shows in decoded text."""
        return index in self._special_ids

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The text of each special token -> its id."""
        return {self._added[index].content: index for index in self._special_ids}

    def token_bytes(self, index: int) -> bytes:
        """What a token adds to a text, in UTF-8; it may begin or end within a character."""
        token = self._tokenizer.id_to_token(index) or ""
        if index in self._added:
            return token.encode()
        if self._byte_level and BYTE_LEVEL.keys() >= set(token):
            return bytes(BYTE_LEVEL[character] for character in token)
        byte = self.byte_value(index)
        return token.replace(METASPACE, " ").encode() if byte is None else bytes([byte])

    def token_text(self, index: int) -> str:
        """`token_bytes` as text; what is none by itself as OpenAI shows it, such as bytes:\\xe2\\x80."""
        found = self.token_bytes(index)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def byte_value(self, index: int) -> int | None:
        """The byte that a SentencePiece byte token stands for; None for any other token."""
        token = self._tokenizer.id_to_token(index) or "" if self._byte_fallback else ""
        return int(token[3:5], 16) if BYTE_TOKEN.fullmatch(token) else None

    def byte_id(self, byte: int) -> int | None:
        """The id of the SentencePiece token that stands for a byte, or None."""
        return self._tokenizer.token_to_id(f"<0x{byte:02X}>") if self._byte_fallback else None

    @cached_property
    def _pieces(self) -> PieceCache | None:
        return PieceCache.of(self._tokenizer, self._document)

    @cached_property
    def _typed(self) -> TypedChats:
        return TypedChats(self._tokenizer, self.special_ids)

    @cached_property
    def _chat(self) -> "ChatTemplate":
        from gossamer.tokens.chat import ChatTemplate  # most callers never chat

        return ChatTemplate(self.chat_template)


def read_template(directory: Path) -> str | None:
    """The template that lies beside the tokenizer, None without one; CheckpointError for what is no text."""
    if not (file := directory / "chat_template.jinja").is_file():
        return None
    content = file.read_bytes()
    if content.startswith(LFS_POINTER):
        raise CheckpointError(f"{file}: a Git LFS pointer, not the file itself; run `git lfs pull`")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: not UTF-8 text ({error}); the file is damaged") from error


def _inline_template(config: Mapping[str, Any]) -> str | None:
    """tokenizer_config.json's template: one text, or a list of named ones of which "default" counts."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"tokenizer_config: chat_template is {template!r:.80}; expected a text.")
    return template
