"""The outcome of a training run, for its caller and for `gossamer.json`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from gossamer.job.report import Result
from gossamer.training.kernel_choice import KernelChoice

WINDOW_STEPS = 10
PARTS = (
    "cross_entropy",
    "squared_error",
    "kl",
    "cosine",
    "squarehead",
)  # of a loss with a teacher, as the log calls them


@dataclass(frozen=True)
class TrainingResult(Result):
    """What a training stage returns. `losses`: one for each optimizer step, the teacher's loss included.

    First and last are means over several steps, see `History.metrics`. With a teacher, the loss is the sum of
    cross-entropy (squared error of scores) and of what is learned of the teacher (KL, cosine, SquareHead),
    which are given apart; what is no part of it is None.
    """

    output_dir: str
    sparsity: float
    num_tokens: int
    num_steps: int
    loss_first: float
    loss_last: float
    cross_entropy_first: float | None
    cross_entropy_last: float | None
    squared_error_first: float | None
    squared_error_last: float | None
    kl_first: float | None
    kl_last: float | None
    cosine_first: float | None
    cosine_last: float | None
    squarehead_first: float | None
    squarehead_last: float | None
    tokens_per_s: float
    seconds: float
    losses: tuple[float, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class History:
    """The losses and the speed of a run, from its first step on however often it was interrupted.

    `parts` are what the losses are sums of, by `PARTS`, empty without a teacher;
    `step_tokens`: the tokens of each step, which in the last can be few.
    `notes`: what the user should know about how it went; `kernel`: the training kernel;
    `pruning`: how many zeros were made on the way, and when, empty if none were to be;
    `optimizer_gradient_bytes`: None if a resumed run had no step left at which to measure it.
    """

    losses: tuple[float, ...]
    parts: Mapping[str, tuple[float, ...]]
    step_tokens: tuple[int, ...]
    seconds: float
    precision: str
    num_threads: int
    notes: tuple[str, ...]
    kernel: KernelChoice
    pruning: Mapping[str, Any]
    optimizer_gradient_bytes: int | None

    @property
    def num_tokens(self) -> int:
        return sum(self.step_tokens)

    def metrics(self) -> dict[str, Any]:
        """For `gossamer.json`. First and last are means over the tokens of a twentieth of the steps.

        These are at least `WINDOW_STEPS` steps, but no more than half of the run.
        """
        held, parts = self.optimizer_gradient_bytes, {}
        for name, values in self.parts.items():
            parts |= self._means(name, values)
        return {
            "num_steps": len(self.losses),
            "num_tokens": self.num_tokens,
            "tokens_per_s": round(self.num_tokens / self.seconds, 1),
            "seconds": round(self.seconds, 1),
            **self._means("loss", self.losses),
            **parts,
            "precision": self.precision,
            "notes": self.notes,
            **self.kernel.metrics(),
            **({"pruning": self.pruning} if self.pruning else {}),
            **({} if held is None else {"optimizer_gradient_bytes": held}),
        }

    def result(self, output_dir: str, sparsity: float) -> TrainingResult:
        """The stage's result, for its caller."""
        names = {field.name for field in fields(TrainingResult)}
        places = (f"{name}_{place}" for name in PARTS for place in ("first", "last"))
        figures: dict[str, Any] = dict.fromkeys(places) | self.metrics()
        shown: dict[str, Any] = {name: value for name, value in figures.items() if name in names}
        return TrainingResult(output_dir, sparsity, losses=self.losses, **shown)

    def _means(self, name: str, values: Sequence[float]) -> dict[str, float]:
        num_steps = len(values)
        count = min(max(WINDOW_STEPS, num_steps // 20), math.ceil(num_steps / 2))
        return {
            f"{name}_{place}": round(float(np.average(values[steps], weights=self.step_tokens[steps])), 4)
            for place, steps in (("first", slice(count)), ("last", slice(-count, None)))
        }
