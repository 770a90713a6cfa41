"""Makes files/*.goss and what each decodes to: the program of each version wrote its own, once, for ever.

    PYTHONPATH=tests GOSSAMER_ISA=scalar python tests/packed/make_files.py 1|2|3|4|5|6

Version 1 was written by the program as it was at commit 1df9987, before it knew another version; versions 2
to 6 by the first programs that wrote them. A file that is there is never made again: it stands for those
that people have.
"""

import hashlib
import importlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gossamer import _native
from llamas import save_tiny

FILES = Path(__file__).parent / "files"
COMMON = {
    "hidden_size": 20,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
}
LLAMA, QWEN3, MISTRAL = ["LlamaForCausalLM"], ["Qwen3ForCausalLM"], ["MistralForCausalLM"]
IDS = [3, 71, 15, 92, 65, 35, 89]
FLOATS, INTEGERS = ("f32", "bf16"), ("i8", "i4")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WINDOWS = {
    "use_sliding_window": True,
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention"],
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
UNTIED = {"intermediate_size": 28, "num_hidden_layers": 2, "vocab_size": 101, "tie_word_embeddings": False}
TIED = {
    "intermediate_size": 137,
    "num_hidden_layers": 1,
    "vocab_size": 320,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}
WIDE = {"hidden_size": 132, "intermediate_size": 20}  # two groups of inputs, the second a short one
STRIPS = {"intermediate_size": 270}  # the second strip a short one
ENCODER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "num_hidden_layers": 2,
    "tie_word_embeddings": True,
}
BERT = ENCODER | {"architectures": ["BertModel"], "vocab_size": 101}
ROBERTA = ENCODER | {"architectures": ["RobertaModel"], "vocab_size": 320, "pad_token_id": 1}
# name -> settings beside the common ones, types of the linears. Tied models have a tokenizer, and an int8
# head beside the embedding; from version 4 on an embedding of the type in the name, which is the head. An
# encoder of integers has a tokenizer and an int8 embedding.
MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "v1-floats": (UNTIED | {"architectures": LLAMA, "head_dim": 8}, FLOATS),
    "v1-integers": (TIED | {"architectures": LLAMA, "head_dim": 8, "rope_scaling": LLAMA3}, INTEGERS),
    "v2-qwen3-floats": (UNTIED | {"architectures": QWEN3, "head_dim": 16}, FLOATS),
    "v2-qwen3-integers": (TIED | {"architectures": QWEN3, "head_dim": 12, "rope_scaling": LINEAR}, INTEGERS),
    "v3-mistral-integers": (TIED | {"architectures": MISTRAL, "head_dim": 8, "sliding_window": 4}, INTEGERS),
    "v3-qwen3-floats": (UNTIED | {"architectures": QWEN3, "head_dim": 12} | WINDOWS, FLOATS),
    "v4-i8-integers": (TIED | {"architectures": LLAMA, "head_dim": 8}, INTEGERS),
    "v4-i4-integers": (TIED | WIDE | {"architectures": LLAMA, "head_dim": 8}, INTEGERS),
    "v5-blocks-integers": (TIED | STRIPS | {"architectures": LLAMA, "head_dim": 8}, ("i8",)),
    "v6-bert-floats": (BERT, FLOATS),
    "v6-roberta-integers": (ROBERTA, INTEGERS),
}


def storages(name: str) -> tuple[str, str]:
    """Of linears that are not, and that are, stored by their zeros."""
    return "dense", "blocks" if name.startswith("v5") else "sparse"


