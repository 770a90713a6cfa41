"""Write a GGUF of a Llama shape with random weights, unless it is there, and print the bytes a step reads.

    python gguf_file.py FILE Q8_0 '{"num_hidden_layers": 22, ...}'     (a Hugging Face config)

Run with a Python that has `gguf`, llama.cpp's own package. All matrices, embedding and head too, are of the
one type: the fewest bytes that llama.cpp can read (its own tool would keep a Q4_0 model's head in Q6_K). 64
random rows are quantized and repeated. There is no tokenizer: llama-bench draws its tokens.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

BLOCK_ROWS = 64


def matrices(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Rows and columns by GGUF name."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    vocabulary = (config["vocab_size"], hidden)
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {"attn_q": (hidden, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden)}
    layer |= {"attn_output": (hidden, hidden), "ffn_gate": (inner, hidden)}
    layer |= {"ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    found = {"token_embd.weight": vocabulary}
    for index in range(config["num_hidden_layers"]):
        found |= {f"blk.{index}.{name}.weight": shape for name, shape in layer.items()}
    return found if config.get("tie_word_embeddings") else found | {"output.weight": vocabulary}


def norms(config: dict[str, Any]) -> list[str]:
    kinds = ("attn_norm", "ffn_norm")
    layers = range(config["num_hidden_layers"])
    return ["output_norm.weight"] + [f"blk.{index}.{kind}.weight" for index in layers for kind in kinds]


def describe(writer: Any, config: dict[str, Any]) -> None:
    """The shape, as llama.cpp's `llama` architecture wants it."""
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def write(file: Path, type_name: str, config: dict[str, Any]) -> None:
    """The whole file; under another name until it is complete."""
    gguf = importlib.import_module("gguf")
    kind = gguf.GGMLQuantizationType[type_name]
    rng = np.random.default_rng(0)
    partial = file.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    describe(writer, config)
    blocks: dict[int, np.ndarray] = {}
    for name, (rows, columns) in matrices(config).items():
        if columns not in blocks:
            block = (rng.standard_normal((BLOCK_ROWS, columns)) / np.sqrt(columns)).astype(np.float32)
            blocks[columns] = gguf.quants.quantize(block, kind)
        repeated = np.resize(blocks[columns], (rows, blocks[columns].shape[1]))
        writer.add_tensor(name, repeated, raw_dtype=kind)
    for name in norms(config):
        writer.add_tensor(name, np.ones(config["hidden_size"], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(file)


def step_bytes(file: Path) -> int:
    """Bytes that decoding a token reads: every tensor, the embedding only where it is the head as well."""
    reader = importlib.import_module("gguf").GGUFReader(file)
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
    untied = "output.weight" in sizes
    return sum(size for name, size in sizes.items() if not (untied and name == "token_embd.weight"))


def main() -> None:
    file, type_name, config = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    if not file.is_file():
        write(file, type_name, config)
    print(step_bytes(file))


if __name__ == "__main__":
    main()
