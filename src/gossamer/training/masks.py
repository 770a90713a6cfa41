"""Training under fixed masks: the zeros of the decoder's linear weights stay zero, exactly.

Three things keep them there. Gradients of pruned weights are zeroed as soon as they are accumulated, hence
before any clipping, so that the clipped norm counts only weights that can move (arXiv 2405.03594). AdamW's
moments of pruned weights are then zero too, and an update 0 / (0 + eps) plus weight decay of 0 moves nothing.
After every optimizer step the weights are looked at: one that moved all the same fails the run.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from gossamer.errors import GossamerError

_IN_DECODER_LAYER = re.compile(r"(^|\.)layers\.\d+\.")


def masked_weights(model: nn.Module) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """name -> (weight [N, K], its zeros [N, K] as bool), for the decoder linears that have any."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and _IN_DECODER_LAYER.search(name):
            zeros_NK = module.weight.detach() == 0
            if zeros_NK.any():
                found[f"{name}.weight"] = (module.weight, zeros_NK)
    return found


class MaskCallback(TrainerCallback):
    """Keeps the zeros that the decoder's linears have when training begins.

    Works in any transformers `Trainer`, TRL's `SFTTrainer` included:
    `SFTTrainer(..., callbacks=[MaskCallback()])`.
    """

    def __init__(self) -> None:
        self._masked: dict[str, tuple[nn.Parameter, Tensor]] = {}
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the masks, hook the gradients, and clear moments that a resumed optimizer may bring along."""
        self._remove_hooks()
        self._masked = masked_weights(kwargs["model"])
        for weight, zeros_NK in self._masked.values():
            self._hooks.append(weight.register_post_accumulate_grad_hook(_zero_gradient(zeros_NK)))
        optimizer = kwargs.get("optimizer")
        if optimizer is not None:
            self._zero_moments(optimizer)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise if a pruned weight moved."""
        for name, (weight, zeros_NK) in self._masked.items():
            count = int(torch.count_nonzero((weight.detach() != 0) & zeros_NK))
            if count:
                raise GossamerError(
                    f"step {state.global_step + 1}: {count} pruned weights of {name} became nonzero; the "
                    "optimizer or another callback writes to them: use AdamW, or leave that callback out"
                )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._remove_hooks()

    def _zero_moments(self, optimizer: Any) -> None:
        """Zero the optimizer's running averages at pruned positions."""
        for weight, zeros_NK in self._masked.values():
            for value in optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.masked_fill_(zeros_NK, 0)

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _zero_gradient(zeros_NK: Tensor) -> Any:
    """The hook that runs once a gradient has been added to `weight.grad`."""

    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        with torch.no_grad():
            weight.grad.masked_fill_(zeros_NK, 0)

    return hook
