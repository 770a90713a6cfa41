"""`compress`: a dense directory becomes a packed file, stage by stage; what an earlier run made is kept."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.checkpoint.directory import Checkpoint
from gossamer.checkpoint.partial import holds_checkpoint
from gossamer.data.presets import expand
from gossamer.data.sources import manifest
from gossamer.errors import CheckpointError, ConfigError, FormatError
from gossamer.job.options import option, record
from gossamer.job.report import Event, Progress, Result, Table, quiet
from gossamer.packed.reader import Packed
from gossamer.runs.options import DECIDED, STAGES, check, options_for, options_of
from gossamer.stages.finetune import Finetune, finetune
from gossamer.stages.pack import Pack, pack
from gossamer.stages.pretrain import Pretrain, pretrain
from gossamer.stages.prune import Prune, prune
from gossamer.stages.quantize import Quantize, quantize
from gossamer.training.teacher_cache import check_folder

TRAINED = ("pretrain", "finetune")
DEFAULTS = {"sparsity": 0.7, "num_tokens": 1_000_000, "format": "chat"}
HOW = (
    "overwrite",
    "resume",
    "save_seconds",
    "save_steps",
    "report_to",
    "offline",
    "threads",
    "teacher_device",
)  # these do not change what comes out


@dataclass(frozen=True)
class Compress(options_of(STAGES, without=DECIDED, defaults=DEFAULTS)):
    """prune -> (train) -> quantize -> pack. With --pretrain-dataset in two steps, as in the paper."""

    model: str = option(help="dense checkpoint directory, or org/name[@revision] of the hub", positional=True)
    output_dir: str = option(help="directory for every step's output and model.goss", short="-o")
    dataset: tuple[str, ...] = option(help="calibration text: SRC[@WEIGHT]...")
    pretrain_dataset: tuple[str, ...] = option(
        (), help="text to train on after each prune, as pretrain takes it"
    )
    finetune_dataset: tuple[str, ...] = option(
        (), help="examples to fine-tune on, with SquareHead from MODEL"
    )
    overwrite: bool = option(False, help="replace the outputs of steps that other options made")


@dataclass(frozen=True)
class CompressResult(Result):
    """`packed`: the .goss file; `stages`: (name, output, how) in order.

    How: "ran"; "went on" with what was interrupted; "stood", as its output was there already.
    """

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
    """Run every stage whose output is not there yet; raises what the stages raise.

    If the same command was interrupted, its step goes on from the last checkpoint. An output
    directory must be new, or made by an earlier `compress`; finished training, which may have taken days, is
    replaced only with `overwrite`.
    """
    job = pinned(job)
    steps = plan(job)
    check_folder(job.teacher_cache, job.output_dir)
    check([step.job for step in steps], Checkpoint.open(job.model, offline=job.offline))
    left = claim(Path(job.output_dir), inputs(job))
    ran = [(step.stage, str(step.output), run(step, left, job.overwrite, progress)) for step in steps]
    left.mark.write_text(left.finished, encoding="utf-8")
    packed = steps[-1].output
    return CompressResult(
        packed=str(packed),
        sparsity=Checkpoint.open(steps[-1].job.model).sparsity(),
        num_bytes=packed.stat().st_size,
        dense_bytes=sum(
            entry.num_bytes for entry in Checkpoint.open(job.model, offline=job.offline).entries.values()
        ),
        stages=ran,
    )


def pinned(job: Compress) -> Compress:
    """The same job, its presets as sources and a model of the hub by its commit: all steps see the same."""
    job = dataclasses.replace(
        job,
        pretrain_dataset=expand(job.pretrain_dataset),
        finetune_dataset=expand(job.finetune_dataset),
    )
    downloaded = Checkpoint.open(job.model, offline=job.offline).downloaded
    if downloaded is None:
        return job
    return dataclasses.replace(job, model=f"{downloaded['repository']}@{downloaded['commit']}")


@dataclass(frozen=True)
class Left:
    """What the last run in the directory left there.

    `whole`: it had the same model, data and options (but for those of `HOW`) as this one, and came to its
    end. `finished` is what to write into the file `mark` at the end of this one.
    """

    whole: bool
    mark: Path
    finished: str


def inputs(job: Compress) -> dict[str, Any]:
    """All that decides what comes out: options, the model's hash, and what the data are."""
    names = (*job.dataset, *job.pretrain_dataset, *job.finetune_dataset)
    data = [manifest(name, offline=job.offline) for name in names]
    model_hash = Checkpoint.open(job.model, offline=job.offline).hash
    return {**deciding(record(job)), "model_hash": model_hash, "data": data}


