"""How much memory training will need, compared before the first step with how much is available.

Beyond its weights, a run holds a gradient and two moments of each trained weight (12 bytes), and what the
backward pass of a micro-batch needs. The latter, in bytes a token, with hidden width D, feed-forward width F,
query width Q, key and value width S, query heads A and row length T:

    f32    a layer  32 D + 8 Q + 8 S + 16 F, if q and k are normed + 8 (Q + S)
    bf16   a layer  32 D + 8 Q + 4 S +  8 F, if q and k are normed + 6 (Q + S), if attention is that of short
                    rows + 2 A T, and a copy of each weight of a dense product
    an encoder      a layer  32 D + 8 F + 4 T (f32), 24 D + 4 F + 2 T (bf16), with attention of short rows
                    24 D + 4 F + (2 A + 1) T; of a head over the vocabulary 4 D V more, of others nothing
    checkpointed    4 D a layer, and what one layer takes as above
    the head        on the CPU 4 V for 256 tokens at a time (f32) or 2 V for 2,048 (bf16); beside a teacher in
                    memory 24 V for 256 tokens (f32), or as much more (bf16); on a GPU 24 V, or 48 V beside a
                    teacher, for 2,048 tokens (f32), or as much more (bf16); and for its gradient 4 D V (f32)
                    or 6 D V (bf16)
    adapters        16 D a layer less, as norms are frozen, and no copies of weights, no gradient of the head,
                    but 12 a weight of the largest linear, whose sum with its adapter is made in passing
    a teacher       8 D a layer; on a device of its own 4 D a layer there too

The numbers were counted in transformers' own models; a test counts them again. A checkpoint is written when
gradients and activations have been freed. Its first process then writes out the sparse layers' weights as
dense matrices, or holds all moments of a model that FSDP shards; what that needs beyond what was freed
counts.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback

from gossamer.architecture.anatomy import Anatomy
from gossamer.architecture.families import read_anatomy
from gossamer.errors import ConfigError
from gossamer.machine import available_memory_bytes
from gossamer.training.attention import SHORT_ROWS
from gossamer.training.head_loss import CHUNK_TOKENS, PRODUCT_TOKENS
from gossamer.training.lora import LowRankLinear, adapters
from gossamer.training.masks import local
from gossamer.training.parallel import is_first
from gossamer.training.sparse_linear import SparseLinear

SPARE = 0.1


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a run will take of the memory that is available now."""

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

    def parts(self) -> str:
        """In words: the total and what it is made of."""
        parts = {field.name.replace("_", " "): getattr(self, field.name) for field in fields(self)}
        named = ", ".join(f"{name} {_gb(num_bytes)}" for name, num_bytes in parts.items() if num_bytes)
        return f"{_gb(self.total)} of memory ({named})"

    @property
    def micro_batch(self) -> int:
        """The part that is proportional to the tokens of a micro-batch."""
        return self.activations + self.teacher


def estimate_memory(
    model: PreTrainedModel,
    num_rows: int,
    row_length: int,
    precision: str,
    *,
    device: str = "cpu",
    teacher: nn.Module | None = None,
    teacher_elsewhere: bool = False,
    recompute: bool = False,
) -> MemoryEstimate:
    """Estimate a run with micro-batches of `num_rows` rows; recompute: with activation checkpointing.

    The weights of model and teacher are in memory already, so they count only where they must still be moved
    to another `device`; those of a teacher that is on another one than the model count there
    (`estimate_elsewhere`).
    """
    anatomy, adapted = anatomy_of(model), bool(adapters(model))
    trained = sum(local(weight).numel() for weight in model.parameters() if weight.requires_grad)
    moved = [model] if teacher is None or teacher_elsewhere else [model, teacher]
    num_tokens, num_layers = num_rows * row_length, anatomy.num_layers
    layer_bytes = _layer_bytes(model, row_length, precision)
    kept = 4 * anatomy.hidden_size * num_layers + layer_bytes if recompute else num_layers * layer_bytes
    step = MemoryEstimate(
        weights=0 if device == "cpu" else sum(map(_bytes, moved)),
        gradients=4 * trained,
        moments=8 * trained,
        activations=num_tokens * kept + _copied_weights(model, precision, device),
        logits=0
        if model.get_output_embeddings() is None
        else _logits_bytes(anatomy.vocab_size, num_tokens, precision, device, teacher is not None)
        + (0 if adapted else (6 if precision == "bf16" else 4) * anatomy.hidden_size * anatomy.vocab_size)
        + (4 * anatomy.hidden_size * anatomy.vocab_size if anatomy.is_encoder else 0),
        teacher=0 if teacher is None else 8 * num_tokens * num_layers * anatomy.hidden_size,
    )
    freed = step.gradients + step.logits + step.micro_batch
    return replace(step, saving=max(0, _saved_bytes(model, device) - freed))


def estimate_elsewhere(
    teacher: PreTrainedModel, num_rows: int, row_length: int, device: str
) -> MemoryEstimate:
    """What a teacher takes of a `device` that is not the model's: weights, states, and logits of a chunk."""
    anatomy, num_tokens = anatomy_of(teacher), num_rows * row_length
    return MemoryEstimate(
        weights=0 if device == "cpu" else _bytes(teacher),
        gradients=0,
        moments=0,
        activations=0,
        logits=4 * anatomy.vocab_size * min(num_tokens, max(CHUNK_TOKENS.values())),
        teacher=4 * num_tokens * anatomy.num_layers * anatomy.hidden_size,
    )


