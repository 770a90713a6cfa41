"""A training run: transformers' Trainer over rows of tokens, with fixed masks and perhaps a dense teacher."""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from gossamer import _native
from gossamer.checkpoint.directory import Derived
from gossamer.checkpoint.resumable import Checkpoints, RunIdentity
from gossamer.errors import Interrupted
from gossamer.job.processes import num_processes
from gossamer.job.report import Event, Progress
from gossamer.machine import ran_out_of_memory
from gossamer.training.attention import choose_attention
from gossamer.training.compiled import COMPILING, compile_layers, restore_layers
from gossamer.training.device import MICRO_BATCH_TOKENS, another_device, cast_teacher, choose_precision
from gossamer.training.distillation import Distillation, SquareHead
from gossamer.training.gradual import GradualPruning, pattern_of, schedule_of
from gossamer.training.history import PARTS, History
from gossamer.training.interruption import Interruption
from gossamer.training.kernel_choice import KernelChoice, TrainingKernel, refuse_sharded
from gossamer.training.lora import merge
from gossamer.training.masks import MaskCallback, model_mask_hash
from gossamer.training.memory import HeldBytes
from gossamer.training.monitor import Monitor, reporters, training_log
from gossamer.training.objective import NextToken, Objective
from gossamer.training.options import TrainingOptions, deciding_options
from gossamer.training.parallel import Parallel, distribute, from_first, rows_of_this_process
from gossamer.training.preparation import MicroBatch, decide_kernel, prepare
from gossamer.training.rate import falling
from gossamer.training.row_trainer import RowTrainer, SaveEvery
from gossamer.training.rows import Rows
from gossamer.training.sparse_linear import densify
from gossamer.training.teacher import LiveTeacher, Teacher
from gossamer.training.teacher_cache import CachedTeacher
from gossamer.training.trainer_contract import check_trainer


def train(
    job: TrainingOptions,
    model: PreTrainedModel,
    rows: Rows,
    target: Derived,
    progress: Progress,
    teacher: Teacher | CachedTeacher | None = None,
    objective: Callable[[PreTrainedModel], Objective] = NextToken,
) -> History:
    """Train `model` in place, on the GPU if there is one; its zeros stay zeros.

    objective: makes of the whole model what it is trained to do. Checkpoints and logs go to `target.path`.
    Raises ConfigError if the loss or the gradient is not finite, UnsupportedError for another transformers
    than this was written for, for several GPUs in one process and for the sparse training kernel under FSDP,
    CheckpointError if there is no undamaged checkpoint to resume from, and Interrupted after Ctrl-C, once the
    run is saved.
    """
    check_trainer()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = choose_precision(job.precision, device)
    checkpoints = Checkpoints(target.path, identify(job, model, rows, target, device, precision, teacher))
    start = _find_start(job, checkpoints)
    _say(progress, target.stage, *start.notes)
    aim = objective(model)
    if job.freeze == "embeddings":
        freeze_embeddings(model)
    distribute(model, job.parallel, job.teacher_device)
    teacher_model = teacher.model if isinstance(teacher, Teacher) else None
    elsewhere = another_device(job.teacher_device, device)
    teachers = (elsewhere or device).partition(":")[0]
    if teacher_model is not None:
        cast_teacher(teacher_model, precision)  # before memory is measured
    choose_attention(rows.row_length, device, precision, model)
    choose_attention(rows.row_length, teachers, precision, teacher_model)
    if job.activation_checkpointing:
        _checkpointing(model, "enable")({"use_reentrant": False})
    batches = _micro_batches(job, rows, device, precision, start.micro_rows)
    choice = decide_kernel(job, model, batches[0], start.kernel)
    batch, estimate, of_teacher = prepare(job, model, teacher_model, batches, choice.kernel)
    tokens = f"{batch.num_tokens:,} tokens" + (" (more do not fit)" if batch != batches[0] else "")
    memory = f"steps will take about {estimate.parts()} beside the model, in micro-batches of {tokens}"
    if of_teacher is not None:
        memory += f"; the teacher on {elsewhere} about {of_teacher.parts()}"
    _say(progress, target.stage, f"kernel {choice.kernel}: {choice.reason}; {memory}")
    if choice.kernel == "dense" and job.lora is None and compile_layers(device, model):
        compile_layers(teachers, teacher_model)
        _say(progress, target.stage, COMPILING)
    arguments = _arguments(job, rows, batch, checkpoints)
    monitor = Monitor(target.stage, progress, target.path, target.parent.sparsity())
    callbacks = [*reporters(job.report_to, target.path, start.step + 1), monitor, held := HeldBytes()]
    shared = rows.padded(num_processes() * batch.num_rows)
    schedule = schedule_of(job.prune_schedule, target.parent)
    masks = MaskCallback(model)
    if schedule is not None:
        masks = GradualPruning(schedule, monitor.risen, pattern_of(job.pattern, target.parent))
    kernel = choice.kernel
    trainer = RowTrainer(model, arguments, shared, aim, checkpoints, monitor, masks, callbacks, kernel)
    if job.lr_cycles > 1:
        steps, warmup = _num_steps(job, rows), int(arguments.warmup_steps)
        trainer.rate = falling(job.lr_schedule, warmup, steps, job.lr_cycles)
    if teacher is not None:
        _attach(job, teacher, trainer, elsewhere)
    _run(trainer, start.step, job.save_steps)
    state = trainer.state
    pruning = {} if schedule is None else schedule.record(state.max_steps, monitor.sparsity)
    del trainer
    _take_back(model, job.parallel)
    return _history(rows, state, precision, choice, start.notes, pruning, held.num_bytes)


