"""Whole runs made of stages: `compress` takes a dense directory to a packed file; what stands is skipped."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gossamer.checkpoint.directory import Checkpoint
from gossamer.checkpoint.partial import holds_checkpoint
from gossamer.data.sources import manifest
from gossamer.errors import CheckpointError, ConfigError, FormatError
from gossamer.job.options import option, record
from gossamer.job.report import Event, Progress, Table, quiet
from gossamer.packed.reader import Packed
from gossamer.stages.finetune import Finetune, finetune
from gossamer.stages.pack import Pack, pack
from gossamer.stages.pretrain import Pretrain, pretrain
from gossamer.stages.prune import Prune, prune
from gossamer.stages.quantize import Quantize, quantize

HOW = {"overwrite": True, "resume": True}  # options that say nothing of what comes out


@dataclass(frozen=True)
class Compress:
    """prune -> (train) -> quantize -> pack. With --pretrain-dataset in two steps, as in the paper."""

    model: str = option(help="dense checkpoint directory", positional=True)
    output_dir: str = option(help="directory for every step's output and model.goss", short="-o")
    dataset: tuple[str, ...] = option(help="calibration text: SRC[@WEIGHT]...")
    sparsity: float = option(0.7, help="fraction of zeros in the decoder's linear weights")
    scheme: Literal["W8A8"] = option("W8A8", help="integer format of weights and activations")
    num_calibration_samples: int = option(128, help="rows of calibration text")
    max_seq_length: int = option(2048, help="tokens a calibration row")
    pretrain_dataset: tuple[str, ...] = option((), help="text to train on after each prune: SRC[@WEIGHT]...")
    num_tokens: int = option(1_000_000, help="tokens of each pretraining")
    finetune_dataset: tuple[str, ...] = option(
        (), help="examples to fine-tune on, with SquareHead from MODEL"
    )
    format: Literal["chat", "instruct", "prompt-completion"] = option("chat", help="what the examples are")
    num_train_epochs: int = option(2, help="passes over the examples")
    kernel: Literal["auto", "dense", "sparse"] = option(
        "auto", help="of training: all weights or the nonzero ones; auto: the faster, which can change bits"
    )
    seed: int = option(0, help="order of the training data")
    overwrite: bool = option(False, help="replace the outputs of steps that other options made")
    offline: bool = option(False, help="never touch the network")


@dataclass(frozen=True)
class CompressResult:
    """`stages`: (name, output, "ran", "went on" or "stood") in order; `packed`: the .goss file."""

    packed: str
    sparsity: float
    num_bytes: int
    dense_bytes: int
    stages: list[tuple[str, str, str]]

    def tables(self) -> list[Table]:
        ratio = f"{self.num_bytes:,} bytes, {self.dense_bytes / self.num_bytes:.1f}x smaller"
        return [
            Table(f"{self.packed}: {self.sparsity:.0%} zeros, {ratio}", ("stage", "output", ""), self.stages)
        ]


def compress(job: Compress, progress: Progress = quiet) -> CompressResult:
    """Run every step whose output does not stand already; raises what the stages raise.

    Training that the same command was interrupted in goes on from its last checkpoint. Only a directory that
    an earlier `compress` made is written into, and finished training is replaced with `overwrite` alone.
    """
    steps = plan(job)
    again = claim(Path(job.output_dir), job)
    ran = [(step.stage, str(step.output), run(step, again, job.overwrite, progress)) for step in steps]
    packed = steps[-1].output
    return CompressResult(
        packed=str(packed),
        sparsity=Checkpoint.open(steps[-1].job.model).sparsity(),
        num_bytes=packed.stat().st_size,
        dense_bytes=sum(entry.num_bytes for entry in Checkpoint.open(job.model).entries.values()),
        stages=ran,
    )


def claim(output: Path, job: Compress) -> bool:
    """Mark the directory as ours, and say whether the same job, on the same model and data, was here last.

    Raises ConfigError for a directory that holds anything else's files.
    """
    mark = output / "compress.json"
    if output.exists() and not mark.exists() and (output.is_file() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and was not made by compress; give another --output-dir")
    before = mark.read_text(encoding="utf-8") if mark.exists() else ""
    data = [manifest(name) for name in (*job.dataset, *job.pretrain_dataset, *job.finetune_dataset)]
    inputs = {"model_hash": Checkpoint.open(job.model).hash(), "data": data}
    now = json.dumps({**record(job), **inputs, "overwrite": None}, indent=2) + "\n"
    output.mkdir(parents=True, exist_ok=True)
    mark.write_text(now, encoding="utf-8")
    return before == now


@dataclass(frozen=True)
class Step:
    """One stage of the plan: its name, its function, its options and what it writes."""

    stage: str
    function: Callable[..., Any]
    job: Any
    output: Path


def plan(job: Compress) -> list[Step]:
    """The stages and their options, each reading what the one before it wrote."""
    steps: list[Step] = []

    def add(function: Callable[..., Any], kind: Callable[..., Any], **options: Any) -> None:
        stage = function.__name__
        output = Path(job.output_dir) / ("model.goss" if stage == "pack" else f"{len(steps) + 1}-{stage}")
        model = str(steps[-1].output) if steps else job.model
        place = {"output_file" if stage == "pack" else "output_dir": str(output)}
        steps.append(Step(stage, function, kind(model=model, **place, **options), output))

    calibration: dict[str, Any] = {
        "dataset": job.dataset,
        "num_calibration_samples": job.num_calibration_samples,
        "max_seq_length": job.max_seq_length,
        "offline": job.offline,
    }
    two_steps = job.pretrain_dataset and job.sparsity > 0.5 > Checkpoint.open(job.model).sparsity()
    for sparsity in (0.5, job.sparsity) if two_steps else (job.sparsity,):
        add(prune, Prune, sparsity=sparsity, **calibration)
        if job.pretrain_dataset:
            text = {"dataset": job.pretrain_dataset, "num_tokens": job.num_tokens}
            add(pretrain, Pretrain, kernel=job.kernel, seed=job.seed, offline=job.offline, **text)
    if job.finetune_dataset:
        examples: dict[str, Any] = {"dataset": job.finetune_dataset, "format": job.format}
        examples["num_train_epochs"] = job.num_train_epochs
        add(finetune, Finetune, teacher=job.model, kernel=job.kernel, seed=job.seed, **examples)
    add(quantize, Quantize, scheme=job.scheme, **calibration)
    add(pack, Pack)
    return steps


def run(step: Step, again: bool, overwrite: bool, progress: Progress) -> str:
    """Run the stage unless its output stands; `again`: go on with what the same job left unfinished."""
    if stands(step):
        progress(Event(step.stage, "stands", 1, 1))
        return "stood"
    if step.output.exists() and step.stage in ("pretrain", "finetune") and not overwrite:
        raise ConfigError(
            f"{step.output} was trained with other options, or from another model, than it would be now; "
            "--overwrite replaces it and what follows; or give another --output-dir"
        )
    unfinished = step.output.with_name(step.output.name + ".partial")
    if again and holds_checkpoint(unfinished):
        step.function(dataclasses.replace(step.job, overwrite=True, resume=True), progress)
        return "went on"
    step.function(dataclasses.replace(step.job, overwrite=True), progress)
    return "ran"


def stands(step: Step) -> bool:
    """Whether the output is whole and was made by the same options from the same parent."""
    if not step.output.exists():
        return False
    parent = Checkpoint.open(step.job.model).hash()
    try:
        if step.stage == "pack":
            return Packed.open(step.output).metadata["parent"] == parent
        manifest = Checkpoint.open(step.output).manifest or {}
    except (CheckpointError, FormatError):
        return False
    same_job = manifest.get("job", {}) | HOW == record(step.job) | HOW
    return manifest.get("stage") == step.stage and same_job and manifest["parent"]["hash"] == parent
