"""`pretrain`: training of a dense or sparse model on text, by its task; zeros stay zeros."""

import hashlib
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from gossamer.checkpoint.directory import Checkpoint, Derived
from gossamer.data.mixture import Mixture
from gossamer.data.packing import CHARACTERS_A_TOKEN, FOLDER, RECORD, PackedText, pack, pack_once, read_rows
from gossamer.data.presets import expand
from gossamer.data.sources import manifest, parse_weight
from gossamer.data.tables import BadRows
from gossamer.data.whole_texts import pack_whole, row_lengths
from gossamer.errors import ConfigError
from gossamer.job.options import option
from gossamer.job.processes import is_first
from gossamer.job.report import Event, Progress, quiet
from gossamer.tokens.tokenizer import Tokenizer
from gossamer.training.by_task import check_teacher, longest_text, pretraining
from gossamer.training.history import TrainingResult
from gossamer.training.options import TrainingOptions, check_options
from gossamer.training.parallel import from_first, in_every_process
from gossamer.training.preparation import check_model, check_start
from gossamer.training.rows import Rows
from gossamer.training.teacher import open_teacher
from gossamer.training.teacher_cache import need_before_packing, teacher_for
from gossamer.training.trainer import train
from gossamer.training.whole_model import derive_in_first, load_model, write_model


@dataclass(frozen=True, kw_only=True)
class Pretrain(TrainingOptions):
    """Train on text with the model's zeros held fixed, so that it recovers from pruning."""

    dataset: tuple[str, ...] = option(
        help="training text: SRC[@WEIGHT]..., or preset:NAME; SRC may be hf:repo[@revision][:config[:split]]"
    )
    num_tokens: int = option(10_000_000, help="tokens to train on, or as many as there are")
    repeat: bool = option(False, help="sources that are used up begin again, instead of ending the text")
    cosine_weight: float | None = option(
        None,
        help="of an embedding model: how much 1 - cosine of a text's vector and the teacher's counts beside "
        "one layer of SquareHead (default: 4)",
    )
    truncate: bool = option(False, help="of a document longer than a row only the beginning is used")


@in_every_process
def pretrain(job: Pretrain, progress: Progress = quiet) -> TrainingResult:
    """Train `job.model` on `job.num_tokens` tokens and write it to `job.output_dir`."""
    source = Checkpoint.open(job.model, offline=job.offline)
    check(job, source)
    objective, length = pretraining(job, source), min(job.max_length, longest_text(source))
    check_start(job, source, length)
    job = replace(job, dataset=expand(job.dataset))
    directory = None if job.teacher is None else open_teacher(job.teacher, source, offline=job.offline)
    if directory is not None:
        check_teacher(job, source, directory)
    with derive_in_first(source, job, "pretrain", kept=f"{FOLDER}/{RECORD}") as target:
        rows = _rows(job, source, target, length, directory, progress)
        teacher = teacher_for(job, directory, rows, "pretrain", progress)
        model = load_model(source)
        history = train(job, model, rows, target, progress, teacher, objective)
        if is_first():
            shutil.rmtree(target.path / FOLDER)
        write_model(model, target)
        target.num_threads = history.num_threads
        target.metrics.update(history.metrics())
    return from_first(lambda: history.result(job.output_dir, target.sparsity))


def _rows(
    job: Pretrain,
    source: Checkpoint,
    target: Derived,
    length: int,
    teacher: Checkpoint | None,
    progress: Progress,
) -> Rows:
    """Whole rows of `length` tokens for `num_tokens` (rounded up), packed in the run's own folder."""
    data = from_first(lambda: [manifest(name, offline=job.offline) for name in job.dataset])
    packed = from_first(lambda: _packed(job, source, target, length, teacher, data, progress))
    target.data = [
        {**known, "num_documents": documents, "num_tokens": tokens}
        for known, documents, tokens in zip(data, packed.num_documents, packed.num_tokens, strict=True)
    ]
    target.metrics["rows"] = asdict(packed)
    found = read_rows(target.path / FOLDER, packed)
    lengths = row_lengths(found) if source.architecture.is_encoder else None
    return Rows(found, lengths_S=lengths, digest=packed.sha256)


def _packed(
    job: Pretrain,
    source: Checkpoint,
    target: Derived,
    length: int,
    teacher: Checkpoint | None,
    data: list[dict[str, Any]],
    progress: Progress,
) -> PackedText:
    max_rows = math.ceil(job.num_tokens / length)
    tokenizing = f"tokenizing {max_rows * length:,} tokens"
    progress(Event("pretrain", tokenizing))
    tokenizer, bad = Tokenizer.open(source.path), BadRows(job.skip_bad_rows)
    mixture = Mixture(
        job.dataset,
        job.seed,
        piece_characters=CHARACTERS_A_TOKEN * length,
        repeat=job.repeat,
        truncate=job.truncate,
        bad=bad,
        offline=job.offline,
    )
    decided = {
        "data": data,
        "tokenizer": hashlib.sha256(tokenizer.bytes).hexdigest(),
        **{name: getattr(job, name) for name in ("seed", "repeat", "truncate", "skip_bad_rows")},
    }
    packed = pack_once(
        mixture,
        tokenizer,
        length,
        max_rows,
        target.path / FOLDER,
        decided,
        lambda num_rows: progress(Event("pretrain", tokenizing, num_rows, max_rows)),
        lambda text: progress(Event("pretrain", text, lasting=True)),
        need_before_packing(job, teacher, max_rows, length),
        pack_whole if source.architecture.is_encoder else pack,
    )
    if not job.resume and not any(mixture.num_documents):
        progress(Event("pretrain", "the rows are those that an earlier run packed", lasting=True))
    for note in _notes(job, packed, bad):
        progress(Event("pretrain", note, lasting=True))
    return packed


def _notes(job: Pretrain, packed: PackedText, bad: BadRows) -> Iterator[str]:
    """What of the data is not trained on, and why."""
    if packed.used_up is not None:
        names = [parse_weight(source)[0] for source in job.dataset]
        own = packed.num_tokens[names.index(packed.used_up)]
        yield (
            f"{packed.used_up} is used up after {own:,} tokens and ends the mixture at "
            f"{packed.num_rows * packed.row_length:,}, fewer than --num-tokens {job.num_tokens:,}: training "
            "on those (--repeat goes on, and begins sources again)"
        )
    if packed.num_truncated:
        yield f"{packed.num_truncated:,} documents are longer than a row, and only their beginning is used"
    yield from bad.notes()


def check(job: Pretrain, source: Checkpoint) -> None:
    """Raise ConfigError or UnsupportedError for a job that cannot be done."""
    check_options(job)
    check_model(job, source)
    if job.num_tokens < 1:
        raise ConfigError(f"--num-tokens {job.num_tokens}: expected at least 1")
    if job.cosine_weight is not None and not 0 <= job.cosine_weight < math.inf:
        raise ConfigError(f"--cosine-weight is {job.cosine_weight:g}; expected a number from 0 on")
    if job.distill in ("kl", "both") and job.teacher is None:
        raise ConfigError(f"--distill {job.distill} needs --teacher DIR, the dense model")
