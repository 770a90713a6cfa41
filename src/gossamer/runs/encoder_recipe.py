"""Sparse encoders as published: oBERTa (arXiv 2303.17612) and Sparse*BERT (arXiv 2205.12452), by steps.

    MODEL -> pretrain while pruned (-> pretrain on text of a field, zeros fixed), and for each task
    MODEL -> its teacher; the sparse model -> finetune beside the teacher -> quantize -> pack -> evaluate

What pretraining is follows from the model: masked words, foretold as the dense model does, or the vectors of
the dense model where it is one for embeddings.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.architecture.anatomy import Task as Head
from gossamer.data.presets import expand
from gossamer.data.supervised import Format
from gossamer.evaluation.encoder_tasks import EncoderKind
from gossamer.runs.compress import Step
from gossamer.runs.recipe import Files
from gossamer.stages.evaluate import Evaluate, evaluate
from gossamer.stages.finetune import Finetune, finetune
from gossamer.stages.pack import Pack, pack
from gossamer.stages.pretrain import Pretrain, pretrain
from gossamer.stages.quantize import Quantize, quantize

Row = Mapping[str, Any]


@dataclass(frozen=True)
class EncoderTask:
    """`example` makes of a row of the data the fields of finetune's `format`, which are evaluate's `kind`'s.

    None leaves a row out.
    """

    name: str
    format: Format
    kind: EncoderKind
    example: Callable[[Row], Row | None]

    @property
    def question(self) -> Callable[[Row], Row | None]:
        return self.example


@dataclass(frozen=True)
class EncoderSizes:
    """The published runs' sizes: three epochs of books and Wikipedia upstream, eight epochs of a task."""

    sparsity: float = 0.9
    begin_sparsity: float = 0.7
    num_tokens: int = 10_000_000_000
    max_length: int = 512
    pretrain_batch_tokens: int = 131_072  # 256 rows of 512
    pretrain_learning_rate: float = 5e-4
    lr_cycles: int = 12
    num_cuts: int = 12  # times that weights are made zero
    prune_until: float = 11 / 12  # of the steps; in what is left the model recovers
    pattern: str = "unstructured"
    epochs: int = 8
    learning_rate: float = 1.5e-4
    finetune_batch_tokens: int = 2_048  # 16 rows of 128
    temperature: float = 5.5
    num_calibration_samples: int = 512


def upstream(
    model: str, output: Path, text: Sequence[str], head: Head, sizes: EncoderSizes, seed: int = 0
) -> Step:
    """Gradual magnitude pruning by a cubic, while the dense model's predictions are learned."""
    steps = max(1, sizes.num_tokens // sizes.pretrain_batch_tokens)
    every = max(1, steps // sizes.num_cuts)
    job = _pretrain(
        model,
        model,
        output,
        text,
        head,
        sizes,
        seed,
        prune_schedule=f"cubic:{sizes.begin_sparsity:g}-{sizes.sparsity:g}:0-{sizes.prune_until:.4g}:{every}",
        pattern=sizes.pattern,
        lr_cycles=sizes.lr_cycles,
    )
    return Step("pretrain", pretrain, job, output)


def continued(
    sparse: Path, teacher: str, output: Path, text: Sequence[str], head: Head, sizes: EncoderSizes
) -> Step:
    """The sparse model on text of another field, whose zeros stay where they are."""
    job = _pretrain(str(sparse), teacher, output, text, head, sizes, 0)
    return Step("pretrain", pretrain, job, output)


def _pretrain(
    model: str,
    teacher: str,
    output: Path,
    text: Sequence[str],
    head: Head,
    sizes: EncoderSizes,
    seed: int,
    **more: Any,
) -> Pretrain:
    logits = {"distill": "kl", "distill_temperature": sizes.temperature, "cross_entropy_weight": 0.0}
    return Pretrain(
        model,
        str(output),
        dataset=expand(text),
        num_tokens=sizes.num_tokens,
        batch_tokens=sizes.pretrain_batch_tokens,
        max_length=sizes.max_length,
        learning_rate=sizes.pretrain_learning_rate,
        weight_decay=0.01,
        repeat=True,
        teacher=teacher,
        freeze="embeddings",
        seed=seed,
        **(logits if head == "masked" else {}),
        **more,
    )


def dense_teacher(task: EncoderTask, model: str, files: Files, output: Path, sizes: EncoderSizes) -> Step:
    """The dense model tuned for the task, beside nobody."""
    job = _finetune(task, model, files, output, sizes, seed=0, distill="none")
    return Step("finetune", finetune, job, output)


def transferred(
    task: EncoderTask,
    sparse: Path,
    teacher: Path,
    output: Path,
    calibration: Sequence[str],
    files: Files,
    sizes: EncoderSizes,
    *,
    seed: int = 0,
    freeze: str = "embeddings",
) -> list[Step]:
    """Sparse transfer: the task is learned of the teacher's logits alone, with zeros fixed; then INT8."""
    tuned, rounded, packed = (output / name for name in ("finetuned", "quantized", "model.goss"))
    tuning = _finetune(
        task,
        str(sparse),
        files,
        tuned,
        sizes,
        seed=seed,
        freeze=freeze,
        teacher=str(teacher),
        distill="kl",
        distill_temperature=sizes.temperature,
        cross_entropy_weight=0.0,
    )
    rounding = Quantize(
        str(tuned),
        str(rounded),
        dataset=tuple(calibration),
        num_calibration_samples=sizes.num_calibration_samples,
        max_seq_length=sizes.max_length,
    )
    return [
        Step("finetune", finetune, tuning, tuned),
        Step("quantize", quantize, rounding, rounded),
        Step("pack", pack, Pack(str(rounded), str(packed)), packed),
    ]


def _finetune(
    task: EncoderTask, model: str, files: Files, output: Path, sizes: EncoderSizes, **more: Any
) -> Finetune:
    return Finetune(
        model,
        str(output),
        dataset=(str(files.train),),
        format=task.format,
        num_train_epochs=sizes.epochs,
        learning_rate=sizes.learning_rate,
        batch_tokens=sizes.finetune_batch_tokens,
        max_length=sizes.max_length,
        **more,
    )


def evaluation(task: EncoderTask, model: Path, test: Path, output: Path) -> Step:
    """How a model is measured; figures that are kept are not measured again."""
    job = Evaluate(str(model), dataset=str(test), kind=task.kind, output=str(output), overwrite=True)
    return Step("evaluate", evaluate, job, output)
