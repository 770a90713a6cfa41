"""Training under fixed masks: the zeros of the decoder's linear weights stay exactly zero.

The gradient of a pruned weight is set to zero as soon as it has been accumulated, that is before clipping, so
that the norm that is clipped counts only the weights that can change (arXiv 2405.03594). AdamW's moments of
that weight are then zero too, and its update 0 / (0 + eps), with a weight decay of 0, leaves the weight
alone. After every optimizer step gradients, moments and weights are checked: a pruned one that is not zero
fails the run, and so does a gradient that was never masked.

What accumulates a gradient: in one process and under DDP it is autograd, once a micro-batch (DDP then
averages gradients that are already masked). Under FSDP2 it is the reduce-scatter after the last micro-batch,
which calls the hooks of the sharded parameter; that is a DTensor, so each process masks its own shard. Hooks
that were attached before the parameter was sharded never run. This callback therefore attaches its hooks in
`on_train_begin`, which the Trainer calls after `accelerator.prepare` has wrapped the model.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from gossamer import _native
from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import GossamerError, UnsupportedError
from gossamer.training.compiled import fused
from gossamer.training.flat import fits, flat
from gossamer.training.sparse_linear import Pattern, SparseLinear

_IN_LAYER = re.compile(r"(^|\.)layers?\.\d+\.")  # an encoder calls it `layer`
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


@dataclass
class MaskedWeight:
    """A weight, the part of its mask that this process holds, and how often its gradient was masked.

    `zeros`: bool, true where the weight is pruned; `num_maskings`: since the last optimizer step.
    """

    name: str
    weight: Tensor
    zeros: Tensor
    num_maskings: int = 0

    def mask_gradient(self, weight: Tensor) -> None:
        """Zero the gradients of pruned weights: the hook that runs whenever `weight.grad` was added to."""
        assert weight.grad is not None
        gradient = local(weight.grad)
        if fits(gradient):
            _native.zero_marked(flat(gradient), flat(self.zeros.contiguous()), torch.get_num_threads())
        else:
            gradient.masked_fill_(self.zeros, 0)
        self.num_maskings += 1

    def moments(self, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's running averages of this weight, by name."""
        state = {} if optimizer is None else optimizer.state.get(self.weight, {})
        for name in _MOMENTS:
            if name in state:
                yield name, local(state[name])

    def counts(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """How many of each tensor's values are nonzero where the weight is pruned: scalars on its device."""
        if all(map(fits, tensors)):
            marked, num_threads = flat(self.zeros.contiguous()), torch.get_num_threads()
            return [torch.tensor(_native.count_marked(flat(t), marked, num_threads)) for t in tensors]
        return fused(_count_marked, self.zeros.device.type)(self.zeros, list(tensors)).unbind()


def _count_marked(zeros: Tensor, tensors: list[Tensor]) -> Tensor:
    return torch.stack([((tensor != 0) & zeros).sum() for tensor in tensors])


class MaskCallback(TrainerCallback):
    """Keeps the zeros that the decoder's linear weights have when training begins.

    Works in any transformers `Trainer`, including TRL's `SFTTrainer`, in one process, under DDP and under
    FSDP2: `SFTTrainer(..., callbacks=[MaskCallback()])`.

    Without `model`, the masks are the zeros that the weights have when training begins. With `model` (which
    must already be sharded if it is to be), they are the zeros that it has now. A run that resumes needs
    this: a weight that happened to become 0 in training is in the checkpoint, but it is not pruned.

    Raises UnsupportedError under DeepSpeed and FSDP1, GossamerError when a pruned weight becomes nonzero.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._is_given = model is not None
        self._zeros = {} if model is None else self.zeros_of(model)
        self._masked: list[MaskedWeight] = []
        self._hooks: list[RemovableHandle] = []

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach a hook to every gradient, and clear the moments of pruned weights of a resumed optimizer."""
        model: nn.Module = kwargs["model"]
        _refuse_unsupported(args, model)
        self._remove_hooks()
        if not self._is_given:
            self._zeros = self.zeros_of(model)
        self._masked = self.weights_of(model)
        self._check(
            state.global_step, "weights", {m.name: m.counts([local(m.weight)])[0] for m in self._masked}
        )
        for masked in self._masked:
            if masked.weight.requires_grad:
                self._hooks.append(masked.weight.register_post_accumulate_grad_hook(masked.mask_gradient))
            for _, moment in masked.moments(kwargs.get("optimizer")):
                moment.masked_fill_(masked.zeros, 0)

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise if a gradient was not masked, or if a pruned weight, gradient or moment is not zero."""
        step, optimizer = state.global_step + 1, kwargs.get("optimizer")
        self._check_hooks(step)
        found: dict[str, dict[str, Tensor]] = {"gradients": {}, "moments": {}, "weights": {}}
        for masked in self._masked:
            held = {("weights", masked.name): local(masked.weight)}
            if masked.weight.grad is not None:
                held["gradients", masked.name] = local(masked.weight.grad)
            for name, moment in masked.moments(optimizer):
                held["moments", f"{masked.name} ({name})"] = moment
            for (what, name), count in zip(held, masked.counts([*held.values()]), strict=True):
                found[what][name] = count
        for what, counts in found.items():
            self._check(step, what, counts)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._remove_hooks()

    def zeros_of(self, model: nn.Module) -> dict[str, Tensor | Pattern]:
        """What the masks are made of, as `decoder_zeros` has it."""
        return decoder_zeros(model)

    def weights_of(self, model: nn.Module) -> list[MaskedWeight]:
        """The weights to be looked after: those of which this process holds zeros."""
        return [masked for masked in paired(model, self._zeros) if masked.zeros.any()]

    def take_up(self, model: nn.Module) -> None:
        """The model's weights have come from a checkpoint; masks that are fixed stay as they were given."""

    @torch.no_grad()
    def broken(self, model: nn.Module) -> dict[str, int]:
        """name -> how many of the weights that the enforced masks prune are not zero, where there are any."""
        counts = {m.name: int(m.counts([local(m.weight)])[0]) for m in paired(model, self._zeros)}
        return {name: count for name, count in counts.items() if count}

    def enforced_mask_hash(self) -> str:
        """sha256 of the masks that this callback enforces.

        It equals `model_mask_hash` of the model as training begins, and unlike that it stays the same when a
        weight becomes 0 in training.
        """
        return _hash(self._zeros)

    def _check_hooks(self, step: int) -> None:
        """Raise unless the gradient of every trained weight was masked since the last optimizer step."""
        trained = [masked for masked in self._masked if masked.weight.requires_grad]
        missed = [masked.name for masked in trained if masked.num_maskings == 0]
        if missed:
            raise GossamerError(
                f"step {step}: the gradient of {missed[0]} was never masked (so for {len(missed)} of "
                f"{len(trained)} sparse weights); expected once a backward pass: the parameter was replaced "
                "or took no part: shard the model before training begins, freeze what is not trained"
            )
        for masked in trained:
            masked.num_maskings = 0

    def _check(self, step: int, what: str, counts: Mapping[str, Tensor]) -> None:
        """Raise if a count is not 0. All counts are moved from the device in one transfer."""
        if not counts:
            return
        for name, count in zip(counts, torch.stack(list(counts.values())).tolist(), strict=True):
            if count:
                raise GossamerError(
                    f"step {step}: {count} pruned {what} of {name} became nonzero; expected 0: the "
                    "optimizer, another callback or a loaded checkpoint writes to them; use AdamW, or leave "
                    "that callback or checkpoint out"
                )

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def decoder_zeros(model: nn.Module) -> dict[str, Tensor | Pattern]:
    """name -> where the weight is zero, for the linear layers of the decoder that have zeros.

    The value is bool [N, K], true where the weight is zero; of a SparseLinear it is the layer's Pattern. Of a
    sharded weight it is a DTensor, and there is one even if this shard has no zeros: another's may.
    """
    zeros: dict[str, Tensor | Pattern] = {}
    for name, linear in decoder_linears(model):
        found = linear.pattern if isinstance(linear, SparseLinear) else linear.weight.detach() == 0
        if not isinstance(found, Tensor) or isinstance(found, DTensor) or found.any():
            zeros[f"{name}.weight"] = found
    return zeros


def model_mask_hash(source: nn.Module | Checkpoint) -> str:
    """sha256 of the zeros in all linear weights of the decoder: one hash for a whole model.

    It is the same for a directory, for the model loaded from it (by `load_model`, where files hold several
    linears as one), and for that model when it is sharded. If it is sharded, every process must call this
    function: the masks are gathered, one at a time.
    """
    if isinstance(source, Checkpoint):
        names = [f"{linear}.weight" for linear in source.linears]
        return _hash({name: torch.from_numpy(source.zeros(name)) for name in names})
    return _hash(decoder_zeros(source))


def local(tensor: Tensor) -> Tensor:
    """The part of the tensor that this process holds: the shard of a DTensor, any other tensor whole."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def _hash(zeros: Mapping[str, Tensor | Pattern]) -> str:
    """sha256 over name, shape and packed bits of every mask that is not empty, in the order of the names.

    The "mask_hash" that `gossamer.json` records is another one: of the bits of a single matrix.
    """
    digest = hashlib.sha256()
    for name in sorted(zeros):
        found = zeros[name]
        mask = ~found.mask_NK() if isinstance(found, Pattern) else found
        whole_NK = mask.full_tensor() if isinstance(mask, DTensor) else mask
        if whole_NK.any():
            digest.update(f"{name} {list(whole_NK.shape)}\n".encode())
            digest.update(np.packbits(whole_NK.cpu().numpy()).tobytes())
    return digest.hexdigest()


def paired(model: nn.Module, zeros: Mapping[str, Tensor | Pattern]) -> Iterator[MaskedWeight]:
    """Each of the model's weights with its mask; raises GossamerError where the shapes differ.

    A SparseLinear holds only its nonzero weights, so there is nothing to mask in it.
    """
    linears = dict(decoder_linears(model))
    weights = {
        f"{name}.weight": linear.weight for name, linear in linears.items() if isinstance(linear, nn.Linear)
    }
    for name, mask in zeros.items():
        if isinstance(mask, Pattern):
            continue
        if name not in weights or local(weights[name]).shape != local(mask).shape:
            found = list(local(weights[name]).shape) if name in weights else "no such weight"
            raise GossamerError(
                f"the mask of {name} has shape {list(local(mask).shape)}, the model in training has {found}; "
                "expected the same: make MaskCallback(model) of the model that is trained, once sharded"
            )
        yield MaskedWeight(name, weights[name], local(mask).to(local(weights[name]).device))


def decoder_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear | SparseLinear]]:
    """Name and module of every linear in the decoder's layers, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, SparseLinear)) and _IN_LAYER.search(name):
            yield name, module


def _refuse_unsupported(args: Any, model: nn.Module) -> None:
    """Refuse DeepSpeed and FSDP1: they keep weights and gradients in flat buffers that no mask fits."""
    if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
        raise UnsupportedError(
            "found DeepSpeed; masks hold under DDP and FSDP2: leave out deepspeed= and "
            "ACCELERATE_USE_DEEPSPEED, and shard with fsdp_config={'version': 2} where a model does not fit"
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UnsupportedError("found FSDP1; masks hold under FSDP2: set fsdp_config={'version': 2}")
