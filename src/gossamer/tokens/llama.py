"""What transformers' LlamaTokenizer makes of a tokenizer.json: SentencePiece's rules for the file's."""

import json
from collections.abc import Mapping
from typing import Any

DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def as_llama_tokenizer(
    document: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json as the class reads them: the leading space is a pre-tokenizer.

    A tokenizer of bytes (Llama 3's) and one that is not BPE stay as they are.
    """
    if document["model"].get("type") != "BPE" or '"ByteLevel"' in json.dumps(document.get("pre_tokenizer")):
        return document, dict(config)
    config = DEFAULTS | dict(config)
    prefix_space = config.get("add_prefix_space") is not False
    scheme = ("always" if config.get("legacy") else "first") if prefix_space else "never"
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    rebuilt = {
        **document,
        "added_tokens": [] if "added_tokens_decoder" in config else document.get("added_tokens", []),
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {**document["model"], "fuse_unk": True, "byte_fallback": True, "dropout": None},
    }
    return rebuilt, config
