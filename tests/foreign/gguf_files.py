"""GGUF files written with the `gguf` package: tokenizers of a few hundred tokens, and tiny models."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from foreign.texts import texts
from gossamer.architecture.anatomy import Anatomy
from gossamer.checkpoint.directory import Checkpoint

TYPE = gguf.TokenType
CONTROL_TOKENS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")


def bpe(pre: str, vocab_size: int = 700) -> dict[str, Any]:
    """Metadata of a byte-level BPE whose merges cross words: only the split of `pre` keeps them apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens, merges = _trained(tokenizer, vocab_size, list(CONTROL_TOKENS), alphabet)
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, "<web>"],
        "token_type": [*_types(len(tokens)), int(TYPE.USER_DEFINED)],
        "merges": [f"{left} {right}" for left, right in merges],
        "bos_token_id": 1,
        "eos_token_id": 4,
        "unknown_token_id": 0,
        "padding_token_id": 2,
    }


def spm(vocab_size: int = 900) -> dict[str, Any]:
    """Metadata of a SentencePiece BPE: control tokens, bytes, merged pieces by score, then characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    found, merges = _trained(tokenizer, vocab_size, list(CONTROL_TOKENS), [])
    merged = list(dict.fromkeys(left + right for left, right in merges))
    letters = [token for token in found if token not in merged and token not in CONTROL_TOKENS]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    taken = {*CONTROL_TOKENS, *bytes_, "<web>"}
    pieces = [piece for piece in [*merged, *letters] if piece not in taken]
    first = len(CONTROL_TOKENS)
    return {
        "model": "llama",
        "tokens": [*CONTROL_TOKENS, *bytes_, *pieces, "<web>"],
        "scores": [0.0] * (first + 256) + [-float(rank) for rank in range(len(pieces))] + [0.0],
        "token_type": [
            *_types(first),
            *[int(TYPE.BYTE)] * 256,
            *[int(TYPE.NORMAL)] * len(pieces),
            int(TYPE.USER_DEFINED),
        ],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def _trained(
    tokenizer: Tokenizer, vocab_size: int, special: list[str], alphabet: list[str]
) -> tuple[list[str], list[tuple[str, str]]]:
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [(left, right) for left, right in model["merges"]]


def _types(count: int) -> list[int]:
    """Unknown, then control tokens, then normal ones."""
    control = [int(TYPE.UNKNOWN), *[int(TYPE.CONTROL)] * (len(CONTROL_TOKENS) - 1)]
    return control + [int(TYPE.NORMAL)] * (count - len(control))


def write_header(path: Path, metadata: dict[str, Any]) -> gguf.GGUFWriter:
    """A writer with these key-value pairs; `general.architecture` is among them."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add.get(type(value), writer.add_array)(key, value)
    return writer


def tokenizer_keys(tokenizer: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def model_keys(anatomy: Anatomy, architecture: str) -> dict[str, Any]:
    """What llama.cpp's converter writes of a model."""
    heads = anatomy.attention
    assert heads.rope
    own = {
        "block_count": anatomy.num_layers,
        "context_length": anatomy.max_position_embeddings,
        "embedding_length": anatomy.hidden_size,
        "feed_forward_length": anatomy.blocks[0].feed_forward.width,
        "attention.head_count": heads.num_heads,
        "attention.head_count_kv": heads.num_kv_heads,
        "attention.key_length": heads.head_dim,
        "attention.value_length": heads.head_dim,
        "attention.layer_norm_rms_epsilon": float(anatomy.norm_eps),
        "rope.freq_base": float(heads.rope.theta),
        "rope.dimension_count": heads.head_dim,
        "vocab_size": anatomy.vocab_size,
    }
    return {"general.architecture": architecture} | {f"{architecture}.{k}": v for k, v in own.items()}


def write_model(
    path: Path,
    directory: Path,
    architecture: str,
    tokenizer: dict[str, Any],
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    **more: Any,
) -> Path:
    """The directory's model as a GGUF file, its matrices quantized by the `gguf` package; `more` are keys."""
    source = Checkpoint.open(directory)
    anatomy = source.architecture
    metadata = model_keys(anatomy, architecture) | tokenizer_keys(tokenizer) | more
    writer = write_header(path, metadata)
    kind = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table = gguf.get_tensor_name_map(kind, anatomy.num_layers)
    for name in source.names:
        values = source.float32(name)
        known = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known
        if architecture == "llama" and "q_proj" in name:
            values = paired(values, anatomy.attention.num_heads)
        if architecture == "llama" and "k_proj" in name:
            values = paired(values, anatomy.attention.num_kv_heads)
        stored = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else quantization
        writer.add_tensor(known, gguf.quantize(values, stored), raw_dtype=stored)
    if (source.config.get("rope_parameters") or {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_factors(directory))
    finish(writer)
    return path


def paired(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: the two halves of each head interleaved."""
    return rows.reshape(num_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def rope_factors(directory: Path) -> np.ndarray:
    """Llama 3.1's stretch as llama.cpp has it: a divisor for each frequency, from transformers' own."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.from_pretrained(directory)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    plain = 1.0 / np.float32(config.rope_parameters["rope_theta"]) ** exponents
    return (plain / stretched.numpy()).astype(np.float32)
