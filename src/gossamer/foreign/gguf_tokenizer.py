"""A GGUF file's tokenizer as the files of a Hugging Face directory, which give the ids that llama.cpp gives.

Two of llama.cpp's tokenizers are understood: `gpt2` (BPE over bytes, after a split that `tokenizer.ggml.pre`
names) and `llama` (SentencePiece's BPE, whose merges are in the order of the pieces' scores).
"""

import json
from dataclasses import dataclass
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gossamer.errors import CheckpointError, UnsupportedError
from gossamer.foreign.gguf_file import GgufFile

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CLITICS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_LATER_WORDS = _CLITICS + (
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Split:
    """A word of `tokenizer.ggml.pre`: patterns that split one after the other, and what else goes with it."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = _Split((_WORDS,))
_DIGITS = _Split((r"\p{N}", _WORDS))
_LLAMA3 = _Split((_LATER_WORDS % "{1,3}",), ignore_merges=True, add_bos=True)
_QWEN2 = _Split((_LATER_WORDS % "",))
_SPLITS = {
    "default": _Split((r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": _Split(_LLAMA3.patterns),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
}
# Texts of tokens that end a turn or a text, in llama.cpp's own list: files do not say it of all of them.
_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<end_of_turn>",
    "</s>",
)  # fmt: skip
_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


class GgufTokenizer:
    """The tokenizer of a GGUF file: `ids` of named tokens, `end_ids`, and `files`, a text for each name."""

    def __init__(self, file: GgufFile) -> None:
        """Raises UnsupportedError for a kind that is not understood, CheckpointError for a damaged one."""
        self.file = file
        self.kind = self._get("model", str)
        if self.kind not in ("gpt2", "llama"):
            raise UnsupportedError(
                f"{file.path}: found the tokenizer {self.kind!r}; supported: gpt2 (BPE), llama (SPM)"
            )
        self.tokens = self._read_tokens()
        self.types = self._list("token_type", [int(TokenType.NORMAL)] * len(self.tokens))
        ids = {name: self._special_id(f"{key}_token_id") for name, key in _NAMED.items()}
        self.ids = {name: index for name, index in ids.items() if index is not None}
        self.special = self._special_ids()
        self.end_ids = self._end_ids()

    def files(self) -> dict[str, str]:
        """Name -> text of the files that go into the directory beside the model's own."""
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.file.metadata.get(
                f"{self.file.metadata['general.architecture']}.context_length"
            ),
            **{f"{name}_token": self.tokens[index] for name, index in self.ids.items()},
        }
        found = {
            "tokenizer.json": self._build().to_str(pretty=True),
            "tokenizer_config.json": _json(config),
            "generation_config.json": _json(self.token_ids()),
        }
        template = self.file.get("tokenizer.chat_template", str)
        return found if template is None else found | {"chat_template.jinja": template}

    def token_ids(self) -> dict[str, Any]:
        """The ids of special tokens, as config.json and generation_config.json have them."""
        ends = self.end_ids[0] if len(self.end_ids) == 1 else self.end_ids
        found = {f"{name}_token_id": self.ids.get(name) for name in ("bos", "pad")} | {
            "eos_token_id": ends or None
        }
        return {name: value for name, value in found.items() if value is not None}

    def _build(self) -> Tokenizer:
        """The tokenizer that `tokenizer.json` holds."""
        tokenizer = self._words() if self.kind == "gpt2" else self._pieces()
        added = [
            AddedToken(self.tokens[index], special=index in self.special, normalized=False)
            for index, kind in enumerate(self.types)
            if index in self.special or kind == TokenType.USER_DEFINED
        ]
        tokenizer.add_tokens(added)
        default = self.kind == "llama" or self._split.add_bos
        before, after = (self._around("bos", default), self._around("eos", False))
        if before or after:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[*before, "$A", *after],
                pair=[*before, "$A", *after, *before, "$B", *after],
                special_tokens=[(token, self.tokens.index(token)) for token in {*before, *after}],
            )
        return tokenizer

    def _around(self, name: str, default: bool) -> list[str]:
        """The token that every text begins (bos) or ends (eos) with, or none."""
        if not self._get(f"add_{name}_token", bool, default):
            return []
        if name not in self.ids:
            raise CheckpointError(
                f"{self.file.path}: texts should have a {name} token, but the file names none"
            )
        return [self.tokens[self.ids[name]]]

    @property
    def _split(self) -> _Split:
        name = self._get("pre", str, "default")
        if name not in _SPLITS:
            raise UnsupportedError(
                f"{self.file.path}: found tokenizer.ggml.pre = {name!r}; supported: {', '.join(_SPLITS)}"
            )
        return _SPLITS[name]

    def _words(self) -> Tokenizer:
        """BPE over bytes: the text is split into words, whose bytes are merged by rank."""
        merges = [_pair(text) for text in self._list("merges", [], str)]
        split = self._split
        tokenizer = self._bpe(merges, ignore_merges=split.ignore_merges)
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _pieces(self) -> Tokenizer:
        """SentencePiece's BPE: two neighbours merge if they make a piece, that of the highest score first."""
        if missing := set(_BYTES) - set(self.tokens):
            raise UnsupportedError(
                f"{self.file.path}: the tokenizer has no piece {min(missing)}; supported: all 256 bytes"
            )
        unknown = self.tokens[self.ids["unk"]] if "unk" in self.ids else None
        how = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
        tokenizer = self._bpe(self._merges(), **how)
        prefix = self._get("add_space_prefix", bool, True)
        replace = normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), replace] if prefix else [replace]
        )
        strip = [decoders.Strip(" ", 1, 0)] if prefix else []
        back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        tokenizer.decoder = decoders.Sequence(back)
        return tokenizer

    def _bpe(self, merges: list[tuple[str, str]], **how: Any) -> Tokenizer:
        """The bare model; CheckpointError where a merge is of tokens that are not there."""
        try:
            return Tokenizer(models.BPE({token: i for i, token in enumerate(self.tokens)}, merges, **how))
        except Exception as error:  # what tokenizers raises has no class of its own
            raise CheckpointError(f"{self.file.path}: the merges do not fit the tokens: {error}") from error

    def _merges(self) -> list[tuple[str, str]]:
        """Every way to make a piece of two others, the best piece first, then the longest left part.

        Pieces that are taken out of the text before (added tokens) take no part; those for bytes do, where a
        text spells them, as in llama.cpp.
        """
        scores, known = self._list("scores", None, float), set(self.tokens)
        merges = []
        for index, piece in enumerate(self.tokens):
            if index in self.special or self.types[index] == TokenType.USER_DEFINED:
                continue
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left in known and right in known:
                    merges.append((-scores[index], index, -cut, left, right))
        return [(left, right) for *_, left, right in sorted(merges)]

    def _special_ids(self) -> set[int]:
        """Control and unknown tokens, and those whose text says that they end a turn."""
        kinds = (TokenType.CONTROL, TokenType.UNKNOWN)
        by_type = {index for index, kind in enumerate(self.types) if kind in kinds}
        return by_type | {index for index, token in enumerate(self.tokens) if token in _ENDS}

    def _end_ids(self) -> list[int]:
        """The tokens that end a text: eos first, then those which the file, or their text, says do so too."""
        named = [self._special_id(f"{name}_token_id") for name in ("eos", "eot", "eom")]
        by_text = [index for index, token in enumerate(self.tokens) if token in _ENDS]
        return list(dict.fromkeys(index for index in (*named, *by_text) if index is not None))

    def _read_tokens(self) -> list[str]:
        tokens = self._list("tokens", None, str)
        tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]  # as llama.cpp does
        if len(set(tokens)) != len(tokens):
            raise CheckpointError(f"{self.file.path}: tokenizer.ggml.tokens has a token twice; it is damaged")
        return tokens

    def _special_id(self, key: str) -> int | None:
        index = self._get(key, int)
        if index is None and self.kind == "llama":  # SentencePiece's own, where a file does not say
            index = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(key)
        if index is not None and not 0 <= index < len(self.tokens):
            raise CheckpointError(
                f"{self.file.path}: tokenizer.ggml.{key} is {index}; expected one of {len(self.tokens)}"
            )
        return index

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        return self.file.get(f"tokenizer.ggml.{key}", kind, default)

    def _list(self, key: str, default: list[Any] | None, kind: type = int) -> list[Any]:
        """An array of the metadata; all but the merges have an entry for each token."""
        found = self._get(key, list, default)
        if found is None or not all(type(entry) is kind for entry in found):
            raise CheckpointError(f"{self.file.path}: tokenizer.ggml.{key} is not a list of {kind.__name__}s")
        if key not in ("tokens", "merges") and len(found) != len(self.tokens):
            raise CheckpointError(
                f"{self.file.path}: {key} has {len(found)} entries; expected {len(self.tokens)}"
            )
        return found


def _pair(merge: str) -> tuple[str, str]:
    """Both halves of a merge, which a space parts (the first half may itself begin with one)."""
    cut = merge.find(" ", 1)
    return merge[:cut], merge[cut + 1 :]


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
