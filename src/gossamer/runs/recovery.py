"""The paper's path on the small model that ships with the package, and the dense control beside it.

    dense -> prune 50% -> pretrain -> prune 70% -> finetune (SquareHead) -> quantize -> pack

The control is the dense model trained on the same tokens in the same order, without zeros and teacher, in a
second process beside the sparse path.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from gossamer.data.supervised import write_completions
from gossamer.errors import Interrupted
from gossamer.job.options import option
from gossamer.job.report import Progress, quiet
from gossamer.runs import options
from gossamer.runs.beside import beside
from gossamer.stages.finetune import Finetune, finetune
from gossamer.stages.pack import Pack, pack
from gossamer.stages.pretrain import Pretrain, pretrain
from gossamer.stages.prune import Prune, prune
from gossamer.stages.quantize import Quantize, quantize

SHIPPED = Path(__file__).parents[1] / "models" / "python-llama"
CALIBRATION = ("python:doctests@3", "python:stdlib@1")
TEXT = ("python:doctests@3", "python:stdlib@1")
REPLAY_CHARACTERS = 300
# Beside what every run decides: the fields of its data, its two sparsities, and one seed for all. It runs on
# one thread, beside the control.
DECIDED = (*options.DECIDED, "num_examples", "format", "sparsity", "seed", "threads")
# The control has no teacher.
UNTAUGHT = (*DECIDED, "finetune_distill", *(f"finetune_{name}" for name in options.TAUGHT))
DEFAULTS = {
    "method": "sparsegpt",  # the other way takes longer, and training comes after it anyway
    "num_calibration_samples": 128,
    "max_seq_length": 128,
    "max_length": 128,
    "batch_tokens": 2048,
    "learning_rate": 5e-4,
    "num_tokens": 150_000,
    "num_train_epochs": 1,
    # With all weights. "auto" takes what is faster at the moment, and the two ways round differently, so two
    # runs of the demo would not give the same model.
    "kernel": "dense",
}


@dataclass(frozen=True, kw_only=True)
class Recovery(options.options_of(options.STAGES, without=DECIDED, defaults=DEFAULTS)):
    """Every option of the stages that the path leaves open; the defaults win the accuracy back in minutes."""

    seed: int = option(0, help="order of the training data and choice of the examples")


@dataclass(frozen=True)
class Size:
    """How many examples fine-tuning sees; the defaults go with those of `Recovery`."""

    num_examples: int = 7000
    num_replay_pieces: int = 500


WHOLE = Size()


@dataclass(frozen=True)
class Models:
    """What the path leaves in its output directory."""

    dense: Path
    control: Path
    one_shot: Path
    recovered: Path
    quantized: Path
    packed: Path

    @classmethod
    def under(cls, output: Path, dense: Path) -> Self:
        names = ("control", "one-shot-70", "recovered-70", "quantized-70", "model.goss")
        return cls(dense, *(output / name for name in names))


@dataclass(frozen=True)
class Plan:
    """The jobs of the stages: the path's in their order, then the two of the control beside it."""

    one_shot: Prune
    prune_50: Prune
    pretrain_50: Pretrain
    prune_70: Prune
    finetune: Finetune
    quantize: Quantize
    pack: Pack
    control_pretrain: Pretrain
    control_finetune: Finetune


def plan(job: Recovery, models: Models, output: Path, size: Size = WHOLE) -> Plan:
    """What `recover` runs, every stage with the options that `job` gives it."""

    def given(
        kind: type, model: Path, made: Path, *, without: Sequence[str] = DECIDED, **decided: Any
    ) -> dict[str, Any]:
        place = {"model": str(model), "output_file" if kind is Pack else "output_dir": str(made)}
        chosen = options.options_for(job, kind.__name__.lower(), kind, without=without)
        return chosen | {"overwrite": True} | place | decided

    def pruned(model: Path, made: Path, sparsity: float) -> Prune:
        return Prune(**given(Prune, model, made, dataset=CALIBRATION, sparsity=sparsity))

    def pretrained(model: Path, made: Path) -> Pretrain:
        return Pretrain(**given(Pretrain, model, made, dataset=TEXT))

    def finetuned(model: Path, made: Path, teacher: Path | None) -> Finetune:
        """Doctests, and a fifth of the tokens from the library so that Python is not forgotten."""
        data = (f"python:doctests:{size.num_examples}:{job.seed}", str(made.with_suffix(".jsonl")))
        if not teacher or job.distill == "none":
            return Finetune(**given(Finetune, model, made, without=UNTAUGHT, dataset=data, distill="none"))
        return Finetune(**given(Finetune, model, made, dataset=data, teacher=str(teacher)))

    pruned_50, pretrained_50, pruned_70, control = (
        output / name for name in ("pruned-50", "pretrained-50", "pruned-70", "control-pretrained")
    )
    return Plan(
        one_shot=pruned(models.dense, models.one_shot, 0.7),
        prune_50=pruned(models.dense, pruned_50, 0.5),
        pretrain_50=pretrained(pruned_50, pretrained_50),
        prune_70=pruned(pretrained_50, pruned_70, 0.7),
        finetune=finetuned(pruned_70, models.recovered, models.dense),
        quantize=Quantize(**given(Quantize, models.recovered, models.quantized, dataset=CALIBRATION)),
        pack=Pack(**given(Pack, models.quantized, models.packed)),
        control_pretrain=pretrained(models.dense, control),
        control_finetune=finetuned(control, models.control, None),
    )


def recover(
    job: Recovery, dense: Path, output: Path, progress: Progress = quiet, size: Size = WHOLE
) -> Models:
    """Run the whole path and its control; existing outputs are replaced.

    An interrupted run begins anew (KeyboardInterrupt), so no stage's own word of how to resume is passed on.
    """
    models = Models.under(output, dense)
    jobs = plan(job, models, output, size)
    try:
        with beside(train_control, jobs.control_pretrain, jobs.control_finetune, size):
            prune(jobs.one_shot, progress)
            prune(jobs.prune_50, progress)
            pretrain(jobs.pretrain_50, progress)
            prune(jobs.prune_70, progress)
            finetune_with_replay(jobs.finetune, size, progress)
    except Interrupted as error:
        raise KeyboardInterrupt from error
    quantize(jobs.quantize, progress)
    pack(jobs.pack, progress)
    return models


def train_control(first: Pretrain, second: Finetune, size: Size) -> None:
    """The dense model through the same pretraining and fine-tuning: what the extra tokens alone are worth."""
    pretrain(first, quiet)
    finetune_with_replay(second, size, quiet)


def finetune_with_replay(job: Finetune, size: Size, progress: Progress = quiet) -> None:
    """Write the pieces of the library that the job's second source names, and train."""
    write_completions(
        Path(job.dataset[1]), "python:stdlib", size.num_replay_pieces, job.seed, REPLAY_CHARACTERS
    )
    finetune(job, progress)
