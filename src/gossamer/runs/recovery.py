"""The paper's path on the small model that ships with the package, and the dense control beside it.

    dense -> prune 50% -> pretrain -> prune 70% -> finetune (SquareHead) -> quantize -> pack

The control is the dense model trained on the same tokens in the same order, without zeros and teacher. It
runs in a second process while the sparse path runs in this one: a small model gains little from two threads.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gossamer.data.supervised import write_completions
from gossamer.errors import GossamerError
from gossamer.job.report import Progress, quiet
from gossamer.stages.finetune import Finetune, finetune
from gossamer.stages.pack import Pack, pack
from gossamer.stages.pretrain import Pretrain, pretrain
from gossamer.stages.prune import Prune, prune
from gossamer.stages.quantize import Quantize, quantize

SHIPPED = Path(__file__).parents[1] / "models" / "python-llama"
CALIBRATION = ("python:doctests@3", "python:stdlib@1")
TEXT = ("python:doctests@3", "python:stdlib@1")
REPLAY_CHARACTERS = 300
ROW_TOKENS = 128
BATCH_TOKENS = 2048
# How training multiplies (training/kernel.py): with all weights. "auto" takes what is faster at the moment,
# and the two ways round differently, so two runs of the demo would not give the same model.
KERNEL = "dense"
PRETRAIN_RATE, FINETUNE_RATE = 5e-4, 5e-4


@dataclass(frozen=True)
class Size:
    """How much data each step sees; the defaults win the accuracy back in about three minutes."""

    num_tokens: int = 300_000
    num_examples: int = 14_000
    num_replay_pieces: int = 1000
    num_calibration_samples: int = 256


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


def recover(
    dense: Path, output: Path, seed: int = 0, progress: Progress = quiet, size: Size = WHOLE
) -> Models:
    """Run the whole path and its control; existing outputs are replaced."""
    names = ("control", "one-shot-70", "recovered-70", "quantized-70", "model.goss")
    models = Models(dense, *(output / name for name in names))
    pruned_50, pretrained_50, pruned_70 = (
        output / name for name in ("pruned-50", "pretrained-50", "pruned-70")
    )
    with _beside(train_control, dense, output, seed, size), _one_thread():
        _prune(dense, models.one_shot, 0.7, size, progress)
        _prune(dense, pruned_50, 0.5, size, progress)
        _pretrain(pruned_50, pretrained_50, seed, size, progress)
        _prune(pretrained_50, pruned_70, 0.7, size, progress)
        _finetune(pruned_70, models.recovered, dense, seed, size, progress)
    quantize(Quantize(str(models.recovered), str(models.quantized), **_calibration(size)), progress)
    pack(Pack(str(models.quantized), str(models.packed), overwrite=True), progress)
    return models


def train_control(dense: Path, output: Path, seed: int, size: Size) -> None:
    """The dense model through the same pretraining and fine-tuning: what the extra tokens alone are worth."""
    with _one_thread():
        _pretrain(dense, output / "control-pretrained", seed, size, quiet)
        _finetune(output / "control-pretrained", output / "control", None, seed, size, quiet)


def _calibration(size: Size) -> dict[str, Any]:
    return {
        "dataset": CALIBRATION,
        "num_calibration_samples": size.num_calibration_samples,
        "max_seq_length": ROW_TOKENS,
        "overwrite": True,
    }


def _prune(model: Path, output: Path, sparsity: float, size: Size, progress: Progress) -> None:
    prune(Prune(str(model), str(output), sparsity=sparsity, **_calibration(size)), progress)


def _pretrain(model: Path, output: Path, seed: int, size: Size, progress: Progress) -> None:
    pretrain(
        Pretrain(
            str(model),
            str(output),
            dataset=TEXT,
            num_tokens=size.num_tokens,
            max_length=ROW_TOKENS,
            batch_tokens=BATCH_TOKENS,
            learning_rate=PRETRAIN_RATE,
            kernel=KERNEL,
            seed=seed,
            overwrite=True,
        ),
        progress,
    )


def _finetune(
    model: Path, output: Path, teacher: Path | None, seed: int, size: Size, progress: Progress
) -> None:
    """Doctests, and a fifth of the tokens from the library so that Python is not forgotten."""
    replay = output.with_suffix(".jsonl")
    write_completions(replay, "python:stdlib", size.num_replay_pieces, seed, REPLAY_CHARACTERS)
    finetune(
        Finetune(
            str(model),
            str(output),
            dataset=(f"python:doctests:{size.num_examples}:{seed}", str(replay)),
            teacher=str(teacher) if teacher else None,
            distill="squarehead" if teacher else "none",
            num_train_epochs=1,
            max_length=ROW_TOKENS,
            batch_tokens=BATCH_TOKENS,
            learning_rate=FINETUNE_RATE,
            kernel=KERNEL,
            seed=seed,
            overwrite=True,
        ),
        progress,
    )


@contextmanager
def _beside(function: Callable[..., None], *arguments: Any) -> Iterator[None]:
    """Run `function` in another process, a spawned one because torch's threads do not survive a fork.

    At the end of the block it is waited for; if the block fails, it is ended.
    """
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments, daemon=True)
    process.start()
    try:
        yield
        process.join()
    finally:
        process.terminate()
        process.join()
    if process.exitcode:
        raise GossamerError(
            f"{function.__name__} ended with code {process.exitcode}; its output above says why"
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