def largest_fitting(
    row_counts: Sequence[int], estimate: Callable[[int], MemoryEstimate], available: int | None
) -> int:
    """The first of `row_counts`, which fall, whose `estimate` fits into what is available; else the last.

    One that is smaller than the first leaves `SPARE` of it free, as estimates are near and not exact, unless
    there is none smaller. available: in bytes; None if that is not known, and the first is taken.
    """
    for num_rows in row_counts[:-1]:
        share = 1 if num_rows == row_counts[0] else 1 - SPARE
        if available is None or estimate(num_rows).total <= share * available:
            return num_rows
    return row_counts[-1]


def check_memory(
    estimate: MemoryEstimate,
    available: int,
    num_tokens: int,
    advice: Sequence[str] = (),
    what: str = "training",
) -> None:
    """Raise ConfigError, with the numbers and what to do, if more memory is needed than is available.

    num_tokens: of a micro-batch; advice: what the run could do with less memory, a clause each; what: it is
    that needs it.
    """
    if estimate.total <= available:
        return
    raise ConfigError(
        f"{what} needs about {estimate.parts()} for {num_tokens:,} tokens at a time; found "
        f"{_gb(available)} available: {'; '.join([*advice, 'free memory, or train a smaller model'])}"
    )


def available_bytes(device: str) -> int | None:
    """Memory that a process can still take: of its GPU, else its share of what the machine gives it.

    Processes of one torchrun share a machine alike. None where the system does not say.
    """
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    available = available_memory_bytes()
    return None if available is None else available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def optimizer_gradient_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the gradients and optimizer states that this process holds now, scalars not counted."""
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = [*gradients, *(value for value in states if isinstance(value, Tensor) and value.ndim)]
    return sum(local(tensor).nbytes for tensor in held)


class HeldBytes(TrainerCallback):
    """Measures `optimizer_gradient_bytes` at the first step into `num_bytes`, which is None before."""

    num_bytes: int | None = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.num_bytes is None:
            self.num_bytes = optimizer_gradient_bytes(kwargs["model"], kwargs["optimizer"])


def _layer_bytes(model: PreTrainedModel, row_length: int, precision: str) -> int:
    """Bytes a token that the backward pass of one layer needs, as this module's head has it."""
    anatomy, wide = anatomy_of(model), precision == "f32"
    heads, norms = anatomy.attention, anatomy.blocks[0].norms
    if anatomy.is_encoder:
        masks = 4 * row_length if wide else 2 * row_length
        if model.config._attn_implementation == SHORT_ROWS:
            masks = (2 * heads.num_heads + 1) * row_length
        width = anatomy.blocks[0].feed_forward.width
        gated = 2 if anatomy.blocks[0].feed_forward.kind == "geglu" else 1
        return (32 if wide else 24) * anatomy.hidden_size + gated * (8 if wide else 4) * width + masks
    query, key_value = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    num_bytes = (16 if adapters(model) else 32) * anatomy.hidden_size + 8 * query
    num_bytes += (8 if wide else 4) * key_value + (16 if wide else 8) * anatomy.blocks[0].feed_forward.width
    if model.config._attn_implementation == SHORT_ROWS:
        num_bytes += 2 * heads.num_heads * row_length
    if "query" in norms:
        num_bytes += (8 if wide else 6) * (query + key_value)
    return num_bytes


def _logits_bytes(vocabulary: int, num_tokens: int, precision: str, device: str, has_teacher: bool) -> int:
    """Bytes of the head's products and of what makes losses of them, as this module's head has it."""
    passes = (0 if device == "cpu" else 24) + (24 if has_teacher else 0)
    if precision == "f32":
        return max(4, passes) * min(num_tokens, CHUNK_TOKENS[device]) * vocabulary
    product = 2 * min(num_tokens, PRODUCT_TOKENS)
    return (product + passes * min(num_tokens, CHUNK_TOKENS[device])) * vocabulary


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """What a model of transformers is made of, by its configuration: FSDP gives its class another name."""
    return read_anatomy({**model.config.to_dict(), "architectures": None, "id2label": None}, "the model")


def _copied_weights(model: nn.Module, precision: str, device: str) -> int:
    """Bytes of the bfloat16 copies that autocast makes of weights, and of weights written out for a product.

    Sparse weights are written out where their products are not native, which is on every device but the CPU;
    adapted ones everywhere, but one at a time.
    """
    size, copied = (2 if precision == "bf16" else 4), 0
    passing = [12 * module.weight.numel() for module in model.modules() if isinstance(module, LowRankLinear)]
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            continue
        if isinstance(module, nn.Linear) and precision == "bf16":
            copied += size * local(module.weight).numel()
        elif isinstance(module, SparseLinear) and device != "cpu":
            copied += size * module.out_features * module.in_features
    return copied + max(passing, default=0)


def _saved_bytes(model: nn.Module, device: str) -> int:
    """Bytes that the first process needs to write a checkpoint; 0 in the others.

    These are dense copies of sparse weights and, on the CPU, the moments that FSDP shards, gathered.
    """
    if not is_first():
        return 0
    sparse = [module for module in model.modules() if isinstance(module, SparseLinear)]
    sharded = [weight for weight in model.parameters() if isinstance(weight, DTensor)]
    copies = sum(4 * module.out_features * module.in_features for module in sparse)
    return copies + (sum(8 * weight.numel() for weight in sharded) if device == "cpu" else 0)


def _bytes(module: nn.Module) -> int:
    """Bytes of the weights, and of the positions that torch needs to write a sparse layer's weight out."""
    sparse = [module for module in module.modules() if isinstance(module, SparseLinear)]
    places = sum(8 * module.values.numel() for module in sparse)
    return places + sum(local(weight).nbytes for weight in module.parameters())


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
