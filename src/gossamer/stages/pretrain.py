"""`pretrain`: next-token training of a dense or sparse model; zeros stay zeros."""

import math
from dataclasses import dataclass
from typing import Literal

from gossamer.checkpoint import Checkpoint
from gossamer.data import manifest, mixture, token_rows
from gossamer.decoder import load_model, write_model
from gossamer.errors import ConfigError
from gossamer.job import option
from gossamer.report import Event, Progress, quiet
from gossamer.tokens import Tokenizer
from gossamer.training.distillation import load_teacher
from gossamer.training.rows import Rows, next_token_rows
from gossamer.training.trainer import TrainingResult, check_options, train


@dataclass(frozen=True)
class Pretrain:
    """Train on text with the model's zeros held fixed, so that it recovers from pruning."""

    model: str = option(help="checkpoint directory", positional=True)
    output_dir: str = option(help="directory to write", short="-o")
    dataset: tuple[str, ...] = option(help="training text: SRC[@WEIGHT]...")
    num_tokens: int = option(10_000_000, help="tokens to train on; sources that are shorter begin again")
    max_length: int = option(1024, help="tokens a row; the model's context where that is shorter")
    batch_tokens: int = option(16_384, help="tokens an optimizer step")
    learning_rate: float = option(3e-4, help="highest learning rate; it falls to 0")
    warmup_ratio: float = option(0.02, help="share of the steps in which the learning rate rises")
    lr_schedule: Literal["linear", "cosine"] = option("linear", help="how the learning rate falls")
    weight_decay: float = option(0.1, help="AdamW's decay of matrices (norms have none)")
    max_grad_norm: float = option(1.0, help="gradients of a larger norm are scaled down to it")
    teacher: str | None = option(None, help="directory of a dense model: adds the SquareHead loss")
    precision: Literal["auto", "f32", "bf16"] = option(
        "auto", help="of matrix products; weights are always trained in float32"
    )
    seed: int = option(0, help="order of the text")
    overwrite: bool = option(False, help="replace the output directory")
    offline: bool = option(False, help="never touch the network")


def pretrain(job: Pretrain, progress: Progress = quiet) -> TrainingResult:
    """Train `job.model` on `job.num_tokens` tokens and write it to `job.output_dir`."""
    check_options(job)
    _check(job)
    source = Checkpoint.open(job.model)
    teacher = None if job.teacher is None else load_teacher(job.teacher, source)
    with source.derive(job.output_dir, job, stage="pretrain", overwrite=job.overwrite) as target:
        target.data = [manifest(name) for name in job.dataset]
        model = load_model(source)
        rows = _rows(job, source, progress)
        history = train("pretrain", job, model, rows, progress, teacher)
        write_model(model, target)
        target.num_threads = history.num_threads
        target.metrics.update(history.metrics())
    return history.result(job.output_dir, Checkpoint.open(job.output_dir).sparsity())


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
