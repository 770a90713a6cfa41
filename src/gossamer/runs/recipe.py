"""The paper's runs (arXiv 2405.03594), step by step: what the programs in recipes/ are made of.

    MODEL -> prune 50% -> pretrain (-> prune 70% -> pretrain), and for each task
    MODEL -> its teacher; the pruned model -> finetune beside the teacher -> quantize -> pack -> evaluate

A step whose output was made by the same options from the same parent is skipped, as by `compress`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gossamer.checkpoint.directory import Checkpoint
from gossamer.checkpoint.partial import holds_checkpoint
from gossamer.data.presets import expand
from gossamer.data.sources import manifest
from gossamer.data.supervised import Format
from gossamer.data.tables import table_rows
from gossamer.errors import ConfigError, GossamerError
from gossamer.evaluation.file_tasks import Kind
from gossamer.job.options import record
from gossamer.job.report import Progress, quiet
from gossamer.runs.compress import TRAINED, Left, Step, claim, is_up_to_date
from gossamer.runs.compress import run as run_here
from gossamer.runs.options import check
from gossamer.stages.evaluate import Evaluate, evaluate
from gossamer.stages.evaluate import check as check_evaluation
from gossamer.stages.finetune import Finetune, finetune
from gossamer.stages.pack import Pack, pack
from gossamer.stages.pretrain import Pretrain, pretrain
from gossamer.stages.prune import Prune, prune
from gossamer.stages.quantize import Quantize, quantize

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """One of the paper's five tasks, as its table has it.

    `example` makes the fields of `format` of a row of the data, and `question` those of evaluate's `kind`;
    None leaves a row out. `learning_rate` and `epochs`: by sparsity; of 0, those of the dense teacher.
    """

    name: str
    format: Format
    example: Callable[[Row], Row | None]
    kind: Kind
    question: Callable[[Row], Row | None]
    learning_rate: Mapping[float, float]
    epochs: Mapping[float, int]
    distill: Literal["squarehead", "none"] = "squarehead"
    max_grad_norm: float = 2.0
    lr_schedule: Literal["linear", "cosine"] = "linear"


@dataclass(frozen=True)
class Sizes:
    """What the paper leaves to whoever runs it, and what a smaller run has less of."""

    sparsity: float = 0.7
    num_tokens: tuple[int, int] = (45_000_000_000, 100_000_000_000)  # after each prune
    num_calibration_samples: int = 512
    max_length: int = 2048
    pretrain_batch_tokens: int = 4_194_304
    finetune_batch_tokens: int = 65_536
    pretrain_learning_rate: float = 3e-4
    repeat: bool = False  # text that is used up begins again
    num_processes: int = 1  # of torchrun, which share training by FSDP
    teacher_cache: Path | None = None  # a folder for what each task's teacher makes of its examples


@dataclass(frozen=True)
class Files:
    """Where a task's examples come from: .jsonl, .jsonl.zst or .parquet files."""

    train: Path
    test: Path


def pruned(
    model: str, output: Path, calibration: Sequence[str], text: Sequence[str], sizes: Sizes
) -> list[Step]:
    """The steps from the dense model to the sparse pretrained one."""
    if sizes.sparsity not in (0.5, 0.7):
        raise ConfigError(f"sparsity is {sizes.sparsity}; the paper's recipes are for 0.5 and 0.7")
    steps: list[Step] = []
    for sparsity, num_tokens in zip((0.5, 0.7), sizes.num_tokens, strict=True):
        if sparsity > sizes.sparsity:
            break
        made = output / f"pruned-{sparsity:.0%}".rstrip("%")
        parent = str(steps[-1].output) if steps else model
        job = Prune(
            parent,
            str(made),
            dataset=tuple(calibration),
            sparsity=sparsity,
            method="sparsegpt",
            **_rows(sizes),
        )
        steps.append(Step("prune", prune, job, made))
        trained = output / made.name.replace("pruned", "pretrained")
        training = Pretrain(
            str(made),
            str(trained),
            dataset=expand(text),
            num_tokens=num_tokens,
            batch_tokens=sizes.pretrain_batch_tokens,
            learning_rate=sizes.pretrain_learning_rate,
            repeat=sizes.repeat,
            **_training(sizes),
        )
        steps.append(Step("pretrain", pretrain, training, trained))
    return steps


def finetuned(
    task: Task, model: str, sparse: Path, output: Path, calibration: Sequence[str], files: Files, sizes: Sizes
) -> list[Step]:
    """The steps of a task: its dense teacher, then the sparse model beside it, rounded and packed."""
    folder = output / task.name
    teacher, tuned, rounded, packed = (
        folder / name for name in ("teacher", "finetuned", "quantized", "model.goss")
    )

    def tuning(parent: str, made: Path, sparsity: float, **taught: Any) -> Step:
        job = Finetune(
            parent,
            str(made),
            dataset=(str(files.train),),
            format=task.format,
            num_train_epochs=task.epochs[sparsity],
            learning_rate=task.learning_rate[sparsity],
            max_grad_norm=task.max_grad_norm,
            lr_schedule=task.lr_schedule,
            batch_tokens=sizes.finetune_batch_tokens,
            **taught,
            **_training(sizes),
        )
        return Step("finetune", finetune, job, made)

    taught: dict[str, Any] = {"distill": task.distill}
    if task.distill != "none":
        cache = None if sizes.teacher_cache is None else str(sizes.teacher_cache / task.name)
        taught |= {"teacher": str(teacher), "teacher_cache": cache}
    rounding = Quantize(str(tuned), str(rounded), dataset=tuple(calibration), **_rows(sizes))
    return [
        tuning(model, teacher, 0.0, distill="none"),
        tuning(str(sparse), tuned, sizes.sparsity, **taught),
        Step("quantize", quantize, rounding, rounded),
        Step("pack", pack, Pack(str(rounded), str(packed)), packed),
    ]


