"""What training will need of memory, beside what there is, before the first step.

A run holds, beyond weights: a gradient and two moments of each weight that is trained (12 bytes), and what
the backward pass of a micro-batch needs. The latter, in bytes a token (hidden width D, FFN width F, key and
value width S, heads A, row length T; counted in transformers' own Llama, a test counts again):

    f32    layer  40 D + 8 S + 16 F    + 4 A T where attention is eager
    bf16   layer  40 D + 4 S +  8 F    + 6 A T ; and a copy of each weight of a dense product
    head   12 V                        a teacher: 8 D a layer

A checkpoint is written when gradients and activations are gone: its first process writes out the sparse
layers' weights dense, or holds all moments of a model that FSDP shards. What is more than they were counts.
"""

import os
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from gossamer.errors import ConfigError
from gossamer.machine import available_memory_bytes
from gossamer.training.masks import local
from gossamer.training.parallel import is_first
from gossamer.training.sparse_linear import SparseLinear


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a run will take of the memory that is still free."""

    weights: int
    gradients: int
    moments: int
    activations: int
    logits: int
    teacher: int
    saving: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def micro_batch(self) -> int:
        """The part that falls with the tokens of a micro-batch."""
        return self.activations + self.logits + self.teacher


def estimate_memory(
    model: LlamaForCausalLM,
    num_rows: int,
    row_length: int,
    precision: str,
    *,
    device: str = "cpu",
    teacher: nn.Module | None = None,
) -> MemoryEstimate:
    """For micro-batches of `num_rows` rows; weights count where they are still to be moved to the device."""
    config: LlamaConfig = model.config
    trained = sum(local(weight).numel() for weight in model.parameters() if weight.requires_grad)
    moved = [model] if teacher is None else [model, teacher]
    num_tokens, num_layers = num_rows * row_length, config.num_hidden_layers
    step = MemoryEstimate(
        weights=0 if device == "cpu" else sum(map(_bytes, moved)),
        gradients=4 * trained,
        moments=8 * trained,
        activations=num_tokens * num_layers * _layer_bytes(config, row_length, precision)
        + _copied_weights(model, precision, device),
        logits=12 * num_tokens * config.vocab_size,
        teacher=0 if teacher is None else 8 * num_tokens * num_layers * config.hidden_size,
    )
    freed = step.gradients + step.micro_batch
    return replace(step, saving=max(0, _saved_bytes(model, device) - freed))


def check_memory(estimate: MemoryEstimate, available: int, num_tokens: int, *, could_be_sparse: bool) -> None:
    """Raise ConfigError, with the numbers and what to lower, if the estimate is above what is there.

    num_tokens: of a micro-batch; could_be_sparse: whether dense products run of weights that have zeros.
    """
    if estimate.total <= available:
        return
    parts = ", ".join(
        f"{field.name.replace('_', ' ')} {_gb(getattr(estimate, field.name))}"
        for field in fields(estimate)
        if getattr(estimate, field.name)
    )
    fitting = (available - estimate.total + estimate.micro_batch) * num_tokens // max(1, estimate.micro_batch)
    advice = (
        f"lower --max-length and --batch-tokens to {fitting // 16 * 16} or less (a micro-batch has "
        f"{num_tokens} tokens now)"
        if fitting >= 16
        else "free memory, or train a smaller model"
    )
    if could_be_sparse:
        advice += "; --kernel sparse needs no gradients and moments of zeros"
    raise ConfigError(
        f"training needs about {_gb(estimate.total)} of memory ({parts}); found {_gb(available)} available: "
        f"{advice}"
    )


def available_bytes(device: str) -> int | None:
    """Memory that a process can still take: of its GPU, else its share of what the machine gives it.

    Processes of one torchrun share a machine alike. None where the system does not say.
    """
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    available = available_memory_bytes()
    return None if available is None else available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def optimizer_gradient_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the gradients and optimizer states in this process now, scalars aside."""
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = [*gradients, *(value for value in states if isinstance(value, Tensor) and value.ndim)]
    return sum(local(tensor).nbytes for tensor in held)


class HeldBytes(TrainerCallback):
    """Notes `optimizer_gradient_bytes` at the first step: `num_bytes`, None before."""

    num_bytes: int | None = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.num_bytes is None:
            self.num_bytes = optimizer_gradient_bytes(kwargs["model"], kwargs["optimizer"])


def _layer_bytes(config: LlamaConfig, row_length: int, precision: str) -> int:
    heads = config.num_attention_heads
    head_dim: Any = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value = config.num_key_value_heads * head_dim
    wide = precision == "f32"
    products = (8 if wide else 4) * key_value + (16 if wide else 8) * config.intermediate_size
    eager = config._attn_implementation == "eager"
    return 40 * config.hidden_size + products + eager * (4 if wide else 6) * heads * row_length


def _copied_weights(model: nn.Module, precision: str, device: str) -> int:
    """bfloat16 copies of weights, and sparse ones written out dense where products are not native."""
    size, copied = (2 if precision == "bf16" else 4), 0
    for module in model.modules():
        if isinstance(module, nn.Linear) and precision == "bf16":
            copied += size * local(module.weight).numel()
        elif isinstance(module, SparseLinear) and device != "cpu":
            copied += size * module.out_features * module.in_features
    return copied


def _saved_bytes(model: nn.Module, device: str) -> int:
    """Dense copies of sparse weights, where they are; and on the CPU, whole moments of sharded ones."""
    if not is_first():
        return 0
    sparse = [module for module in model.modules() if isinstance(module, SparseLinear)]
    sharded = [weight for weight in model.parameters() if isinstance(weight, DTensor)]
    copies = sum(4 * module.out_features * module.in_features for module in sparse)
    return copies + (sum(8 * weight.numel() for weight in sharded) if device == "cpu" else 0)


def _bytes(module: nn.Module) -> int:
    """Of the weights; and of the places of a sparse layer's values, which torch's products use."""
    sparse = [module for module in module.modules() if isinstance(module, SparseLinear)]
    places = sum(8 * module.values.numel() for module in sparse)
    return places + sum(local(weight).nbytes for weight in module.parameters())


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
