"""How layers are pruned: the options of `prune` that say what becomes of the weights."""

from dataclasses import dataclass
from typing import Literal

from gossamer.data.calibration import CalibrationOptions
from gossamer.errors import ConfigError
from gossamer.job.options import option


@dataclass(frozen=True, kw_only=True)
class PruneOptions(CalibrationOptions):
    """What `prune` is told of the weights; `compress` passes it on."""

    sparsity: float = option(
        0.5, help="fraction of zeros in the decoder's linear weights, existing ones included"
    )
    method: Literal["sparsegpt", "admm", "wanda", "magnitude"] = option("admm", help="how weights are chosen")
    pattern: str = option(
        "unstructured", help="zeros anywhere; in blocks of M inputs (1x4); or N:M, N of each M stay (2:4)"
    )
    sparsity_profile: Literal["uniform", "owl", "auto"] = option(
        "uniform", help="how zeros are shared out: alike, among layers by outliers, or by measured error"
    )
    owl_m: float = option(5.0, help="owl: weights count as outliers above so many times their layer's mean")
    owl_lambda: float = option(0.08, help="owl: how far a layer's sparsity may be from the total")
    reconstruct_epochs: int | None = option(
        None,
        help="passes over the calibration rows in which each pruned layer is trained towards its parent's "
        "outputs (default: 1 after admm, 0 after the others, which so stay what they were published as)",
    )
    reconstruct_learning_rate: float = option(2.8e-3, help="highest learning rate of that training")

    @property
    def epochs(self) -> int:
        """How often reconstruction passes over the rows."""
        default = 1 if self.method == "admm" else 0
        return default if self.reconstruct_epochs is None else self.reconstruct_epochs


def check_training(epochs: int, learning_rate: float) -> None:
    """Raise ConfigError for a reconstruction that cannot be."""
    if epochs < 0:
        raise ConfigError(f"--reconstruct-epochs is {epochs}; expected 0 or more")
    if not 0 < learning_rate < float("inf"):
        raise ConfigError(f"--reconstruct-learning-rate is {learning_rate:g}; expected a number above 0")