def _rows(sizes: Sizes) -> dict[str, Any]:
    return {"num_calibration_samples": sizes.num_calibration_samples, "max_seq_length": sizes.max_length}


def _training(sizes: Sizes) -> dict[str, Any]:
    several = {"parallel": "fsdp"} if sizes.num_processes > 1 else {}
    return {"max_length": sizes.max_length, **several}


def examples_of(task: Task, given: Files, folder: Path) -> Files:
    """The files as the stages read them, named by what is in them, so that other examples are other steps."""
    folder.mkdir(parents=True, exist_ok=True)
    return Files(
        _converted(given.train, task.example, folder, "train"),
        _converted(given.test, task.question, folder, "test"),
    )


def _converted(source: Path, convert: Callable[[Row], Row | None], folder: Path, name: str) -> Path:
    if not source.is_file():
        raise ConfigError(f"{source}: no such file; give one of {name} examples (.jsonl[.zst] or .parquet)")
    lines: list[str] = []
    for where, row in table_rows(source):
        try:
            made = convert(row)
        except (KeyError, TypeError, IndexError) as error:
            raise ConfigError(f"{where}: found fields {sorted(row)}; this recipe needs {error}") from error
        lines += [json.dumps(made) + "\n"] if made else []
    text = "".join(lines)
    file = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
    file.write_text(text, encoding="utf-8")
    return file


def run(
    steps: Sequence[Step],
    output: Path,
    num_processes: int,
    overwrite: bool = False,
    progress: Progress = quiet,
) -> Iterator[str]:
    """Run the steps that are not done, and say of each what became of it: "ran", "went on" or "stood".

    Training is given to torchrun where `num_processes` says so. Raises what the stages raise, ConfigError for
    an output directory that holds anything else, or finished training by other options unless `overwrite`
    replaces it, and GossamerError where torchrun fails.
    """
    names = dict.fromkeys(name for step in steps for name in getattr(step.job, "dataset", ()))
    decided = {
        "steps": [record(step.job) for step in steps],
        "model_hash": Checkpoint.open(steps[0].job.model).hash,
        "data": [manifest(name) for name in names],
    }
    check([step.job for step in steps], Checkpoint.open(steps[0].job.model))
    left = claim(output, decided)
    for step in steps:
        step.output.parent.mkdir(parents=True, exist_ok=True)
        yield _run(step, left, num_processes, overwrite, progress)
    left.mark.write_text(left.finished, encoding="utf-8")


def _run(step: Step, left: Left, num_processes: int, overwrite: bool, progress: Progress) -> str:
    if num_processes == 1 or step.stage not in TRAINED or is_up_to_date(step, left):
        return run_here(step, left, overwrite, progress)
    begun = holds_checkpoint(step.output.with_name(f"{step.output.name}.partial"))
    going_on = begun and not overwrite
    flags = {"--resume": going_on, "--overwrite": overwrite}
    words = [*command(step, num_processes), *(flag for flag, given in flags.items() if given)]
    if code := subprocess.run(words, check=False).returncode:
        raise GossamerError(f"{shlex.join(words)} ended with code {code}; its output above says why")
    return "went on" if going_on else "ran"


def command(step: Step, num_processes: int = 1) -> list[str]:
    """The words of the command line that runs a step: the options that have not their defaults."""
    words = [sys.executable, "-m", "gossamer", step.stage]
    if num_processes > 1 and step.stage in TRAINED:
        launcher = [sys.executable, "-m", "torch.distributed.run"]  # torchrun, of this environment
        words = [*launcher, "--nproc-per-node", str(num_processes), "-m", "gossamer", step.stage]
    flags: list[str] = []
    for each in dataclasses.fields(step.job):
        value = getattr(step.job, each.name)
        if each.metadata["positional"]:
            words.append(value)  # before the flags: one that takes a list would take it
        elif value != each.default:
            given = value if isinstance(value, tuple) else () if value is True else (value,)
            name = each.metadata["short"] or f"--{each.name.replace('_', '-')}"
            flags += [name, *map(str, given)]
    return [*words, *flags]


def evaluation(task: Task, test: Path, folder: Path, limit: int, *, allow_code: bool = False) -> Evaluate:
    """How the packed model in the task's folder is measured against the dense teacher.

    evaluation.json, .md and .png lie beside the model; figures that are kept are not measured again.
    Raises ConfigError for the code task unless `allow_code` lets what the models write be run.
    """
    job = Evaluate(
        str(folder / "model.goss"),
        dataset=str(test),
        kind=task.kind,
        baseline=str(folder / "teacher"),
        apply_chat_template=task.format == "chat",
        allow_code_execution=allow_code,
        limit=limit,
        output=str(folder / "evaluation.json"),
        overwrite=True,
    )
    check_evaluation(job)
    return job


def measured(job: Evaluate, progress: Progress = quiet) -> str:
    """What such an evaluation says, in Markdown."""
    packed = Path(job.model)
    evaluate(job, progress)
    sparsity = Checkpoint.open(packed.parent / "quantized").sparsity()
    title = f"# {packed.parent.name}: {sparsity:.0%} zeros, {packed.stat().st_size:,} bytes"
    return f"{title}\n\n{Path(job.output).with_suffix('.md').read_text(encoding='utf-8')}"
