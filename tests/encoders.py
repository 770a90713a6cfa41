"""Small encoders of random weights as transformers saves them, with a tokenizer of words."""

import json
import string
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from gossamer.checkpoint.directory import Checkpoint
from gossamer.checkpoint.fused import stored_names
from gossamer.checkpoint.schemes import W8A8
from gossamer.compress.int8 import quantize_weights, row_scales

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *string.ascii_lowercase,
]
SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "type_vocab_size": 2,
}
MODERN = {  # in a ModernBERT: a first layer, one with a window, and one that sees everything
    "num_hidden_layers": 4,
    "local_attention": 10,
    "global_attn_every_n_layers": 3,
    "classifier_pooling": "mean",
    **{f"{name}_token_id": index for index, name in enumerate(("pad", "unk", "cls", "sep"))},
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def save_encoder(directory: Path, name: str = "BertModel", seed: int = 0, **config: Any) -> Any:
    """transformers' model of the class `name`, saved to `directory` and returned."""
    torch.manual_seed(seed)
    kind: Any = getattr(transformers, name)
    is_modern = name.startswith("ModernBert")  # whose hidden states no norm keeps small
    sizes, std = (SIZES | MODERN, 0.15) if is_modern else (SIZES, 0.3)
    model = kind(kind.config_class(**sizes | config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std if parameter.dim() == 2 else 0.1)
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight += 1
    model.save_pretrained(directory)
    tokenizer = Tokenizer(
        models.WordPiece({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {f"{it}_token": f"[{it.upper()}]" for it in ("pad", "unk", "cls", "sep", "mask")}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)
    return model


def round_to_int8(directory: Path, sparsity: float = 0.0, together: int = 1) -> Path:
    """Make the directory's linears W8A8, so many of their weights zero, `together` at a time."""
    tensors, source = load_file(directory / "model.safetensors"), Checkpoint.open(directory)
    generator = torch.Generator().manual_seed(0)
    for name in stored_names(source.architecture, source.linears):
        weight = tensors[f"{name}.weight"]
        shape = (weight.shape[0], weight.shape[1] // together)
        zero = torch.rand(shape, generator=generator).repeat_interleave(together, 1) < sparsity
        weight = weight.masked_fill(zero, 0.0)
        scale = row_scales(weight)
        tensors[f"{name}.weight"] = quantize_weights(weight, scale).to(torch.int8)
        tensors[f"{name}.weight_scale"] = scale
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = source.config | {"quantization_config": W8A8.config([])}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory
