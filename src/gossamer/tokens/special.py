"""Special tokens that tokenizer_config.json has beside those of tokenizer.json, as transformers adds them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from gossamer.errors import CheckpointError
from gossamer.tokens.encoder import NAMED_TOKENS, valid_text


def add_special_tokens(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any]) -> dict[str, str]:
    """Give ids to the tokens that only the configuration knows, in its order; returns the named ones' texts.

    Tokens that it lists with other flags than tokenizer.json get its flags.
    """
    known = {token.content: repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if not isinstance(listed, dict) or not all(key.isdecimal() and len(key) < 10 for key in listed):
        raise CheckpointError(f"tokenizer_config: added_tokens_decoder is {listed!r:.80}; expected ids.")
    if not isinstance(extra, dict | list):
        raise CheckpointError(f"tokenizer_config: extra_special_tokens is {extra!r:.80}; expected a list.")
    named = _named_tokens(config, extra if isinstance(extra, dict) else {})
    in_order = [_added_token(listed[key], "a special token") for key in sorted(listed, key=int)]
    tokens = [token for token in in_order if known.get(token.content) != repr(token)]
    unnamed = [_added_token(value, "a special token") for value in extra] if isinstance(extra, list) else []
    for token in (*named.values(), *unnamed):
        if token.content not in known and token.content not in map(str, tokens):
            tokens.append(token)
    texts = {name: token.content for name, token in named.items()}
    for token in tokens:
        token.special = token.special or token.content in texts.values()
    tokenizer.add_tokens(tokens)
    return texts


def no_tokenizer(directory: Path) -> CheckpointError:
    """The error of a model directory without tokenizer.json."""
    found = "tokenizer.model only" if (directory / "tokenizer.model").is_file() else "none"
    return CheckpointError(
        f"{directory}: no tokenizer.json (found: {found}). "
        "Save the tokenizer once with transformers' AutoTokenizer to make one."
    )


def beyond_the_rows(ids: Mapping[str, int], num_rows: int, origin: str) -> CheckpointError:
    """The error of a tokenizer with an id that has no row in the embedding."""
    token, index = max(ids.items(), key=lambda item: item[1])
    return CheckpointError(
        f"{origin}: the token {token!r} has the id {index}, but the embedding has {num_rows} rows; "
        "take it out of the tokenizer's files, or resize the embedding with transformers"
    )


def _named_tokens(config: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The tokens with the usual names, then those that only this model has, such as `image_token`."""
    named = {name: value for name in NAMED_TOKENS if (value := config.get(name))}
    own = {
        name: value for name, value in config.items() if name.endswith("_token") and isinstance(value, str)
    }
    tokens = {name: _added_token(value, name) for name, value in {**named, **own, **extra}.items()}
    for token in tokens.values():
        token.special = True
    return tokens


def _added_token(value: Any, name: str) -> AddedToken:
    """A special token as tokenizer_config.json writes it: its text, or an object with flags."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or valid_text(content) != content:
        raise CheckpointError(f"tokenizer_config: {name} is {value!a:.80}; expected a text.")
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(content, **{name: bool(value[name]) for name in names if name in value})
