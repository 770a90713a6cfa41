"""A learning rate that falls several times: what gradual pruning recovers from, as oBERT's recipes do."""

import math
from collections.abc import Callable
from typing import Literal

Shape = Literal["linear", "cosine"]


def falling(shape: Shape, warmup_steps: int, num_steps: int, num_cycles: int) -> Callable[[int], float]:
    """step -> share of the highest rate: rises once over `warmup_steps`, then falls to 0 `num_cycles` times.

    With one cycle these are transformers' linear and cosine.
    """

    def share(step: int) -> float:
        if step < warmup_steps:
            return step / max(1, warmup_steps)
        done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
        left = 0.0 if done >= 1 else 1 - done * num_cycles % 1
        return left if shape == "linear" else 0.5 * (1 - math.cos(math.pi * left))

    return share
