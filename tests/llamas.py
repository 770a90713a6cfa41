"""Random models: Llamas of each supported variant, and any other family; a tokenizer trained on this file."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from gossamer.modules.decoder import Block

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
VARIANTS = {
    "llama2": {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "llama3": {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    "linear": {
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    },
    "sharded": {"num_key_value_heads": 2},
    "bf16": {"num_key_value_heads": 2},
    "fp16": {"num_key_value_heads": 2},
}


def walk_through(block: Block, hidden_BTD: torch.Tensor) -> torch.Tensor:
    """The layer's output, which takes the place of its input."""
    for _ in block.walk(hidden_BTD):
        pass
    return hidden_BTD


def save_tiny(variant: str, path: Path) -> Path:
    torch.manual_seed(sorted(VARIANTS).index(variant))
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=104,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=12,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        **VARIANTS[variant],
    )
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(variant, torch.float32)
    return save_random(config, path, dtype, max_shard_size="100KB" if variant == "sharded" else "5GB")


def save_random(config: PretrainedConfig, path: Path, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
    """A model of any family with random weights, norms near 1 and biases near 0, and the tokenizer."""
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.Module.to(model, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0, 0.1) if name.endswith("norm.weight") else parameter.normal_(0.0, 0.15)
    model.save_pretrained(path, **how)
    _save_tokenizer(path)
    return path


def _save_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        path
    )
