"""Block-wise reconstruction: train what pruning left of a block towards the outputs of the unchanged block.

One block at a time: x_t is the block's input at token t in the pruned model, y_t what the parent's block
gives on the parent's own input. All parameters are trained by AdamW, in float32, a row of tokens a step, to
lower

    loss = mean over tokens t of |block(x_t) - y_t|^2 / |y_t|^2        (see `token_error`)

Zeros stay zeros: their gradients are masked, and there is no weight decay. The learning rate rises over the
first twentieth of the steps and falls to zero along half a cosine. Rows held out from the training say which
epoch is kept, the state before the first one among them.

Training block by block on calibration text is BRECQ's (Li et al., arXiv 2102.05426). On SmolLM2-135M, aiming
at the parent's block on its own input, one row a step and a rate of 2.8e-3 were best or no worse than others.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.compress.target import token_error

WARMUP = 0.05

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rows:
    """Rows [rows, T, D] that go into a block, and those that should come out."""

    inputs_BTD: Tensor
    wanted_BTD: Tensor


@dataclass(frozen=True)
class Schedule:
    """Passes over the rows, the highest learning rate, and the seed of the rows' order."""

    epochs: int
    learning_rate: float
    seed: int


def reconstruct(
    block: Function,
    parameters: Mapping[str, nn.Parameter],
    kept: Mapping[str, Tensor],
    rows: Rows,
    held_out: Rows,
    schedule: Schedule,
    after_step: Callable[[float], None] = lambda learning_rate: None,
    error_of: Callable[[Tensor, Tensor], Tensor] = token_error,
) -> list[float]:
    """Train the block's `parameters` in place; returns the held-out error before, and after each epoch.

    `kept` has masks for those whose zeros are to stay, True where a weight may change. In the end the
    parameters are those of the least held-out error. Training ends early where that error is infinite or NaN,
    which is not among those returned. `after_step` is called with the learning rate that a step was made at.
    `error_of` says how far outputs are from those that should come out.
    """
    errors, best = [_error(block, held_out, error_of)], _copy(parameters)
    num_rows, order = len(rows.inputs_BTD), torch.Generator().manual_seed(schedule.seed)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(schedule.epochs * num_rows))
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for _ in range(schedule.epochs):
        for chosen in torch.randperm(num_rows, generator=order).split(1):
            row = Rows(rows.inputs_BTD[chosen], rows.wanted_BTD[chosen])
            _step(block, parameters, kept, row, optimizer, error_of)
            after_step(float(rates.get_last_lr()[0]))
            rates.step()
        if not math.isfinite(error := _error(block, held_out, error_of)):
            break
        errors.append(error)
        if error <= min(errors):
            best = _copy(parameters)
    for name, parameter in parameters.items():
        parameter.requires_grad_(False).copy_(best[name])
    return errors


def _step(
    block: Function,
    parameters: Mapping[str, nn.Parameter],
    kept: Mapping[str, Tensor],
    rows: Rows,
    optimizer: torch.optim.Optimizer,
    error_of: Callable[[Tensor, Tensor], Tensor],
) -> None:
    with torch.enable_grad():
        error_of(block(rows.inputs_BTD), rows.wanted_BTD).backward()
    for name, mask in kept.items():
        gradient = parameters[name].grad
        assert gradient is not None
        gradient.mul_(mask)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def _error(block: Function, rows: Rows, error_of: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The loss over all rows, one at a time."""
    pairs = zip(rows.inputs_BTD.split(1), rows.wanted_BTD.split(1), strict=True)
    return torch.stack([error_of(block(x_BTD), y_BTD) for x_BTD, y_BTD in pairs]).mean().item()


def _copy(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _rate(steps: int) -> Callable[[int], float]:
    """The share of the highest rate at each step: a short rise, then half a cosine down to zero."""
    rise = max(1, round(WARMUP * steps))

    def rate(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    return rate
