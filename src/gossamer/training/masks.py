"""Training under fixed masks: the zeros of the decoder's linear weights stay zero, exactly.

Three things keep them there. Gradients of pruned weights are zeroed as soon as they are accumulated, hence
before any clipping, so that the clipped norm counts only weights that can move (arXiv 2405.03594). AdamW's
moments of pruned weights are then zero too, and an update 0 / (0 + eps) plus weight decay of 0 moves nothing.
After every optimizer step all three are looked at: one that is not zero all the same, or a gradient that
never passed through its mask, fails the run.

Who accumulates them: in one process and under DDP autograd, once a micro-batch (DDP then averages what is
masked already); under FSDP2 the reduce-scatter after the last micro-batch, which calls the hooks of the
sharded parameter (a DTensor, so masks are of local shards). Hooks that a parameter had before it was sharded
never run: they are attached when training begins, which the Trainer says after `accelerator.prepare`.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import GossamerError, UnsupportedError
from gossamer.training.sparse_linear import Pattern, SparseLinear

_IN_DECODER_LAYER = re.compile(r"(^|\.)layers\.\d+\.")
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


@dataclass
class MaskedWeight:
    """One weight, what this process holds of its zeros (bool), and how often its gradient was masked."""

    name: str
    weight: Tensor
    zeros: Tensor
    num_maskings: int = 0

    def mask_gradient(self, weight: Tensor) -> None:
        """The hook that runs once a gradient has been added to `weight.grad`."""
        assert weight.grad is not None
        local(weight.grad).masked_fill_(self.zeros, 0)
        self.num_maskings += 1

    def moments(self, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's running averages of this weight, by name."""
        state = {} if optimizer is None else optimizer.state.get(self.weight, {})
        for name in _MOMENTS:
            if name in state:
                yield name, local(state[name])

    def count(self, values: Tensor) -> Tensor:
        """How many of `values` are nonzero where the mask says zero; stays on its device."""
        return torch.count_nonzero((values != 0) & self.zeros)


class MaskCallback(TrainerCallback):
    """Keeps the zeros that the decoder's linears have when training begins.

    Works in any transformers `Trainer`, TRL's `SFTTrainer` included, alone, under DDP and under FSDP2:
    `SFTTrainer(..., callbacks=[MaskCallback()])`. Given a `model` (sharded already, if it will be), the zeros
    are those it has now: a weight that became exactly 0 in training is then free again after a resume.

    Raises UnsupportedError under DeepSpeed and FSDP1, GossamerError when a zero does not hold.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._is_given = model is not None
        self._zeros = {} if model is None else decoder_zeros(model)
        self._masked: list[MaskedWeight] = []
        self._hooks: list[RemovableHandle] = []

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hook the gradients, and clear moments that a resumed optimizer may bring along."""
        model: nn.Module = kwargs["model"]
        _refuse_unsupported(args, model)
        self._remove_hooks()
        if not self._is_given:
            self._zeros = decoder_zeros(model)
        self._masked = list(_paired(model, self._zeros))
        self._check(state.global_step, "weights", {m.name: m.count(local(m.weight)) for m in self._masked})
        for masked in self._masked:
            if masked.weight.requires_grad:
                self._hooks.append(masked.weight.register_post_accumulate_grad_hook(masked.mask_gradient))
            for _, moment in masked.moments(kwargs.get("optimizer")):
                moment.masked_fill_(masked.zeros, 0)

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise if a gradient was not masked, or if anything that is pruned is not zero."""
        step, optimizer = state.global_step + 1, kwargs.get("optimizer")
        self._check_hooks(step)
        gradients, moments, weights = {}, {}, {}
        for masked in self._masked:
            if masked.weight.grad is not None:
                gradients[masked.name] = masked.count(local(masked.weight.grad))
            for name, moment in masked.moments(optimizer):
                moments[f"{masked.name} ({name})"] = masked.count(moment)
            weights[masked.name] = masked.count(local(masked.weight))
        self._check(step, "gradients", gradients)
        self._check(step, "moments", moments)
        self._check(step, "weights", weights)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._remove_hooks()

    @torch.no_grad()
    def broken(self, model: nn.Module) -> dict[str, int]:
        """name -> how many of its weights are not zero though the mask in force prunes them, if any."""
        counts = {m.name: int(m.count(local(m.weight))) for m in _paired(model, self._zeros)}
        return {name: count for name, count in counts.items() if count}

    def mask_hash(self) -> str:
        """`mask_hash` of the masks in force: unlike that of the model, the same from first to last step."""
        return _hash(self._zeros)

    def _check_hooks(self, step: int) -> None:
        """Every weight that is trained must have had its gradient masked since the last step."""
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
        """Raise if a count is not 0; one transfer from the device for all of them."""
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
    """name -> where the weight is zero (bool [N, K]), for the decoder linears that have zeros.

    A SparseLinear gives its pattern. Sharded weights give sharded answers, and are all there, since another
    process may hold their zeros.
    """
    zeros: dict[str, Tensor | Pattern] = {}
    for name, linear in _decoder_linears(model):
        found = linear.pattern if isinstance(linear, SparseLinear) else linear.weight.detach() == 0
        if not isinstance(found, Tensor) or isinstance(found, DTensor) or found.any():
            zeros[f"{name}.weight"] = found
    return zeros


def mask_hash(source: nn.Module | Checkpoint) -> str:
    """sha256 of the zeros of all sparse decoder linears: the same for a directory, a model and its shards.

    Of a sharded model every process must call it (the masks are gathered, one at a time).
    """
    if isinstance(source, Checkpoint):
        names = [f"{linear}.weight" for linear in source.linears]
        return _hash({name: torch.from_numpy(source.zeros(name)) for name in names})
    return _hash(decoder_zeros(source))


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it: the shard of a DTensor, all of any other."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def _hash(zeros: Mapping[str, Tensor | Pattern]) -> str:
    """sha256 over name, shape and packed bits of every mask that is not empty, in the order of the names.

    One for a whole run; `checkpoint.hash_mask`, which `gossamer.json` keeps, is of one matrix's bits alone.
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


def _paired(model: nn.Module, zeros: Mapping[str, Tensor | Pattern]) -> Iterator[MaskedWeight]:
    """The model's weights beside their zeros; raises GossamerError where the two do not fit.

    A SparseLinear has no weights but those that live: there is nothing to mask.
    """
    linears = dict(_decoder_linears(model))
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
        if local(mask).any():
            yield MaskedWeight(name, weights[name], local(mask).to(local(weights[name]).device))


def _decoder_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear | SparseLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, SparseLinear)) and _IN_DECODER_LAYER.search(name):
            yield name, module


def _refuse_unsupported(args: Any, model: nn.Module) -> None:
    """DeepSpeed and FSDP1 keep gradients and weights in flat buffers of their own, where no mask reaches."""
    if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
        raise UnsupportedError(
            "found DeepSpeed; masks hold under DDP and FSDP2: leave out deepspeed= and "
            "ACCELERATE_USE_DEEPSPEED, and shard with fsdp_config={'version': 2} where a model does not fit"
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UnsupportedError("found FSDP1; masks hold under FSDP2: set fsdp_config={'version': 2}")