@dataclass(frozen=True)
class _Start:
    """Where a run begins: after `step` steps, with the kernel and the micro-batches that it began with.

    `kernel` is None if it is still to be chosen, and so is `micro_rows`, the rows of a micro-batch; in a run
    from before they were fitted to memory it is 0. `notes` are for the user.
    """

    step: int = 0
    kernel: TrainingKernel | None = None
    micro_rows: int | None = None
    notes: tuple[str, ...] = ()


def _find_start(job: TrainingOptions, checkpoints: Checkpoints) -> _Start:
    """Find the checkpoint to resume from, if asked to, and what the run began with.

    Raises UnsupportedError for a training kernel that FSDP cannot have, before the model is sharded.
    """
    start = _Start()
    if job.resume:
        step, notes = from_first(checkpoints.newest_sound)
        found, here = checkpoints.recorded(step), checkpoints.identity.may_differ
        # Another number of sums is another rounding anyway, and another device has other room.
        same = all(
            found["rounds"].get(name) == here[name] for name in ("device", "num_processes", "parallel")
        )
        micro_rows = found.get("micro_rows", 0) if same else None
        start = _Start(step, found["kernel"], micro_rows, tuple(notes))
    if job.parallel == "fsdp":
        refuse_sharded(start.kernel or job.kernel)
    return start


def _say(progress: Progress, stage: str, *lines: str) -> None:
    for line in lines:
        progress(Event(stage, line, lasting=True))


def _attach(
    job: TrainingOptions, teacher: Teacher | CachedTeacher, trainer: RowTrainer, elsewhere: str | None
) -> None:
    states = LiveTeacher(teacher.model, elsewhere) if isinstance(teacher, Teacher) else teacher
    watching = SquareHead(states, weight=0.0 if job.distill == "kl" else 1.0)
    watching.attach(trainer)
    aim = trainer.objective
    own = () if aim.own is None else (aim.own,)
    head = (aim.at_the_head,) if aim.own is None or job.distill in ("kl", "both") else ()
    parts = (*own, *head, *(() if job.distill == "kl" else ("squarehead",)))
    trainer.distillation = Distillation(states, parts, job.distill_temperature, job.cross_entropy_weight)


def _run(trainer: RowTrainer, step: int, save_steps: int) -> None:
    """Train the steps that are left after `step`.

    Raises Interrupted after Ctrl-C before the last step, MemoryError if torch finds no memory.
    """
    monitor = trainer.monitor
    interruption = Interruption(lambda line: _say(monitor.progress, monitor.stage, line))
    for callback in (SaveEvery(save_steps), interruption):
        trainer.add_callback(callback)
    try:
        with interruption.listening():
            trainer.train(resume_from_checkpoint=str(trainer.checkpoints.path(step)) if step else None)
    except RuntimeError as error:
        if ran_out_of_memory(error):
            raise MemoryError(
                f"out of memory ({error}); lower --max-length or --batch-tokens (of a step, over all "
                "processes), or give --activation-checkpointing"
            ) from error
        raise
    if trainer.state.global_step < trainer.state.max_steps:
        raise _interrupted(trainer)


def _take_back(model: PreTrainedModel, parallel: Parallel) -> None:
    """Give the model the form in which it came: dense, without adapters and gradients, and on the CPU.

    The Trainer refers to itself, so it and the moments that it holds are collected first: only then is there
    memory for the dense weights.
    """
    model.zero_grad()
    restore_layers(model)
    _checkpointing(model, "disable")()
    gc.collect()
    if parallel == "ddp":
        nn.Module.to(model, "cpu")
    densify(model.eval())
    merge(model)


def freeze_embeddings(model: PreTrainedModel) -> None:
    """Leave what tokens are looked up in as it is, and in an encoder positions, types and their norm."""
    trunk: Any = model.base_model
    frozen: nn.Module = getattr(trunk, "embeddings", None) or model.get_input_embeddings()
    frozen.requires_grad_(False)


