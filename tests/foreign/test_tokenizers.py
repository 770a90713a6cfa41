"""Tokenizers out of GGUF files give llama.cpp's ids, which golden_ids.py got from llama.cpp built apart."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from foreign.golden_ids import FEWER, golden, write_vocabulary
from foreign.texts import texts
from gossamer.foreign.gguf_file import GgufFile
from gossamer.foreign.gguf_tokenizer import GgufTokenizer
from gossamer.tokens.tokenizer import Tokenizer

VOCABULARIES = golden()["vocabularies"]


def write_tokenizer(metadata: dict[str, Any], folder: Path) -> Path:
    """The tokenizer's files, as `import` writes them from a GGUF file with this metadata."""
    found = GgufTokenizer(GgufFile.open(write_vocabulary(folder / "vocabulary.gguf", metadata)))
    for name, text in found.files().items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    write_tokenizer(VOCABULARIES[name]["tokenizer"], tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer, theirs = Tokenizer.open(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text, ids in zip(texts()[::FEWER], VOCABULARIES[name]["ids"], strict=True):
        assert tokenizer.encode(text) == ids == theirs.encode(text), text
        if not name.startswith("spm"):  # those drop a first space, and read a byte's name as the byte
            without = tokenizer.encode(text, bos=False)
            assert tokenizer.decode(without, skip_special_tokens=False) == text
