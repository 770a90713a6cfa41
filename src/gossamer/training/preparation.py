"""What is done before the first step: choose the training kernel and check that the run fits into memory."""

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from gossamer.checkpoint.directory import Checkpoint
from gossamer.training.gradual import schedule_of
from gossamer.training.kernel_choice import KernelChoice, TrainingKernel, choose_kernel, masked_linears
from gossamer.training.lora import adapt, check_rank
from gossamer.training.memory import MemoryEstimate, available_bytes, check_memory, estimate_memory
from gossamer.training.options import TrainingOptions
from gossamer.training.parallel import from_first
from gossamer.training.sparse_linear import sparsify


def check_model(job: TrainingOptions, source: Checkpoint) -> None:
    """Raise ConfigError for what the job asks for and this model cannot have."""
    schedule_of(job.prune_schedule, source)
    check_rank(job.lora, source)


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward and backward pass, and the device and precision of its products."""

    num_rows: int
    row_length: int
    device: str
    precision: Literal["f32", "bf16"]

    @property
    def num_tokens(self) -> int:
        return self.num_rows * self.row_length


def decide_kernel(
    job: TrainingOptions, model: PreTrainedModel, batch: MicroBatch, began_with: TrainingKernel | None
) -> KernelChoice:
    """Choose one training kernel for all processes; raises as `choose_kernel` does.

    began_with: the training kernel of the interrupted run that is resumed, which is kept, or None.
    """
    if began_with is not None:
        return KernelChoice(began_with, "as the run began")
    if job.lora is not None:
        return KernelChoice("dense", f"--lora {job.lora} trains adapters of whole matrices")
    if job.prune_schedule is not None:
        return KernelChoice("dense", f"--prune-schedule {job.prune_schedule} makes more weights zero")
    sharded = job.parallel == "fsdp"
    return from_first(
        lambda: choose_kernel(
            job.kernel, model, batch.device, batch.precision, batch.num_tokens, sharded=sharded
        )
    )


def prepare(
    job: TrainingOptions,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batch: MicroBatch,
    kernel: TrainingKernel,
) -> MemoryEstimate:
    """Replace layers of `model` as the training kernel or --lora needs it.

    `sparse_linear.densify` and `lora.merge` undo it.

    Returns what the run will take beyond what it holds already.

    Raises ConfigError if there is too little memory.
    """
    must_be_dense = job.parallel == "fsdp" or job.prune_schedule is not None or job.lora is not None
    advice = list[str]()
    if kernel == "dense" and not must_be_dense and masked_linears(model):
        advice.append("--kernel sparse needs no gradients and moments of zeros")
    if not job.activation_checkpointing:
        advice.append("--activation-checkpointing keeps of each layer only what goes in")
    if job.lora is not None:
        adapt(model, job.lora, job.seed)
    if kernel == "sparse":
        sparsify(model, masked_linears(model))
    estimate = estimate_memory(
        model,
        batch.num_rows,
        batch.row_length,
        batch.precision,
        device=batch.device,
        teacher=teacher,
        recompute=job.activation_checkpointing,
    )
    if (available := available_bytes(batch.device)) is not None:
        check_memory(estimate, available, batch.num_tokens, advice)
    return estimate
