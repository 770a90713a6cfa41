"""The outcome of a training run, for its caller and for `gossamer.json`."""

from dataclasses import dataclass, fields
from typing import Any

from gossamer.job.report import Result
from gossamer.training.kernel_choice import KernelChoice


@dataclass(frozen=True)
class TrainingResult(Result):
    """What a training stage returns. `losses`: one for each optimizer step, the teacher's loss included."""

    output_dir: str
    sparsity: float
    num_tokens: int
    num_steps: int
    loss_first: float
    loss_last: float
    tokens_per_s: float
    seconds: float
    losses: tuple[float, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class History:
    """The losses and the speed of a run, from its first step on however often it was interrupted.

    `notes`: what the user should know about how it went; `kernel`: the training kernel;
    `optimizer_gradient_bytes`: None if a resumed run had no step left at which to measure it.
    """

    losses: tuple[float, ...]
    num_tokens: int
    seconds: float
    precision: str
    num_threads: int
    notes: tuple[str, ...]
    kernel: KernelChoice
    optimizer_gradient_bytes: int | None

    def metrics(self) -> dict[str, Any]:
        """For `gossamer.json`. First and last loss are means over a twentieth of the steps (at least one)."""
        count = max(1, len(self.losses) // 20)
        held = self.optimizer_gradient_bytes
        return {
            "num_steps": len(self.losses),
            "num_tokens": self.num_tokens,
            "tokens_per_s": round(self.num_tokens / self.seconds, 1),
            "seconds": round(self.seconds, 1),
            "loss_first": round(sum(self.losses[:count]) / count, 4),
            "loss_last": round(sum(self.losses[-count:]) / count, 4),
            "precision": self.precision,
            "notes": self.notes,
            **self.kernel.metrics(),
            **({} if held is None else {"optimizer_gradient_bytes": held}),
        }

    def result(self, output_dir: str, sparsity: float) -> TrainingResult:
        """The stage's result, for its caller."""
        names = {field.name for field in fields(TrainingResult)}
        figures = {name: value for name, value in self.metrics().items() if name in names}
        return TrainingResult(output_dir, sparsity, losses=self.losses, **figures)
