"""Before the first step: the kernel is chosen, and the run is known to fit into memory."""

from typing import Literal

from transformers import LlamaForCausalLM

from gossamer.report import Event, Progress
from gossamer.training.kernel import Kernel, KernelChoice, choose_kernel, masked_linears
from gossamer.training.memory import available_bytes, check_memory, estimate_memory
from gossamer.training.options import TrainingOptions
from gossamer.training.parallel import from_first
from gossamer.training.sparse_linear import sparsify


def prepare(
    stage: str,
    job: TrainingOptions,
    model: LlamaForCausalLM,
    teacher: LlamaForCausalLM | None,
    micro_batch: tuple[int, int],
    device: str,
    precision: Literal["f32", "bf16"],
    progress: Progress,
    decided: Kernel | None = None,
) -> KernelChoice:
    """Put the layers of the kernel that the run takes into `model`; `sparse_linear.densify` takes them out.

    micro_batch: rows, and tokens of a row; decided: what an interrupted run took. Raises ConfigError for too
    little memory, and what `choose_kernel` raises.
    """
    num_rows, row_length = micro_batch
    num_tokens, sharded = num_rows * row_length, job.parallel == "fsdp"
    if decided is None:
        choice = from_first(
            lambda: choose_kernel(job.kernel, model, device, precision, num_tokens, sharded=sharded)
        )
    else:
        choice = KernelChoice(decided, "as the run began")
    progress(Event(stage, f"kernel {choice.kernel}: {choice.reason}", lasting=True))
    could_be_sparse = choice.kernel == "dense" and not sharded and bool(masked_linears(model))
    if choice.kernel == "sparse":
        sparsify(model, masked_linears(model))
    estimate = estimate_memory(model, num_rows, row_length, precision, device=device, teacher=teacher)
    if (available := available_bytes(device)) is not None:
        check_memory(estimate, available, num_tokens, could_be_sparse=could_be_sparse)
    return choice
