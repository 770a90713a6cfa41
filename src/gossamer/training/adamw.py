"""AdamW (arXiv 1711.05101) in native code: one pass over weight, gradient and moments."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gossamer import _native
from gossamer.training.flat import fits, flat


class AdamW(torch.optim.AdamW):
    """torch's AdamW, with a native update if all weights are float32 on the CPU.

    It has the formula (within 1e-6 of torch after 300 steps), the options and the `state_dict` of torch's, so
    that either can load the other's state. If a weight has another device or type, or an option is one that
    the native update does not know (amsgrad, maximize, differentiable, a rate in a tensor), torch updates all
    of them.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every weight that has a gradient; returns the closure's loss."""
        if not all(_is_native(group) for group in self.param_groups):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        state["step"] += 1
        assert weight.grad is not None
        _native.adamw(
            flat(weight),
            flat(weight.grad.contiguous()),
            flat(state["exp_avg"]),
            flat(state["exp_avg_sq"]),
            learning_rate=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=state["step"].item(),
            num_threads=torch.get_num_threads(),
        )


def _is_native(group: dict[str, Any]) -> bool:
    known = not (group["amsgrad"] or group["maximize"] or group["differentiable"])
    plain = not any(isinstance(value, Tensor) for value in (group["lr"], *group["betas"]))
    return known and plain and all(fits(weight) for weight in group["params"])
