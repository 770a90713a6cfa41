"""What tokenizers kept in files of their own before tokenizer_config.json had it all.

transformers reads them only where tokenizer_config.json has no `added_tokens_decoder`, which later versions
write; so does this.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gossamer.architecture.config import read_json
from gossamer.errors import CheckpointError

SPECIAL_TOKENS_MAP, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"


def with_older_files(
    directory: Path, config: Mapping[str, Any], document: Mapping[str, Any], named: tuple[str, ...]
) -> dict[str, Any]:
    """The tokenizer's configuration with what the older files add; `document` is its tokenizer.json.

    `special_tokens_map.json` names special tokens (the fields `named`), and counts before the configuration.
    `added_tokens.json` has the ids of tokens that were added, of which tokenizer.json knows more if it has
    them.
    """
    merged = dict(config)
    if (file := directory / SPECIAL_TOKENS_MAP).is_file():
        merged = _with_special_tokens(merged, read_json(file))
    if (file := directory / ADDED_TOKENS).is_file():
        listed = merged.get("extra_special_tokens") or merged.get("additional_special_tokens")
        special = [_text(merged.get(name)) for name in named]
        special += [_text(token) for token in listed] if isinstance(listed, list) else []
        tokens = document.get("added_tokens")
        known = [it.get("id") for it in tokens if isinstance(it, dict)] if isinstance(tokens, list) else []
        added = {}
        for text, index in read_json(file).items():
            if type(index) is not int or index < 0:
                raise CheckpointError(f"{file}: the token {text!r} has the id {index!r}; expected a number")
            if index not in known:
                flags = {"special": text in special, "normalized": text not in special}
                added[str(index)] = {"content": text, **flags}
        merged["added_tokens_decoder"] = added
    return merged


def _with_special_tokens(config: dict[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the special tokens of the map."""
    if config.get("additional_special_tokens") and not config.get("extra_special_tokens"):
        config["extra_special_tokens"] = config.pop("additional_special_tokens")
    for key, value in found.items():
        before = config.get(key) or []
        if key == "extra_special_tokens" and isinstance(value, list) and isinstance(before, list):
            config[key] = before + [token for token in value if token not in before]
        else:
            config[key] = value
    return config


def _text(token: Any) -> Any:
    """The text of a special token, which is a text or an object with flags."""
    return token.get("content") if isinstance(token, dict) else token
