"""`prune`: zeros in the decoder's linear weights, in one shot and without training."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.checkpoint import Checkpoint
from gossamer.compress.hessian import hessian, inverse_factor, reconstruction_error
from gossamer.compress.magnitude import magnitude
from gossamer.compress.sparsegpt import sparsegpt
from gossamer.data import calibration_rows, manifest
from gossamer.decoder import blocks, embed, write_block
from gossamer.errors import ConfigError
from gossamer.job import option
from gossamer.report import Event, Progress, quiet
from gossamer.tokens import Tokenizer


@dataclass(frozen=True)
class Prune:
    """Zero the least important weights; the others make up for them (SparseGPT)."""

    model: str = option(help="checkpoint directory", positional=True)
    output_dir: str = option(help="directory to write", short="-o")
    sparsity: float = option(
        0.5, help="fraction of zeros in the decoder's linear weights, existing ones included"
    )
    method: Literal["sparsegpt", "magnitude"] = option("sparsegpt", help="how weights are chosen")
    dataset: tuple[str, ...] = option(("python:stdlib",), help="calibration text: SRC[@WEIGHT]...")
    num_calibration_samples: int = option(128, help="rows of calibration text")
    max_seq_length: int = option(2048, help="tokens a row; the model's context where that is shorter")
    block_size: int = option(128, help="inputs among which weights compete")
    dampening_frac: float = option(0.01, help="share of the Hessian's mean diagonal added to its diagonal")
    overwrite: bool = option(False, help="replace the output directory")
    offline: bool = option(False, help="never touch the network")


@dataclass(frozen=True)
class PruneResult:
    """`mean_error`: mean over the linears of the squared output error relative to the squared outputs."""

    output_dir: str
    sparsity: float
    mean_error: float
    num_tokens: int
    seconds: float


def prune(job: Prune, progress: Progress = quiet) -> PruneResult:
    """Prune layer by layer; later groups and layers see the earlier ones pruned already."""
    start, source = time.monotonic(), Checkpoint.open(job.model)
    check_sparsity(source, job.sparsity)
    errors: list[float] = []
    with source.derive(job.output_dir, job, stage="prune", overwrite=job.overwrite) as target:
        target.data = [manifest(name) for name in job.dataset]
        ids_BT = calibration_ids(source, job)
        hidden_BTD = embed(source, ids_BT)
        for block in blocks(source):
            for group, inputs in block.walk(hidden_BTD):
                errors += prune_group(group, hessian(inputs), job)
                metrics = {"sparsity": job.sparsity, "error": errors[-1]}
                progress(Event("prune", next(iter(group)), len(errors), len(source.linears), metrics))
            write_block(target, block)
        target.copy_rest()
        target.num_threads = torch.get_num_threads()
        target.metrics["mean_error"] = sum(errors) / len(errors)
    sparsity, seconds = Checkpoint.open(job.output_dir).sparsity(), time.monotonic() - start
    return PruneResult(job.output_dir, sparsity, sum(errors) / len(errors), ids_BT.numel(), seconds)


def prune_group(group: Mapping[str, nn.Linear], H_KK: Tensor, job: Prune) -> list[float]:
    """Prune the linears that share an input in place; returns the relative error of each."""
    errors = []
    factor = (
        inverse_factor(H_KK, job.dampening_frac, name=", ".join(group)) if job.method == "sparsegpt" else None
    )
    for linear in group.values():
        w_NK = linear.weight.detach()
        if factor is None:
            pruned_NK = magnitude(w_NK, job.sparsity)
        else:
            pruned_NK = sparsegpt(w_NK, factor, job.sparsity, block_size=job.block_size)
        errors.append(reconstruction_error(w_NK, pruned_NK, H_KK))
        linear.weight.data = pruned_NK
    return errors


def calibration_ids(source: Checkpoint, job: Prune) -> Tensor:
    """Token ids [B, T]; raises CalibrationError where the text is too short."""
    length = min(job.max_seq_length, source.architecture.max_position_embeddings)
    rows_BT = calibration_rows(
        job.dataset, Tokenizer.open(source.path), job.num_calibration_samples, length, offline=job.offline
    )
    return torch.from_numpy(rows_BT)


def check_sparsity(source: Checkpoint, sparsity: float) -> None:
    """Raise ConfigError unless `sparsity` is in [0, 1) and not below the model's own."""
    if not 0 <= sparsity < 1:
        raise ConfigError(f"--sparsity is {sparsity:g}; expected a fraction of zeros, at least 0 and below 1")
    if (found := source.sparsity()) > sparsity + 5e-4:
        raise ConfigError(
            f"--sparsity is {sparsity:g}, but {source.path} is {found:.4f} sparse already and its zeros are kept; "
            "give a higher total, or a denser model"
        )