def claim(output: Path, decided: dict[str, Any]) -> Left:
    """Mark the directory as ours, with all that decides what comes out, and say what is left in it.

    Raises ConfigError for a directory that holds anything else's files.
    """
    mark = output / "compress.json"
    if output.exists() and not mark.exists() and (output.is_file() or any(output.iterdir())):
        raise ConfigError(
            f"{output} exists and was not made by compress or a recipe; give another --output-dir"
        )
    before = mark.read_text(encoding="utf-8") if mark.exists() else ""
    begun, finished = (json.dumps({**decided, "finished": whole}, indent=2) + "\n" for whole in (False, True))
    output.mkdir(parents=True, exist_ok=True)
    mark.write_text(begun, encoding="utf-8")
    return Left(before == finished, mark, finished)


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

    def add(function: Callable[..., Any], kind: type, **decided: Any) -> None:
        stage = function.__name__
        output = Path(job.output_dir) / ("model.goss" if stage == "pack" else f"{len(steps) + 1}-{stage}")
        model = str(steps[-1].output) if steps else job.model
        place = {"model": model, "output_file" if stage == "pack" else "output_dir": str(output)}
        options = options_for(job, stage, kind, without=DECIDED) | {"overwrite": False} | place | decided
        steps.append(Step(stage, function, kind(**options), output))

    dense = Checkpoint.open(job.model, offline=job.offline)
    learned = _learned(job, dense)
    anywhere = job.pattern == "unstructured"  # a pattern fixes the sparsity
    two_steps = anywhere and job.pretrain_dataset and job.sparsity > 0.5 > dense.sparsity()
    for sparsity in (0.5, job.sparsity) if two_steps else (job.sparsity,):
        add(prune, Prune, sparsity=sparsity)
        if job.pretrain_dataset:
            add(pretrain, Pretrain, **learned)
    if job.finetune_dataset:
        add(finetune, Finetune, teacher=None if job.distill == "none" else job.model)
    add(quantize, Quantize)
    add(pack, Pack)
    return steps


def _learned(job: Compress, dense: Checkpoint) -> dict[str, Any]:
    """What `pretrain` is told beside its options: the teacher, of which an embedding model learns all.

    ConfigError where a kind of training has nothing to teach a model with this head.
    """
    task = dense.architecture.task
    datasets = {"pretrain": job.pretrain_dataset, "finetune": job.finetune_dataset}
    taught = {
        "pretrain": ("generation", "embedding", "masked"),
        "finetune": ("generation", "sequence", "tokens"),
    }
    for stage, tasks in taught.items():
        if datasets[stage] and task not in tasks:
            raise ConfigError(
                f"--{stage}-dataset: {stage} teaches models for {', '.join(tasks)}; found {job.model}, one "
                f"for {task}: leave it out"
            )
    return {"teacher": job.model} if task == "embedding" else {}


def run(step: Step, left: Left, overwrite: bool, progress: Progress) -> str:
    """Run the stage, unless its output is there already; go on with training that was begun.

    Where that cannot be gone on with, because of other options, other threads or damage, `overwrite` starts
    it anew.
    """
    if is_up_to_date(step, left):
        progress(Event(step.stage, "is there already", 1, 1))
        return "stood"
    if step.output.exists() and step.stage in TRAINED and not overwrite:
        raise ConfigError(
            f"{step.output} was trained with other options, or from another model, than it would be now; "
            "--overwrite replaces it and what follows; or give another --output-dir"
        )
    unfinished = step.output.with_name(step.output.name + ".partial")
    if holds_checkpoint(unfinished):
        try:
            step.function(dataclasses.replace(step.job, overwrite=True, resume=True), progress)
            return "went on"
        except (ConfigError, CheckpointError) as error:
            if not overwrite:
                raise
            progress(Event(step.stage, f"starts anew: {error}", lasting=True))
    step.function(dataclasses.replace(step.job, overwrite=True), progress)
    return "ran"


def is_up_to_date(step: Step, left: Left) -> bool:
    """Whether the output is whole and was made by the same options from the same parent.

    A packed file does not say by which options: it counts if the last run was the same, and finished.
    """
    if not step.output.exists():
        return False
    parent = Checkpoint.open(step.job.model, offline=step.job.offline).hash
    try:
        if step.stage == "pack":
            return left.whole and Packed.open(step.output).metadata["parent"] == parent
        manifest = Checkpoint.open(step.output).manifest or {}
    except (CheckpointError, FormatError):
        return False
    same_job = deciding(manifest.get("job", {})) == deciding(record(step.job))
    return manifest.get("stage") == step.stage and same_job and manifest["parent"]["hash"] == parent


def deciding(options: dict[str, Any]) -> dict[str, Any]:
    """The recorded options that change what comes out."""
    return {name: value for name, value in options.items() if name not in HOW}
