"""The paper's runs (arXiv 2405.03594), step by step: what the programs in recipes/ are made of.

    MODEL -> prune 50% -> pretrain (-> prune 70% -> pretrain), and for each task
    MODEL -> its teacher; the pruned model -> finetune beside the teacher -> quantize -> pack -> evaluate

A step whose output was made by the same options from the same parent is skipped, as by `compress`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from gossamer.checkpoint.directory import Checkpoint
from gossamer.checkpoint.partial import holds_checkpoint
from gossamer.data.presets import expand
from gossamer.data.sources import manifest
from gossamer.data.supervised import Format
from gossamer.data.tables import table_rows
from gossamer.errors import ConfigError, GossamerError
from gossamer.evaluation.file_tasks import Kind
from gossamer.job.options import record
from gossamer.job.report import Event, Progress, quiet
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
    also: Literal["chat", "ifeval"] | None = None  # a second kind to be measured by, where `Measuring` has it


@dataclass(frozen=True)
class Measuring:
    """How tasks are measured in the end. `judge`, `judge_model`: of chat; `ifeval`: a file of prompts."""

    limit: int = 0
    allow_code: bool = False
    judge: str = ""
    judge_model: str = ""
    ifeval: Path | None = None


@dataclass(frozen=True)
class Launch:
    """The processes that share training, on this machine and others, in torchrun's words.

    The machines see the same files. The first one does the other steps; the others wait for what is pruned.
    """

    nproc_per_node: int = 1
    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str = ""

    @property
    def num_processes(self) -> int:
        return self.nproc_per_node * self.nnodes

    def check(self) -> None:
        """Raise ConfigError for a machine that is not one of those, or that could not find the others."""
        if self.nproc_per_node < 1 or not 0 <= self.node_rank < self.nnodes:
            raise ConfigError(
                f"--processes {self.nproc_per_node}, --nnodes {self.nnodes}, --node-rank {self.node_rank}: "
                "expected at least one process and machine, and a rank from 0 to one less than --nnodes"
            )
        if self.nnodes > 1 and not self.rdzv_endpoint:
            raise ConfigError(
                f"--nnodes {self.nnodes} needs --rdzv-endpoint HOST:PORT of the first machine, on all of them"
            )

    def words(self) -> list[str]:
        """Of torchrun, of this environment; none for a single process."""
        if self.num_processes == 1:
            return []
        words = ["torch.distributed.run", "--nproc-per-node", str(self.nproc_per_node)]
        if self.nnodes > 1:
            words += ["--nnodes", str(self.nnodes), "--node-rank", str(self.node_rank)]
            words += ["--rdzv-endpoint", self.rdzv_endpoint]
        return [*words, "-m"]


ALONE = Launch()
WAIT_SECONDS = 10.0


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
    launch: Launch = ALONE  # of torchrun, whose processes share training by FSDP
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
    several = {"parallel": "fsdp"} if sizes.launch.num_processes > 1 else {}
    return {"max_length": sizes.max_length, **several}


class Converts(Protocol):
    """Says what a row of the data is to the stages; None leaves it out."""

    @property
    def example(self) -> Callable[[Row], Row | None]: ...
    @property
    def question(self) -> Callable[[Row], Row | None]: ...


def examples_of(task: Converts, given: Files, folder: Path) -> Files:
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
    if not file.exists():  # other machines may be reading it
        staged = file.with_name(f"{file.name}.{os.getpid()}.new")
        staged.write_text(text, encoding="utf-8")
        staged.replace(file)
    return file


def run(
    steps: Sequence[Step],
    output: Path,
    launch: Launch = ALONE,
    overwrite: bool = False,
    progress: Progress = quiet,
) -> Iterator[str]:
    """Run the steps that are not done, and say of each what became of it: "ran", "went on" or "stood".

    Training is given to torchrun where `launch` says so. On other machines than the first "waited" is for
    what that one pruned, and "left" what it does alone. Raises what the stages raise, ConfigError for
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
    first = launch.node_rank == 0
    left = claim(output, decided) if first else Left(whole=False, mark=output / "compress.json", finished="")
    for step in steps:
        step.output.parent.mkdir(parents=True, exist_ok=True)
        yield _run(step, left, launch, overwrite, progress)
    if first:
        left.mark.write_text(left.finished, encoding="utf-8")


def _run(step: Step, left: Left, launch: Launch, overwrite: bool, progress: Progress) -> str:
    if launch.node_rank > 0 and step.stage not in TRAINED:
        if step.stage != "prune":
            return "left"
        progress(Event(step.stage, f"waiting for the first machine to write {step.output}", lasting=True))
        while not (Path(step.job.model).exists() and is_up_to_date(step, left)):
            time.sleep(WAIT_SECONDS)
        return "waited"
    if launch.num_processes == 1 or step.stage not in TRAINED or is_up_to_date(step, left):
        return run_here(step, left, overwrite, progress)
    begun = holds_checkpoint(step.output.with_name(f"{step.output.name}.partial"))
    going_on = begun and not overwrite
    flags = {"--resume": going_on, "--overwrite": overwrite}
    words = [*command(step, launch), *(flag for flag, given in flags.items() if given)]
    if code := subprocess.run(words, check=False).returncode:
        raise GossamerError(f"{shlex.join(words)} ended with code {code}; its output above says why")
    return "went on" if going_on else "ran"


def command(step: Step, launch: Launch = ALONE) -> list[str]:
    """The words of the command line that runs a step: the options that have not their defaults."""
    launcher = launch.words() if step.stage in TRAINED else []
    words = [sys.executable, "-m", *launcher, "gossamer", step.stage]
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


def evaluations(task: Task, test: Path, folder: Path, how: Measuring) -> list[Step]:
    """How the packed model in the task's folder is measured against the dense teacher.

    evaluation.json, .md and .png lie beside the model, and as judged.* or ifeval.* what is measured also;
    figures that are kept are not measured again.
    """
    job = Evaluate(
        str(folder / "model.goss"),
        dataset=str(test),
        kind=task.kind,
        baseline=str(folder / "teacher"),
        apply_chat_template=task.format == "chat",
        allow_code_execution=how.allow_code,
        limit=how.limit,
        output=str(folder / "evaluation.json"),
        overwrite=True,
    )
    jobs = [job]
    if task.also == "chat" and (how.judge or how.judge_model):
        asked = {"kind": "chat", "judge": how.judge, "judge_model": how.judge_model}
        jobs.append(replace(job, output=str(folder / "judged.json"), apply_chat_template=False, **asked))
    if task.also == "ifeval" and how.ifeval is not None:
        jobs.append(replace(job, output=str(folder / "ifeval.json"), kind="ifeval", dataset=str(how.ifeval)))
    return [Step("evaluate", evaluate, each, Path(each.output)) for each in jobs]


def check_measurable(steps: Sequence[Step]) -> None:
    """Raise ConfigError for evaluations that cannot be done, such as of code unless that may be run."""
    for step in steps:
        check_evaluation(step.job)
        if not Path(step.job.dataset).is_file():
            raise ConfigError(f"{step.job.dataset}: no such file; expected examples to evaluate on")


def measured(job: Evaluate, progress: Progress = quiet) -> str:
    """What such an evaluation says, in Markdown."""
    packed = Path(job.model)
    evaluate(job, progress)
    sparsity = Checkpoint.open(packed.parent / "quantized").sparsity()
    title = f"# {packed.parent.name}: {sparsity:.0%} zeros, {packed.stat().st_size:,} bytes"
    return f"{title}\n\n{Path(job.output).with_suffix('.md').read_text(encoding='utf-8')}"