def _checkpointing(model: PreTrainedModel, what: Literal["enable", "disable"]) -> Callable[..., None]:
    """The method of transformers for it, which has another name in versions before 5.23."""
    names = [f"{kind}_checkpointing_{what}" for kind in ("activation", "gradient")]
    return getattr(model, next(name for name in names if hasattr(model, name)))


def _history(
    rows: Rows,
    state: TrainerState,
    precision: str,
    choice: KernelChoice,
    notes: tuple[str, ...],
    pruning: dict[str, Any],
    held_bytes: int | None,
) -> History:
    log = training_log(state)
    ends = [entry["num_tokens"] for entry in log[:-1]] + [rows.num_tokens(len(rows))]
    return History(
        losses=tuple(entry["loss"] for entry in log),
        parts={name: tuple(entry[name] for entry in log) for name in PARTS if name in log[-1]},
        step_tokens=tuple(after - before for before, after in pairwise([0, *ends])),
        seconds=log[-1]["seconds"],
        precision=precision,
        num_threads=torch.get_num_threads(),
        notes=notes,
        kernel=choice,
        pruning=pruning,
        optimizer_gradient_bytes=held_bytes,
    )


def identify(
    job: TrainingOptions,
    model: PreTrainedModel,
    rows: Rows,
    target: Derived,
    device: str,
    precision: str,
    teacher: Teacher | CachedTeacher | None,
) -> RunIdentity:
    """What a checkpoint of this run must have in common with it, and what it may have otherwise."""
    must_match = {
        "stage": target.stage,
        **deciding_options(job),
        "precision": precision,
        "model": target.parent.hash,
        "teacher": None if teacher is None else teacher.hash,
        "teacher_cache": list(teacher.layers) if isinstance(teacher, CachedTeacher) else None,
        "data": rows.hash(),
        "mask": model_mask_hash(model),
    }
    may_differ = {
        "device": device,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "native_instructions": _native.isa(),
        "num_threads": torch.get_num_threads(),
        "num_processes": num_processes(),
        "teacher_device": job.teacher_device,
        "parallel": job.parallel,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return RunIdentity(must_match, may_differ)


def _interrupted(trainer: RowTrainer) -> KeyboardInterrupt:
    """The exception for a run that was stopped: Interrupted, which names the checkpoint, if there is one.

    There is none before the first step; then it is Python's own KeyboardInterrupt.
    """
    state = trainer.state
    if state.global_step not in trainer.checkpoints.steps():
        return KeyboardInterrupt()
    folder = trainer.checkpoints.folder
    return Interrupted(f"interrupted after step {state.global_step} of {state.max_steps}, saved in {folder}")


def _num_steps(job: TrainingOptions, rows: Rows) -> int:
    return math.ceil(len(rows) / job.batch_rows(rows.row_length))


def _arguments(
    job: TrainingOptions, rows: Rows, batch: MicroBatch, checkpoints: Checkpoints
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(checkpoints.staging),
        num_train_epochs=1,
        per_device_train_batch_size=batch.num_rows,
        gradient_accumulation_steps=rows_of_this_process(job.batch_rows(rows.row_length), rows.row_length)
        // batch.num_rows,
        learning_rate=job.learning_rate,
        lr_scheduler_type=job.lr_schedule,
        warmup_steps=round(job.warmup_ratio * _num_steps(job, rows)),
        weight_decay=job.weight_decay,
        max_grad_norm=job.max_grad_norm,
        adam_beta2=0.95,
        optim="adamw_torch_fused",
        bf16=batch.precision == "bf16",
        use_cpu=batch.device == "cpu",
        seed=job.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        train_sampling_strategy="sequential",
        dataloader_pin_memory=batch.device == "cuda",
        ddp_find_unused_parameters=True,  # keeps DDP from rebuilding its buckets: see parallel.py
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a second one is the teacher's
    return arguments


def _micro_batches(
    job: TrainingOptions,
    rows: Rows,
    device: str,
    precision: Literal["f32", "bf16"],
    began_with: int | None,
) -> list[MicroBatch]:
    """The micro-batches that the run may have, the largest first: `micro_row_counts` of a process's rows.

    began_with: the rows of the one that the interrupted run had, which is kept (0: the largest), or None.
    """
    own_rows = rows_of_this_process(job.batch_rows(rows.row_length), rows.row_length)
    counts = micro_row_counts(own_rows, rows.row_length, MICRO_BATCH_TOKENS[device])
    if began_with is not None:
        counts = [began_with or counts[0]]
    return [MicroBatch(count, rows.row_length, device, precision) for count in counts]


def micro_row_counts(own_rows: int, row_length: int, limit_tokens: int) -> list[int]:
    """The divisors of `own_rows` whose rows hold at most `limit_tokens`, and 1; the largest first."""
    most = max(1, min(own_rows, limit_tokens // row_length))
    return [count for count in range(most, 0, -1) if own_rows % count == 0]
