"""`finetune`: supervised training on answers, beside a dense teacher; zeros stay zeros."""

from dataclasses import dataclass
from typing import Literal

from gossamer.checkpoint import Checkpoint
from gossamer.data import manifest, supervised_examples
from gossamer.decoder import load_model, write_model
from gossamer.errors import ConfigError
from gossamer.job import option
from gossamer.report import Event, Progress, quiet
from gossamer.tokens import Tokenizer
from gossamer.training.distillation import load_teacher
from gossamer.training.rows import Example, Rows, packed_rows
from gossamer.training.trainer import TrainingResult, check_options, train

ROW_LENGTH = 128


@dataclass(frozen=True)
class Finetune:
    """Teach a model to answer, with its zeros held fixed and a dense model as its teacher (SquareHead)."""

    model: str = option(help="checkpoint directory", positional=True)
    output_dir: str = option(help="directory to write", short="-o")
    dataset: tuple[str, ...] = option(help="examples: SRC... (.jsonl[.zst], .parquet or python:doctests)")
    format: Literal["chat", "instruct", "prompt-completion"] = option(
        "prompt-completion", help="the fields of an example"
    )
    teacher: str | None = option(None, help="directory of the dense model tuned on the same task")
    distill: Literal["squarehead", "none"] = option("squarehead", help="the teacher's share of the loss")
    num_train_epochs: int = option(2, help="times that every example is seen")
    max_length: int = option(1024, help="tokens of an example; the model's context where that is shorter")
    batch_tokens: int = option(8192, help="tokens an optimizer step, prompts included")
    learning_rate: float = option(1e-4, help="highest learning rate; it falls to 0")
    warmup_ratio: float = option(0.05, help="share of the steps in which the learning rate rises")
    lr_schedule: Literal["linear", "cosine"] = option("linear", help="how the learning rate falls")
    weight_decay: float = option(0.0, help="AdamW's decay of matrices (norms have none)")
    max_grad_norm: float = option(2.0, help="gradients of a larger norm are scaled down to it")
    precision: Literal["auto", "f32", "bf16"] = option(
        "auto", help="of matrix products; weights are always trained in float32"
    )
    seed: int = option(0, help="order of the examples")
    overwrite: bool = option(False, help="replace the output directory")


def finetune(job: Finetune, progress: Progress = quiet) -> TrainingResult:
    """Train `job.model` on the answers of `job.dataset` and write it to `job.output_dir`."""
    check_options(job)
    _check(job)
    source = Checkpoint.open(job.model)
    teacher = None if job.teacher is None else load_teacher(job.teacher, source)
    with source.derive(job.output_dir, job, stage="finetune", overwrite=job.overwrite) as target:
        target.data = [manifest(name) for name in job.dataset]
        model = load_model(source)
        examples = _examples(job, source, progress)
        rows = _rows(job, examples)
        history = train("finetune", job, model, rows, progress, teacher)
        write_model(model, target)
        target.num_threads = history.num_threads
        target.metrics.update(history.metrics(), num_examples=len(examples))
    return history.result(job.output_dir, Checkpoint.open(job.output_dir).sparsity())


def _examples(job: Finetune, source: Checkpoint, progress: Progress) -> list[Example]:
    """All examples of all sources, tokenized before training begins."""
    length = min(job.max_length, source.architecture.max_position_embeddings)
    tokenizer = Tokenizer.open(source.path)
    progress(Event("finetune", "tokenizing"))
    examples: list[Example] = []
    for name in job.dataset:
        examples += supervised_examples(name, job.format, tokenizer, length)
    if not examples:
        raise ConfigError(
            f"--dataset {' '.join(job.dataset)}: found no example with an answer within --max-length {length}"
        )
    return examples


def _rows(job: Finetune, examples: list[Example]) -> Rows:
    """Short examples share rows of `ROW_LENGTH` tokens; a longer one decides the length."""
    longest = max(len(ids) for ids, _ in examples)
    return packed_rows(examples, max(longest, ROW_LENGTH), job.num_train_epochs, job.seed)


def _check(job: Finetune) -> None:
    if job.distill != "none" and job.teacher is None:
        raise ConfigError(
            f"--distill {job.distill} needs --teacher DIR, the dense tuned model; else --distill none"
        )
    if job.distill == "none" and job.teacher is not None:
        raise ConfigError(f"--teacher {job.teacher} has no part in --distill none; leave one of them out")
    if job.num_train_epochs < 1:
        raise ConfigError(f"--num-train-epochs {job.num_train_epochs}: expected at least 1")