def write(name: str, program: Any) -> None:
    """The file, its linears by turns of each type and storage, half of their weights zero."""
    settings, types = MODELS[name]
    config, rng = COMMON | settings, np.random.default_rng(sorted(MODELS).index(name))
    encoder = name.startswith("v6")
    has_tokenizer = name.endswith("integers")
    companions = {"config": json.dumps(config), "tokenizer": tokenizer() if has_tokenizer else b""}
    with program.PackedWriter(FILES / f"{name}.goss", **companions, parent="ab" * 32) as writer:
        add_vector = program.PackedWriter.norm if name.startswith("v1") else program.PackedWriter.vector
        for vector, size in vectors(config).items():
            add_vector(writer, vector, rng.normal(1, 0.1, size).astype(np.float32))
        embedding = rng.normal(0, 0.3, (config["vocab_size"], config["hidden_size"])).astype(np.float32)
        if name.startswith("v4"):
            write_linear(writer, "model.embed_tokens", name.split("-")[1], embedding.shape, "dense", rng)
        else:
            words = "embeddings.word_embeddings" if encoder else "model.embed_tokens"
            if encoder and has_tokenizer:
                write_linear(writer, words, "i8", embedding.shape, "dense", rng)
            else:
                writer.floats(words, bfloat16(embedding))
        for index, (linear, shape) in enumerate(linears(config).items()):
            storage = storages(name)[index // 2 % 2]
            write_linear(writer, linear, types[index % len(types)], shape, storage, rng)
        if not name.startswith("v4") and not encoder:
            write_linear(writer, "lm_head", types[0], embedding.shape, "dense", rng)


def vectors(config: dict[str, Any]) -> dict[str, int]:
    if config["hidden_act"] == "gelu":
        return encoder_vectors(config)
    sizes = {"model.norm.weight": config["hidden_size"]}
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            sizes[f"{prefix}{norm}.weight"] = config["hidden_size"]
        for norm in ("q_norm", "k_norm") if config["architectures"] == QWEN3 else ():
            sizes[f"{prefix}self_attn.{norm}.weight"] = config["head_dim"]
    return sizes


def encoder_vectors(config: dict[str, Any]) -> dict[str, int]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    sizes = {
        "embeddings.position_embeddings.weight": config["max_position_embeddings"] * hidden,
        "embeddings.token_type_embeddings.weight": config["type_vocab_size"] * hidden,
    }
    norms = ["embeddings.LayerNorm"]
    for name in linears(config):
        sizes[f"{name}.bias"] = inner if name.endswith("intermediate.dense") else hidden
        if name.endswith("output.dense"):
            norms.append(name.replace("dense", "LayerNorm"))
    return sizes | {f"{norm}.{part}": hidden for norm in norms for part in ("weight", "bias")}


def linears(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    if config["hidden_act"] == "gelu":
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        of_block = {f"attention.self.{name}": (hidden, hidden) for name in ("query", "key", "value")}
        of_block |= {"attention.output.dense": (hidden, hidden), "intermediate.dense": (inner, hidden)}
        of_block["output.dense"] = (hidden, inner)
        layers = range(config["num_hidden_layers"])
        return {f"encoder.layer.{layer}.{name}": it for layer in layers for name, it in of_block.items()}
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    width, kv = heads * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
    attention = {"q_proj": (width, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
    attention["o_proj"] = (hidden, width)
    feed_forward = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    of_block = {f"self_attn.{name}": shape for name, shape in attention.items()}
    of_block |= {f"mlp.{name}": shape for name, shape in feed_forward.items()}
    return {
        f"model.layers.{index}.{name}": shape
        for index in range(config["num_hidden_layers"])
        for name, shape in of_block.items()
    }


def write_linear(
    writer: Any, name: str, values: str, shape: tuple[int, int], storage: str, rng: np.random.Generator
) -> None:
    zeros_NK = rng.random(shape) < 0.5
    if values in FLOATS:
        w_NK = np.where(zeros_NK, 0, rng.normal(0, 0.2, shape)).astype(np.float32)
        writer.floats(name, w_NK if values == "f32" else bfloat16(w_NK), storage)
        return
    scale_N = rng.uniform(0.5, 1.0, shape[0]).astype(np.float32)
    if values == "i8":
        q_NK = np.where(zeros_NK, 0, rng.integers(-128, 128, shape)).astype(np.int8)
        writer.int8(name, q_NK, scale_N / 300, storage)
    else:
        q_NK = np.where(zeros_NK, 0, rng.integers(-8, 8, shape)).astype(np.int8)
        multiplier_NG = rng.integers(1, 17, (shape[0], -(-shape[1] // 128))).astype(np.uint8)
        writer.int4(name, q_NK, multiplier_NG, scale_N / 200, storage)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Bit patterns, cut off: what the weights are does not matter here."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def tokenizer() -> bytes:
    """Of 320 tokens, as the tests' random models have it."""
    with tempfile.TemporaryDirectory() as directory:
        return (save_tiny("llama3", Path(directory)) / "tokenizer.json").read_bytes()


def contents(packed: Any) -> dict[str, Any]:
    """What an open file holds: the hash of each matrix and vector (float32), and logits of the engine.

    `alone` are those of the first of `IDS` by itself, `last` those after all of them; keys and values are
    cached as float32. Of an encoder they are hidden states.
    """
    hashes = {name: sha256(packed.linear(name)) for name in json.loads(packed.metadata["layers"])}
    read_vector = packed.vector if hasattr(packed, "vector") else packed.norm  # its name at 1df9987
    hashes |= {name: sha256(read_vector(name)) for name in vectors(packed.config)}
    step = hidden_states(packed) if packed.metadata["version"] == "6" else logits(packed)
    alone, last = (step(np.array(ids, np.int32))[-1].tolist() for ids in (IDS[:1], IDS))
    return {"sha256": hashes, "alone": alone, "last": last}


def logits(packed: Any) -> Callable[[np.ndarray], np.ndarray]:
    model = _native.Model(packed.buffer, packed.native_tensors(), packed.native_config(), 1, "f32")
    return lambda ids: model.forward([model.new_sequence(len(ids))], [ids])


def hidden_states(packed: Any) -> Callable[[np.ndarray], np.ndarray]:
    arguments = packed.buffer, packed.native_tensors(), packed.native_encoder_config()
    encoder = _native.Encoder(*arguments, 1)
    return lambda ids: encoder.hidden_states(ids, np.zeros_like(ids), np.array([len(ids)], np.int32))


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, "<f4").tobytes()).hexdigest()


if __name__ == "__main__":
    version = sys.argv[1]
    program = importlib.import_module("gossamer.packed" if version == "1" else "gossamer.packed.writer")
    for name in MODELS:
        if name.startswith(f"v{version}"):
            write(name, program)
            found = contents(program.Packed.open(FILES / f"{name}.goss"))
            (FILES / f"{name}.json").write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")
