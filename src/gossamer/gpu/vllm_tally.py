"""What became of a model's linears under vLLM: told once, and whether anything is gained by it."""

# pyright: reportMissingImports=false

from dataclasses import dataclass

from torch import Tensor
from vllm.logger import init_logger

from gossamer.gpu.hosts import slow_on_cpu
from gossamer.gpu.linear import SparseLinear, nothing_gained
from gossamer.gpu.vllm import LOGGER, NAME


@dataclass
class Tally:
    """Of one model in one process."""

    num_linears: int = 0
    num_packed: int = 0
    num_dense: int = 0
    bytes_before: int = 0
    bytes_after: int = 0

    def add(self, w_NK: Tensor, sparse: SparseLinear) -> None:
        """Another linear is packed; after the last one it is said what came of all."""
        self.num_packed += 1
        self.num_dense += sparse.is_dense
        self.bytes_before += w_NK.nbytes
        self.bytes_after += sparse.num_bytes
        if self.num_packed == self.num_linears:
            self._tell(on_cpu=w_NK.device.type == "cpu")

    def _tell(self, on_cpu: bool) -> None:
        logger = init_logger(LOGGER)
        sizes = (self.bytes_before / 1e6, self.bytes_after / 1e6)
        logger.info("Packed %d linears of %.1f MB into %.1f MB", self.num_linears, *sizes)
        if self.num_dense:
            logger.warning("%s", nothing_gained(self.num_dense, self.num_linears))
        if on_cpu:
            logger.warning("%s", slow_on_cpu(f"--quantization {NAME}"))
