"""Makes `peer_ids.json.xz`: vocabularies, and the ids that llama.cpp itself gives to our texts with them.

    python tests/foreign/golden_ids.py PEER SMOLLM2.gguf

PEER is `peer_tokenize.cpp`, built apart against llama.cpp (here: the sources in llama_cpp_python 0.3.36):

    cmake -S llama.cpp -B build -DBUILD_SHARED_LIBS=ON -DLLAMA_CURL=OFF && cmake --build build --target llama
    g++ -std=c++17 -Illama.cpp/include -Illama.cpp/ggml/include peer_tokenize.cpp -o peer_tokenize \\
        -Lbuild/bin -lllama -lggml -lggml-base -Wl,-rpath,$PWD/build/bin
"""

import json
import lzma
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from foreign.gguf_files import bpe, finish, spm, tokenizer_keys, write_header
from foreign.texts import texts

GOLDEN = Path(__file__).with_name("peer_ids.json.xz")
FEWER = 4  # of the small vocabularies, every fourth text: their ids are many
PRES = ("default", "gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2")


def vocabularies() -> dict[str, dict[str, Any]]:
    """A name for each case -> its tokenizer's metadata."""
    found = {pre: bpe(pre) for pre in PRES}
    found["with bos and eos"] = bpe("gpt-2") | {"add_bos_token": True, "add_eos_token": True}
    found["spm"] = spm()
    found["spm without a first space"] = spm() | {"add_space_prefix": False, "add_bos_token": False}
    return found


def golden() -> dict[str, Any]:
    """`smollm2`: ids of each text; `vocabularies`: name -> `tokenizer` (metadata), `ids` of fewer texts."""
    return json.loads(lzma.decompress(GOLDEN.read_bytes()))


def peer_ids(peer: str, file: str, of: list[str]) -> list[list[int]]:
    """What llama.cpp makes of the texts."""
    encoded = [text.encode() for text in of]
    given = b"".join(b"%d\n%s" % (len(text), text) for text in encoded)
    completed = subprocess.run([peer, file], input=given, capture_output=True, check=True)
    return [[int(word) for word in line.split()] for line in completed.stdout.decode().split("\n")[:-1]]


def write_vocabulary(path: Path, tokenizer: dict[str, Any]) -> Path:
    """A GGUF file with a tokenizer and no tensors."""
    keys = {"general.architecture": "llama"} | tokenizer_keys(tokenizer)
    sizes = dict.fromkeys(("block_count", "context_length", "embedding_length", "attention.head_count"), 1)
    keys |= {f"llama.{key}": value for key, value in sizes.items()}
    keys["llama.attention.layer_norm_rms_epsilon"] = 1e-5
    finish(write_header(path, keys))
    return path


def main() -> None:
    peer, smollm2 = sys.argv[1:]
    content: dict[str, Any] = {"smollm2": peer_ids(peer, smollm2, texts()), "vocabularies": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, tokenizer in vocabularies().items():
            file = write_vocabulary(Path(folder) / "vocabulary.gguf", tokenizer)
            ids = peer_ids(peer, str(file), texts()[::FEWER])
            content["vocabularies"][name] = {"tokenizer": tokenizer, "ids": ids}
    GOLDEN.write_bytes(lzma.compress(json.dumps(content, separators=(",", ":")).encode(), preset=9))


if __name__ == "__main__":
    main()
