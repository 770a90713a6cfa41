"""What training an encoder's task asks of the options, and the objective that it has."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from gossamer.architecture.anatomy import Task
from gossamer.architecture.config import Config
from gossamer.architecture.encoder import labels
from gossamer.checkpoint.directory import Checkpoint
from gossamer.data.supervised import read_highest_score
from gossamer.data.tables import BadRows
from gossamer.errors import ConfigError, UnsupportedError
from gossamer.tokens.pooling import Pooling
from gossamer.tokens.texts import marks
from gossamer.tokens.tokenizer import Tokenizer
from gossamer.training.labelled import Classes, MaskedTokens
from gossamer.training.objective import NextToken, Objective
from gossamer.training.options import TrainingOptions
from gossamer.training.pairs import PairScores
from gossamer.training.parallel import from_first
from gossamer.training.spans import Spans
from gossamer.training.vectors import COSINE_WEIGHT, TextVectors

if TYPE_CHECKING:
    from gossamer.stages.finetune import Finetune
    from gossamer.stages.pretrain import Pretrain

FORMATS: dict[Task, str] = {
    "sequence": "classification",
    "tokens": "tokens",
    "embedding": "sts",
    "spans": "qa",
}  # an encoder's examples
FOR_DECODERS = "prompt-completion, chat, instruct or text"


def longest_text(source: Checkpoint) -> int:
    """How many tokens the model reads at once, those around a text included."""
    anatomy = source.architecture
    if anatomy.task == "embedding":
        return Pooling.open(source.path, anatomy).max_length
    return anatomy.max_position_embeddings


def pretraining(job: "Pretrain", source: Checkpoint) -> Callable[[PreTrainedModel], Objective]:
    """What a model is trained to do on text, by its task.

    Raises ConfigError or UnsupportedError for options that have no part in that.
    """
    anatomy = source.architecture
    if job.cosine_weight is not None and anatomy.task != "embedding":
        raise ConfigError(
            f"--cosine-weight {job.cosine_weight:g} is of the vectors of an embedding model's texts; found "
            f"{source.path}, a model for {anatomy.task}: leave it out"
        )
    if anatomy.task == "generation":
        return NextToken
    refuse_for_encoders(job, source)
    if job.max_length < 3:
        raise ConfigError(f"--max-length {job.max_length}: expected at least 3: two tokens are around a text")
    if anatomy.task == "embedding":
        _check_vectors(job, source)
        weight = COSINE_WEIGHT if job.cosine_weight is None else job.cosine_weight
        return TextVectors(anatomy, Pooling.open(source.path, anatomy), weight)
    if anatomy.task == "masked":
        mask_id = Tokenizer.open(source.path).required_mask()
        return lambda model: MaskedTokens(model, anatomy, mask_id, job.seed)
    raise UnsupportedError(
        f"{source.path} is a model for {anatomy.task}, which is learned of examples; expected a decoder, "
        "an embedding model or one for masked tokens: text teaches no other"
    )


def finetuning(job: "Finetune", source: Checkpoint) -> Callable[[PreTrainedModel], Objective]:
    """What a model is trained to do on examples, whose format has to suit its task.

    Raises ConfigError where it does not, UnsupportedError for options that have no part in it.
    """
    anatomy = source.architecture
    if anatomy.is_encoder != (job.format in FORMATS.values()):
        suiting = " or ".join(FORMATS.values()) if anatomy.is_encoder else FOR_DECODERS
        raise ConfigError(
            f"--format {job.format} is learned by {'decoders' if anatomy.is_encoder else 'encoders'}; found "
            f"{source.path}, a {anatomy.model_type} for {anatomy.task}: expected --format {suiting}"
        )
    if anatomy.task == "generation":
        return NextToken
    refuse_for_encoders(job, source)
    if job.format == "sts":
        return _pairs(job, source)
    end_id = marks(Tokenizer.open(source.path))[1]
    if job.format == "qa":
        return Spans(anatomy, end_id)
    return lambda model: Classes(model, anatomy, end_id)


def _pairs(job: "Finetune", source: Checkpoint) -> PairScores:
    anatomy = source.architecture
    if anatomy.task != "embedding":
        raise ConfigError(
            f"--format sts is learned by embedding models; found {source.path}, a {anatomy.model_type} for "
            f"{anatomy.task}"
        )
    if job.distill in ("kl", "both"):
        raise UnsupportedError(
            f"--distill {job.distill}: an embedding model has no logits; supported: --distill squarehead "
            "and none"
        )
    bad = BadRows(job.skip_bad_rows)
    highest = from_first(lambda: read_highest_score(job.dataset, bad, offline=job.offline))
    return PairScores(anatomy, Pooling.open(source.path, anatomy), 0.0, highest)


def check_teacher(job: TrainingOptions, source: Checkpoint, teacher: Checkpoint) -> None:
    """Raise ConfigError unless a teacher whose logits an encoder learns has its head and its classes."""
    if not source.architecture.is_encoder or job.distill not in ("kl", "both"):
        return
    theirs, ours = (_head(it) for it in (teacher, source))
    if theirs != ours:
        raise ConfigError(
            f"--distill {job.distill}: --teacher {teacher.path} has a head for {theirs}; expected one for "
            f"{ours}"
        )


def _head(source: Checkpoint) -> str:
    """What a head is for, and the names of its classes, where it has such."""
    task = source.architecture.task
    named = f", of {', '.join(classes(source))[:80]}" if task in ("sequence", "tokens") else ""
    return f"{task}{named}"


def classes(source: Checkpoint) -> list[str]:
    """Names of the classes of an encoder's head."""
    return labels(Config(source.config, str(source.path / "config.json")))


def refuse_for_encoders(job: TrainingOptions, source: Checkpoint) -> None:
    """Raise UnsupportedError for what training does for decoders alone."""
    only_for_decoders = {
        f"--lora {job.lora}": job.lora is not None,
        f"--teacher-cache {job.teacher_cache}": job.teacher_cache is not None,
        "--parallel fsdp": job.parallel == "fsdp",
    }
    for flag, is_given in only_for_decoders.items():
        if is_given:
            raise UnsupportedError(f"{flag} is for decoders; found {source.path}, an encoder: leave it out")


def _check_vectors(job: "Pretrain", source: Checkpoint) -> None:
    """What there is to learn is the teacher's: its layers, and its texts' vectors."""
    if job.teacher is None:
        raise ConfigError(
            f"{source.path} is an embedding model, for which text has no labels; expected --teacher DIR, the "
            "dense model whose vectors are to be learned"
        )
    if job.distill != "squarehead" or job.cross_entropy_weight != 1:
        raise UnsupportedError(
            f"--distill {job.distill}, --cross-entropy-weight {job.cross_entropy_weight:g}: an embedding "
            "model has no logits; supported: --distill squarehead, of layers and of texts' vectors "
            "(--cosine-weight)"
        )
