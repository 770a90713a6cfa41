"""`finetune`: supervised training on answers, beside a dense teacher; zeros stay zeros."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gossamer.checkpoint.directory import Checkpoint
from gossamer.data.sources import manifest
from gossamer.data.supervised import supervised_examples
from gossamer.data.tables import BadRows
from gossamer.errors import ConfigError
from gossamer.job.options import option
from gossamer.job.report import Event, Progress, quiet
from gossamer.tokens.tokenizer import Tokenizer
from gossamer.training.history import TrainingResult
from gossamer.training.options import TrainingOptions, check_options, inherited
from gossamer.training.parallel import from_first, in_every_process
from gossamer.training.preparation import check_model, check_start
from gossamer.training.rows import Example, Rows, packed_rows
from gossamer.training.teacher import open_teacher
from gossamer.training.teacher_cache import teacher_for
from gossamer.training.trainer import train
from gossamer.training.whole_model import derive_in_first, load_model, write_model

ROW_LENGTH = 128


@dataclass(frozen=True, kw_only=True)
class Finetune(TrainingOptions):
    """Teach a model to answer, with its zeros held fixed and a dense model as its teacher."""

    dataset: tuple[str, ...] = option(help="examples: SRC... (.jsonl[.zst], .parquet or python:doctests)")
    format: Literal["chat", "instruct", "prompt-completion"] = option(
        "prompt-completion", help="the fields of an example"
    )
    num_train_epochs: int = option(2, help="times that every example is seen")
    batch_tokens: int = inherited(TrainingOptions, "batch_tokens", 8192)
    learning_rate: float = inherited(TrainingOptions, "learning_rate", 1e-4)
    warmup_ratio: float = inherited(TrainingOptions, "warmup_ratio", 0.05)
    weight_decay: float = inherited(TrainingOptions, "weight_decay", 0.0)
    max_grad_norm: float = inherited(TrainingOptions, "max_grad_norm", 2.0)


@in_every_process
def finetune(job: Finetune, progress: Progress = quiet) -> TrainingResult:
    """Train `job.model` on the answers of `job.dataset` and write it to `job.output_dir`."""
    source = Checkpoint.open(job.model, offline=job.offline)
    check(job, source)
    check_start(job, source)
    directory = None if job.teacher is None else open_teacher(job.teacher, source, offline=job.offline)
    with derive_in_first(source, job, "finetune") as target:
        target.data = [manifest(name, offline=job.offline) for name in job.dataset]
        examples = _examples(job, source, progress)
        rows = _rows(job, examples)
        teacher = teacher_for(job, directory, rows, "finetune", progress)
        model = load_model(source)
        history = train(job, model, rows, target, progress, teacher)
        write_model(model, target)
        target.num_threads = history.num_threads
        target.metrics.update(history.metrics(), num_examples=len(examples))
    return from_first(lambda: history.result(job.output_dir, target.sparsity))


def _examples(job: Finetune, source: Checkpoint, progress: Progress) -> list[Example]:
    """All examples of all sources, tokenized before training begins."""
    length = min(job.max_length, source.architecture.max_position_embeddings)
    tokenizer = Tokenizer.open(source.path)
    progress(Event("finetune", "tokenizing"))
    examples: list[Example] = []
    bad = BadRows(job.skip_bad_rows)
    for name in job.dataset:
        examples += supervised_examples(name, job.format, tokenizer, length, bad)
    notes = [*_not_learned(job, bad, length)]
    if not examples:
        found = "; ".join(notes) or "it has no rows"
        raise ConfigError(f"--dataset {' '.join(job.dataset)}: found no example to learn from: {found}")
    for note in notes:
        progress(Event("finetune", note, lasting=True))
    return examples


def _not_learned(job: Finetune, bad: BadRows, length: int) -> Iterator[str]:
    """What of the data is not trained on, and why."""
    yield from bad.notes()
    if bad.num_without_answer:
        yield (
            f"left out {bad.num_without_answer} rows without an answer; expected a message of the role "
            "assistant, with text and a weight that is not 0"
        )
    limit = f"{length} tokens ({'--max-length' if length == job.max_length else 'the context of the model'})"
    if bad.num_cut_off:
        yield f"left out {bad.num_cut_off} rows whose prompt alone takes {limit} or more"
    if bad.num_shortened:
        yield f"cut {bad.num_shortened} rows that are longer than {limit}"


def _rows(job: Finetune, examples: list[Example]) -> Rows:
    """Short examples share rows of `ROW_LENGTH` tokens; a longer one decides the length."""
    longest = max(len(ids) for ids, _ in examples)
    return packed_rows(examples, max(longest, ROW_LENGTH), job.num_train_epochs, job.seed)


def check(job: Finetune, source: Checkpoint) -> None:
    """Raise ConfigError or UnsupportedError for a job that cannot be done."""
    check_options(job)
    check_model(job, source)
    if job.distill != "none" and job.teacher is None:
        raise ConfigError(
            f"--distill {job.distill} needs --teacher DIR, the dense tuned model; else --distill none"
        )
    if job.num_train_epochs < 1:
        raise ConfigError(f"--num-train-epochs {job.num_train_epochs}: expected at least 1")
