"""Before the first step: the kernel is chosen, and the run is known to fit into memory."""

from dataclasses import dataclass
from typing import Literal

from transformers import LlamaForCausalLM

from gossamer.training.kernel import Kernel, KernelChoice, choose_kernel, masked_linears
from gossamer.training.memory import available_bytes, check_memory, estimate_memory
from gossamer.training.options import TrainingOptions
from gossamer.training.parallel import from_first
from gossamer.training.sparse_linear import sparsify


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass works on, and how."""

    num_rows: int
    row_length: int
    device: str
    precision: Literal["f32", "bf16"]

    @property
    def num_tokens(self) -> int:
        return self.num_rows * self.row_length


def decide_kernel(
    job: TrainingOptions, model: LlamaForCausalLM, batch: MicroBatch, began_with: Kernel | None
) -> KernelChoice:
    """One for all processes; raises as `choose_kernel` does. `began_with`: what an interrupted run took."""
    if began_with is not None:
        return KernelChoice(began_with, "as the run began")
    sharded = job.parallel == "fsdp"
    return from_first(
        lambda: choose_kernel(
            job.kernel, model, batch.device, batch.precision, batch.num_tokens, sharded=sharded
        )
    )


def prepare(
    job: TrainingOptions,
    model: LlamaForCausalLM,
    teacher: LlamaForCausalLM | None,
    batch: MicroBatch,
    kernel: Kernel,
) -> None:
    """Put the layers of the kernel into `model` (`sparse_linear.densify` takes them out).

    Raises ConfigError for too little memory.
    """
    could_be_sparse = kernel == "dense" and job.parallel != "fsdp" and bool(masked_linears(model))
    if kernel == "sparse":
        sparsify(model, masked_linears(model))
    estimate = estimate_memory(
        model, batch.num_rows, batch.row_length, batch.precision, device=batch.device, teacher=teacher
    )
    if (available := available_bytes(batch.device)) is not None:
        check_memory(estimate, available, batch.num_tokens, could_be_sparse=could_be_sparse)
