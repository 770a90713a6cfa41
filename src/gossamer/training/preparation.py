"""What is done before the first step: choose the training kernel and check that the run fits into memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedModel

from gossamer.checkpoint.directory import Checkpoint
from gossamer.job.processes import num_processes
from gossamer.training.device import another_device
from gossamer.training.gradual import pattern_of, schedule_of
from gossamer.training.kernel_choice import (
    KernelChoice,
    TrainingKernel,
    choose_kernel,
    masked_linears,
    refuse_dense,
    refuse_sharded,
)
from gossamer.training.lora import adapt, check_rank
from gossamer.training.memory import (
    MemoryEstimate,
    available_bytes,
    check_memory,
    estimate_elsewhere,
    estimate_memory,
    largest_fitting,
)
from gossamer.training.options import TrainingOptions
from gossamer.training.parallel import check_processes, from_first, least_of_all, rows_of_this_process
from gossamer.training.sparse_linear import sparsify
from gossamer.training.teacher_cache import check_folder
from gossamer.training.trainer_contract import check_trainer

SHORTEST_ROW = 128  # tokens, that a row with too little memory is advised to have


def check_model(job: TrainingOptions, source: Checkpoint) -> None:
    """Raise ConfigError for what the job asks for and this model or the place of its files cannot have."""
    if schedule_of(job.prune_schedule, source) is not None:
        pattern_of(job.pattern, source)
    check_rank(job.lora, source)
    check_folder(job.teacher_cache, job.output_dir)


def check_start(job: TrainingOptions, source: Checkpoint, row_length: int | None = None) -> None:
    """Raise what training or its teacher would, once hours went into the rows: of what is known before.

    That is the version of transformers, the processes that are there, their share of rows of `row_length`
    tokens, and the kernel that is asked for.
    """
    check_trainer()
    check_processes(job.parallel, job.teacher_device)
    if row_length is not None:
        rows_of_this_process(job.batch_rows(row_length), row_length)
    if job.kernel == "sparse":
        if job.parallel == "fsdp":
            refuse_sharded(job.kernel)
        refuse_dense(has_zeros=any(source.zeros(f"{name}.weight").any() for name in source.linears))


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
    batches: Sequence[MicroBatch],
    kernel: TrainingKernel,
) -> tuple[MicroBatch, MemoryEstimate, MemoryEstimate | None]:
    """Replace layers of `model` as the training kernel or --lora needs it, and choose the micro-batch.

    `sparse_linear.densify` and `lora.merge` undo the former.

    batches: those that may be chosen, the largest first; they differ in their rows alone.

    Returns the largest that fits into the memory of every process, what the run will take with it beyond
    what it holds already, and what its teacher will take on a device of its own.

    Raises ConfigError if there is too little memory for the smallest one.
    """
    has_zeros = bool(masked_linears(model))
    if job.lora is not None:
        adapt(model, job.lora, job.seed)
    if kernel == "sparse":
        sparsify(model, masked_linears(model))
    largest, available = batches[0], available_bytes(batches[0].device)
    elsewhere = another_device(job.teacher_device, largest.device) if teacher is not None else None

    def estimate(num_rows: int, row_length: int = largest.row_length) -> MemoryEstimate:
        return estimate_memory(
            model,
            num_rows,
            row_length,
            largest.precision,
            device=largest.device,
            teacher=teacher,
            teacher_elsewhere=elsewhere is not None,
            recompute=job.activation_checkpointing,
        )

    counts = [batch.num_rows for batch in batches]
    num_rows = largest_fitting(counts, estimate, available)
    if teacher is not None and elsewhere is not None:
        num_rows = min(num_rows, _largest_of_teacher(teacher, counts, largest.row_length, elsewhere))
    batch = replace(largest, num_rows=least_of_all(num_rows))
    needed = estimate(batch.num_rows)
    if available is not None and needed.total > available:
        shorter = None if job.resume else _shorter_row(estimate, batch.row_length, available)
        advice = [] if shorter is None else [f"lower --max-length to {shorter} or less"]
        teachers = [] if teacher is None else _without_teacher(job, batch.device, elsewhere)
        advice += _lighter(job, kernel, teachers, has_zeros=has_zeros)
        check_memory(needed, available, batch.num_tokens, advice)
    if teacher is None or elsewhere is None:
        return batch, needed, None
    return batch, needed, estimate_elsewhere(teacher, batch.num_rows, batch.row_length, elsewhere)


def _largest_of_teacher(teacher: PreTrainedModel, counts: Sequence[int], row_length: int, device: str) -> int:
    """The most rows that fit where the teacher is; raises ConfigError where not even the fewest do."""

    def estimate(num_rows: int) -> MemoryEstimate:
        return estimate_elsewhere(teacher, num_rows, row_length, device)

    available = available_bytes(device)
    num_rows = largest_fitting(counts, estimate, available)
    if available is not None:
        advice = ["--teacher-cache FOLDER asks it before training", "give another --teacher-device"]
        what = f"the teacher on {device}"
        check_memory(estimate(num_rows), available, num_rows * row_length, advice, what)
    return num_rows


def _shorter_row(
    estimate: Callable[[int, int], MemoryEstimate], row_length: int, available: int
) -> int | None:
    """A half, a quarter ... of `row_length`, of which a row fits; None if not even `SHORTEST_ROW` does."""
    while (row_length := row_length // 2) >= SHORTEST_ROW:
        if estimate(1, row_length).total <= available:
            return row_length
    return None


def _lighter(
    job: TrainingOptions, kernel: TrainingKernel, teachers: Iterable[str], *, has_zeros: bool
) -> Iterator[str]:
    """What could be given besides; where a run is resumed, only what it may have otherwise than before.

    teachers: what could be done about the teacher.
    """
    if not job.activation_checkpointing:
        yield "--activation-checkpointing keeps of each layer only what goes in"
    if num_processes() > 1 and job.parallel == "ddp" and job.lora is None and kernel == "dense":
        yield "--parallel fsdp shares weights, gradients and moments among the processes"
    yield from teachers
    if job.resume:
        yield "--overwrite starts anew, with as much at a time as fits now"
        return
    if job.lora is None and job.prune_schedule is None and job.parallel == "ddp" and job.kernel != "sparse":
        yield "--lora RANK trains adapters alone, and needs no gradients and moments of other weights"
    must_be_dense = job.parallel == "fsdp" or job.prune_schedule is not None or job.lora is not None
    if kernel == "dense" and has_zeros and not must_be_dense:
        yield "--kernel sparse needs no gradients and moments of zeros"


def _without_teacher(job: TrainingOptions, device: str, elsewhere: str | None) -> Iterator[str]:
    """How the teacher could be out of the way; a cache is not for a run that began without."""
    if not job.resume:
        yield "--teacher-cache FOLDER asks the teacher before training, and it is not in memory then"
    if device != "cpu" and elsewhere is None:
        yield "--teacher-device cpu leaves the teacher in the machine's memory"
