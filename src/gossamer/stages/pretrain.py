"""`pretrain`: next-token training of a dense or sparse model; zeros stay zeros."""

import math
from dataclasses import dataclass

from gossamer.checkpoint.directory import Checkpoint
from gossamer.data.mixture import mixture
from gossamer.data.rows import token_rows
from gossamer.data.sources import manifest
from gossamer.errors import ConfigError
from gossamer.job.options import option
from gossamer.job.report import Event, Progress, quiet
from gossamer.tokens.tokenizer import Tokenizer
from gossamer.training.distillation import load_teacher
from gossamer.training.history import TrainingResult
from gossamer.training.options import TrainingOptions, check_options
from gossamer.training.parallel import from_first, in_every_process
from gossamer.training.rows import Rows, next_token_rows
from gossamer.training.trainer import train
from gossamer.training.whole_model import derive_in_first, load_model, write_model


@dataclass(frozen=True, kw_only=True)
class Pretrain(TrainingOptions):
    """Train on text with the model's zeros held fixed, so that it recovers from pruning."""

    dataset: tuple[str, ...] = option(help="training text: SRC[@WEIGHT]...")
    num_tokens: int = option(10_000_000, help="tokens to train on; sources that are shorter begin again")


@in_every_process
def pretrain(job: Pretrain, progress: Progress = quiet) -> TrainingResult:
    """Train `job.model` on `job.num_tokens` tokens and write it to `job.output_dir`."""
    check_options(job)
    _check(job)
    source = Checkpoint.open(job.model, offline=job.offline)
    teacher = None if job.teacher is None else load_teacher(job.teacher, source, offline=job.offline)
    with derive_in_first(source, job, "pretrain") as target:
        target.data = [manifest(name) for name in job.dataset]
        model = load_model(source)
        rows = _rows(job, source, progress)
        history = train(job, model, rows, target, progress, teacher)
        write_model(model, target)
        target.num_threads = history.num_threads
        target.metrics.update(history.metrics())
    return from_first(lambda: history.result(job.output_dir, target.sparsity))


def _rows(job: Pretrain, source: Checkpoint, progress: Progress) -> Rows:
    """Whole rows for `num_tokens` (rounded up), tokenized before training begins."""
    length = min(job.max_length, source.architecture.max_position_embeddings)
    num_rows = math.ceil(job.num_tokens / length)
    progress(Event("pretrain", f"tokenizing {num_rows * length:,} tokens"))
    texts = mixture(job.dataset, job.seed, offline=job.offline)
    return next_token_rows(token_rows(texts, Tokenizer.open(source.path), length), num_rows)


def _check(job: Pretrain) -> None:
    if job.num_tokens < 1:
        raise ConfigError(f"--num-tokens {job.num_tokens}: expected at least 1")
    if job.distill in ("kl", "both") and job.teacher is None:
        raise ConfigError(f"--distill {job.distill} needs --teacher DIR, the dense model")
