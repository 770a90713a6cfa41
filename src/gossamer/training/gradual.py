"""Gradual pruning: while a model trains, its smallest weights become zero, some more every few steps.

Between the optimizer steps t_0 and t_1 the share of zeros rises from s_0 to s_1 by the cubic law of Zhu and
Gupta (arXiv 1710.01878), fast while there is much to spare and slowly in the end:

    s_t = s_1 + (s_0 - s_1) (1 - (t - t_0) / (t_1 - t_0))^3

After every step of pruning, each linear of the decoder has this share of zeros, or those that it came with
where these are more: its weights, or blocks of weights (`compress/pattern.py`), of least magnitude go, as in
Sparse*BERT (arXiv 2205.12452), which prunes language models so on general text and then tunes them under the
mask.

The mask is at any time exactly the zeros of the weights. It only grows: by steps of pruning, and by a weight
that training itself happens to bring to 0. A checkpoint's zeros are therefore the mask at its step, and a
resumed run ends in the same bits as one that was never interrupted.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gossamer.checkpoint.directory import Checkpoint
from gossamer.compress.magnitude import magnitude
from gossamer.compress.pattern import Blocks, Pattern, check_fits, parse_pattern
from gossamer.errors import ConfigError
from gossamer.training.masks import MaskCallback, MaskedWeight, decoder_linears, local, paired
from gossamer.training.parallel import shard_like
from gossamer.training.sparse_linear import Pattern as Stored

SYNTAX = "cubic:[START-]END[:BEGIN-LAST[:EVERY]]"
BLOCKS = (16, 8, 4, 2)  # sizes in which zeros are looked for
_NUMBER = r"(\d+\.?\d*|\.\d+)"
_SCHEDULE = re.compile(rf"cubic:(?:{_NUMBER}-)?{_NUMBER}(?::{_NUMBER}-{_NUMBER}(?::(\d+))?)?")


@dataclass(frozen=True)
class CubicSchedule:
    """Zeros rise from the share `start` to the share `end`.

    The first step of pruning is after `begin` of the optimizer steps (a fraction of them all), the last one
    after `last` of them, and between them there is one every `every` optimizer steps.
    """

    start: float
    end: float
    begin: float = 0.0
    last: float = 0.5
    every: int = 10

    @classmethod
    def parse(cls, text: str, sparsity: float = 0.0) -> "CubicSchedule":
        """What --prune-schedule says, for a model of this sparsity, which stands where START is left out.

        Raises ConfigError for text that is no schedule, and for one that is none to go by.
        """
        found = _SCHEDULE.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"--prune-schedule is {text}; expected {SYNTAX}, such as cubic:0.0-0.7:0.1-0.6:10, by which "
                "zeros rise from 0% to 70% between a tenth and six tenths of the steps, at every tenth step"
            )
        start, end, begin, last, every = found.groups()
        schedule = cls(sparsity if start is None else float(start), float(end))
        if begin is not None:
            schedule = cls(schedule.start, schedule.end, float(begin), float(last), int(every or cls.every))
        schedule._check(text, sparsity)
        return schedule

    def _check(self, text: str, sparsity: float) -> None:
        if self.start > self.end or self.end >= 1:
            raise ConfigError(
                f"--prune-schedule {text} goes from {self.start:.4g} to {self.end:g}; expected shares of "
                "zeros that rise and stay below 1: what is zero stays zero"
            )
        if sparsity > self.start + 5e-4:
            raise ConfigError(
                f"--prune-schedule {text} begins at {self.start:g} and would raise weights from zero: the "
                f"model is {sparsity:.4f} sparse already; leave START out, to begin with the zeros there are"
            )
        if not self.begin < self.last <= 1:
            raise ConfigError(
                f"--prune-schedule {text} prunes between {self.begin:g} and {self.last:g} of the steps; "
                "expected two fractions, from 0 to 1, the second above the first"
            )
        if self.every < 1:
            raise ConfigError(f"--prune-schedule {text} prunes every {self.every} steps; expected at least 1")

    def window(self, num_steps: int) -> tuple[int, int]:
        """After how many of `num_steps` optimizer steps the first and the last step of pruning are."""
        return round(self.begin * num_steps), round(self.last * num_steps)

    def share_after(self, step: int, num_steps: int) -> float | None:
        """The share of zeros to prune to after `step` of `num_steps` steps, None if nothing is to be done."""
        first, last = self.window(num_steps)
        if not first <= step <= last or ((step - first) % self.every and step < last):
            return None
        left = (last - step) / (last - first) if last > first else 0.0
        return self.end + (self.start - self.end) * left**3

    def record(self, num_steps: int, sparsity: float) -> dict[str, Any]:
        """For `gossamer.json`: where steps of pruning were in a run, and what they reached."""
        first, last = self.window(num_steps)
        return {"first_step": first, "last_step": last, "sparsity": round(sparsity, 6)}


def pattern_of(text: str | None, source: Checkpoint) -> Pattern | None:
    """How the zeros that a schedule makes lie: as `text` says, else in blocks as far as the model's do.

    Raises ConfigError for a pattern that fixes its share of zeros, UnsupportedError for one that does not fit
    a matrix.
    """
    if text is None:
        return next((Blocks(size) for size in BLOCKS if _all_in_blocks(source, size)), None)
    pattern = parse_pattern(text)
    if pattern is not None and pattern.sparsity is not None:
        raise ConfigError(
            f"--pattern {text} fixes the share of zeros, which --prune-schedule lets rise; expected "
            "unstructured, or 1xM such as 1x4"
        )
    if pattern is not None:
        check_fits(pattern, text, source.linears, source.architecture.tensor_shapes)
    return pattern


def _all_in_blocks(source: Checkpoint, size: int) -> bool:
    """Whether a model has zeros, and every one is in a block of so many."""
    found = False
    for name in source.linears:
        zeros_NK = source.zeros(f"{name}.weight")
        if zeros_NK.shape[1] % size:
            return False
        blocks = zeros_NK.reshape(-1, size)
        if not np.array_equal(blocks.any(1), blocks.all(1)):
            return False
        found = found or bool(zeros_NK.any())
    return found


def schedule_of(text: str | None, source: Checkpoint) -> CubicSchedule | None:
    """The schedule by which that model is to be pruned; raises what `CubicSchedule.parse` does."""
    return None if text is None else CubicSchedule.parse(text, source.sparsity())


class GradualPruning(MaskCallback):
    """Prunes a model by a schedule while it trains, and keeps all zeros that there are.

    It works where `MaskCallback` does, and takes its place: `callbacks=[GradualPruning(schedule)]`.
    Weights that are pruned have moments of zero from then on, as those that a run begins with. With a
    `pattern` they go in its blocks, those of least squares first.

    `risen` is told the share of zeros in all decoder linears after each step of pruning. Weights of
    FSDP are gathered then, one at a time. Raises what `MaskCallback` does.
    """

    def __init__(
        self,
        schedule: CubicSchedule,
        risen: Callable[[float], None] = lambda sparsity: None,
        pattern: Pattern | None = None,
    ) -> None:
        super().__init__()
        self.schedule, self.risen, self.pattern = schedule, risen, pattern

    def zeros_of(self, model: nn.Module) -> dict[str, Tensor | Stored]:
        """Those of all linears in the decoder: one that has none yet will get some."""
        linears = {name: linear for name, linear in decoder_linears(model) if isinstance(linear, nn.Linear)}
        return {f"{name}.weight": linear.weight.detach() == 0 for name, linear in linears.items()}

    def weights_of(self, model: nn.Module) -> list[MaskedWeight]:
        """All linears, in the same order in every process: they are gathered together."""
        return list(paired(model, self._zeros))

    def take_up(self, model: nn.Module) -> None:
        """The checkpoint's zeros are the mask."""
        self._zeros = self.zeros_of(model)

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if state.global_step == 0:
            self._prune(state, kwargs.get("optimizer"))

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune, where the schedule says so, before the step is logged and saved; its gradients are gone."""
        self._prune(state, kwargs.get("optimizer"))

    def _prune(self, state: Any, optimizer: Any) -> None:
        share, num_zeros, num_weights = self.schedule.share_after(state.global_step, state.max_steps), 0, 0
        for masked in self._masked:
            if share is not None:
                whole_NK = _whole(masked.weight)
                zeros_NK = magnitude(whole_NK, share, pattern=self.pattern) == 0
                local(masked.weight).masked_fill_(local(shard_like(zeros_NK, masked.weight)), 0)
                num_zeros, num_weights = num_zeros + int(zeros_NK.sum()), num_weights + zeros_NK.numel()
            self._adopt(masked, optimizer)
        if share is not None:
            self.risen(num_zeros / num_weights)

    def _adopt(self, masked: MaskedWeight, optimizer: Any) -> None:
        """Make the zeros that the weight has now its mask, and clear the moments of the new ones."""
        zeros = masked.weight.detach() == 0
        if not torch.equal(local(zeros), masked.zeros):
            self._zeros[masked.name], masked.zeros = zeros, local(zeros)
            for _, moment in masked.moments(optimizer):
                moment.masked_fill_(masked.zeros, 0)


def _whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight.detach()
