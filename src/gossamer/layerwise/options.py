"""How layers are pruned: the options of `prune` that say what becomes of the weights."""

from dataclasses import dataclass
from typing import Literal

from gossamer.data.calibration import CalibrationOptions
from gossamer.job.options import option


@dataclass(frozen=True, kw_only=True)
class PruneOptions(CalibrationOptions):
    """What `prune` is told of the weights; `compress` passes it on."""

    sparsity: float = option(
        0.5, help="fraction of zeros in the decoder's linear weights, existing ones included"
    )
    method: Literal["sparsegpt", "admm", "wanda", "magnitude"] = option("admm", help="how weights are chosen")
    pattern: str = option(
        "unstructured", help="where zeros may be: anywhere, or N:M, so that N of each M weights stay (2:4)"
    )
    reconstruct_epochs: int | None = option(
        None,
        help="passes over the calibration rows in which each pruned layer is trained towards its parent's "
        "outputs (default: 1 after admm, 0 after the others, which so stay what they were published as)",
    )
    reconstruct_learning_rate: float = option(2.8e-3, help="highest learning rate of that training")
    seed: int = option(0, help="order of the data")

    @property
    def epochs(self) -> int:
        """How often reconstruction passes over the rows."""
        if self.reconstruct_epochs is None:
            return 1 if self.method == "admm" else 0
        return self.reconstruct_epochs
