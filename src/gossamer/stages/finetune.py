"""`finetune`: supervised training on answers, beside a dense teacher; zeros stay zeros."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from gossamer.checkpoint.directory import Checkpoint
from gossamer.data.examples import Examples, read_examples
from gossamer.data.presets import expand
from gossamer.data.sources import manifest
from gossamer.data.supervised import Format
from gossamer.data.tables import BadRows
from gossamer.errors import ConfigError
from gossamer.job.options import option
from gossamer.job.processes import is_first
from gossamer.job.report import Event, Progress, quiet
from gossamer.tokens.tokenizer import Tokenizer
from gossamer.training.by_task import check_teacher, classes, finetuning, longest_text
from gossamer.training.history import TrainingResult
from gossamer.training.new_head import leave_out_what_another_head_made, with_suiting_head
from gossamer.training.options import TrainingOptions, check_options, inherited
from gossamer.training.parallel import from_first, in_every_process
from gossamer.training.preparation import check_model, check_start
from gossamer.training.rows import Rows, packed_rows
from gossamer.training.teacher import open_teacher
from gossamer.training.teacher_cache import teacher_for
from gossamer.training.trainer import train
from gossamer.training.whole_model import derive_in_first, load_model, write_model

ROW_LENGTH = 128


@dataclass(frozen=True, kw_only=True)
class Finetune(TrainingOptions):
    """Teach a model to answer, with its zeros held fixed and a dense model as its teacher."""

    dataset: tuple[str, ...] = option(
        help="examples: SRC[@WEIGHT]..., or preset:NAME; SRC is a .jsonl[.zst] or .parquet file, "
        "hf:repo[@revision][:config[:split]] or python:doctests[:NUM[:SEED]]; all of each, unless weights or "
        "--num-examples make it a mixture"
    )
    format: Format = option(
        "prompt-completion",
        help="the fields of an example; text: of any source that pretrain takes, and all of it is learned; "
        "classification (text, text2?, label) and tokens (tokens, labels): of an encoder with such a head, "
        "or a new one; sts (sentence1, sentence2, score): of an embedding model; qa (question, context, "
        "answers, or SQuAD's .json): of one that marks answers",
    )
    new_head: bool = option(
        False,
        help="make a new head for the examples' classes, where the model's is for others (a model without "
        "such a head gets one in any case)",
    )
    num_examples: int | None = option(
        None, help="examples of an epoch, or as many as there are (default: all)"
    )
    repeat: bool = option(
        False,
        help="sources of a mixture that are used up begin again, up to --num-examples or until all are used "
        "up, instead of ending it",
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
    job = replace(job, dataset=expand(job.dataset))
    begun = with_suiting_head(job, source, progress)
    has_new_head, source = begun is not source, begun
    objective = finetuning(job, source)
    check_start(job, source)
    directory = None if job.teacher is None else open_teacher(job.teacher, source, offline=job.offline)
    if directory is not None:
        check_teacher(job, source, directory)
    with derive_in_first(source, job, "finetune") as target:
        if has_new_head and is_first():
            leave_out_what_another_head_made(target.path)
        rows, num_examples, target.data = from_first(lambda: _rows(job, source, progress))
        teacher = teacher_for(job, directory, rows, "finetune", progress)
        model = load_model(source)
        history = train(job, model, rows, target, progress, teacher, objective)
        write_model(model, target)
        target.num_threads = history.num_threads
        target.metrics.update(history.metrics(), num_examples=num_examples)
    return from_first(lambda: history.result(job.output_dir, target.sparsity))


def _rows(job: Finetune, source: Checkpoint, progress: Progress) -> tuple[Rows, int, list[dict[str, Any]]]:
    """The rows of all epochs, the number of examples, and what the sources are and gave.

    Short examples share rows of `ROW_LENGTH` tokens; a longer one decides the length.
    """
    data = [manifest(name, offline=job.offline) for name in job.dataset]
    found = _examples(job, source, progress)
    longest = max(len(ids) for ids, _ in found.pairs)
    of_firsts = source.architecture.is_encoder
    length = max(longest, min(ROW_LENGTH, source.architecture.max_position_embeddings))
    rows = packed_rows(found.pairs, length, job.num_train_epochs, job.seed, of_firsts=of_firsts)
    given = zip(data, found.num_documents, found.num_tokens, strict=True)
    return (
        rows,
        len(found.pairs),
        [{**known, "num_documents": documents, "num_tokens": tokens} for known, documents, tokens in given],
    )


def _examples(job: Finetune, source: Checkpoint, progress: Progress) -> Examples:
    """The examples of an epoch, tokenized before training begins."""
    length = min(job.max_length, longest_text(source))
    tokenizer = Tokenizer.open(source.path)
    progress(Event("finetune", "tokenizing"))
    bad = BadRows(job.skip_bad_rows)
    found = read_examples(
        job.dataset,
        job.format,
        tokenizer,
        length,
        num_examples=job.num_examples,
        repeat=job.repeat,
        bad=bad,
        offline=job.offline,
        classes=classes(source) if source.architecture.is_encoder else (),
    )
    notes = [*_not_learned(job, bad, length)]
    if not found.pairs:
        reason = "; ".join(notes) or "it has no rows"
        raise ConfigError(f"--dataset {' '.join(job.dataset)}: found no example to learn from: {reason}")
    if found.used_up is not None:
        asked = "" if job.num_examples is None else f", fewer than --num-examples {job.num_examples:,}"
        notes.append(
            f"{found.used_up} is used up, and the mixture ends there, after {len(found.pairs):,} examples of "
            f"{sum(found.num_tokens):,} tokens{asked}: training on those (--repeat goes on, and begins "
            "sources again)"
        )
    for note in notes:
        progress(Event("finetune", note, lasting=True))
    return found


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
    if job.num_examples is not None and job.num_examples < 1:
        raise ConfigError(f"--num-examples {job.num_examples}: expected at least 1")
    if job.num_examples is None and (presets := [name for name in job.dataset if name.startswith("preset:")]):
        raise ConfigError(
            f"--dataset {presets[0]} has more text than memory holds, and examples are all read before "
            "training: give --num-examples N, or train on it with pretrain"
        )
