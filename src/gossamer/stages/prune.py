"""`prune`: zeros in the decoder's linear weights, in one shot and without training."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.checkpoint.directory import Checkpoint
from gossamer.compress.hessian import hessians, inverse_factor, towards
from gossamer.compress.sparsegpt import sparsegpt
from gossamer.data.calibration import CalibrationOptions, calibration_ids, check_options
from gossamer.data.sources import manifest
from gossamer.decoder import blocks, embed, refuse_quantized, write_block
from gossamer.errors import ConfigError
from gossamer.job.options import option
from gossamer.job.report import Event, Progress, Result, Table, quiet


@dataclass(frozen=True)
class Prune(CalibrationOptions):
    """Zero the least important weights; the others make up for them (SparseGPT)."""

    model: str = option(help="directory, or org/name[@revision] of the hub", positional=True)
    output_dir: str = option(help="directory to write", short="-o")
    sparsity: float = option(
        0.5, help="fraction of zeros in the decoder's linear weights, existing ones included"
    )
    method: Literal["sparsegpt", "magnitude"] = option("sparsegpt", help="how weights are chosen")
    overwrite: bool = option(False, help="replace the output directory")


@dataclass(frozen=True)
class PruneResult(Result):
    """`errors`: after each layer, the squared distance of the hidden states to the parent's, relative."""

    output_dir: str
    sparsity: float
    errors: list[float]
    num_tokens: int
    seconds: float

    def tables(self) -> list[Table]:
        """What was reached."""
        figures = (f"{self.sparsity:.2%}", f"{self.errors[-1]:.4f}")
        row = (*figures, f"{self.num_tokens:,}", f"{self.seconds:.1f}")
        columns = ("zeros", "error after the last layer", "calibration tokens", "seconds")
        return [Table(self.output_dir, columns, [row])]


def prune(job: Prune, progress: Progress = quiet) -> PruneResult:
    """Prune layer by layer, two copies of the model in step: the one being pruned and the parent.

    Groups and layers see the earlier ones pruned, and aim at the outputs that they have in the parent.
    """
    start, source = time.monotonic(), Checkpoint.open(job.model, offline=job.offline)
    check_options(job)
    refuse_quantized(source)
    check_sparsity(source, job.sparsity)
    errors: list[float] = []
    done, total = 0, len(source.linears)
    with source.derive(job.output_dir, job, stage="prune", overwrite=job.overwrite) as target:
        target.data = [manifest(name) for name in job.dataset]
        ids_BT = calibration_ids(source, job)
        hidden_BTD, parent_BTD = embed(source, ids_BT), embed(source, ids_BT)
        for block, parent in zip(blocks(source), blocks(source), strict=True):
            # A walk leaves the layer's output in its hidden states.
            walks = zip(block.walk(hidden_BTD), parent.walk(parent_BTD), strict=True)
            for (group, inputs), (_, parent_inputs) in walks:
                prune_group(group, zip(inputs, parent_inputs, strict=True), job)
                done += len(group)
                metrics = {"error": errors[-1]} if errors else {}
                progress(Event("prune", next(iter(group)), done, total, metrics))
            errors.append(((hidden_BTD - parent_BTD).square().mean() / parent_BTD.square().mean()).item())
            write_block(target, block)
        target.copy_rest()
        target.num_threads = torch.get_num_threads()
        target.metrics["errors"] = errors
    return PruneResult(job.output_dir, target.sparsity, errors, ids_BT.numel(), time.monotonic() - start)


def prune_group(group: Mapping[str, nn.Linear], inputs: Iterable[tuple[Tensor, Tensor]], job: Prune) -> None:
    """Prune the linears that share an input, in place; `inputs` are pieces of ours and of the parent's."""
    if job.method == "magnitude":
        from gossamer.compress.magnitude import magnitude

        for linear in group.values():
            linear.weight.data = magnitude(linear.weight.data, job.sparsity)
        return
    H_KK, C_KK = hessians(inputs)
    factor = inverse_factor(H_KK, job.dampening_frac, name=", ".join(group))
    for linear in group.values():
        w_NK = linear.weight.data
        target_NK = towards(w_NK, H_KK, C_KK, factor)
        linear.weight.data = sparsegpt(
            w_NK, factor, job.sparsity, block_size=job.block_size, target_NK=target_NK
        )


def check_sparsity(source: Checkpoint, sparsity: float) -> None:
    """Raise ConfigError unless `sparsity` is in [0, 1) and not below the model's own."""
    if not 0 <= sparsity < 1:
        raise ConfigError(f"--sparsity is {sparsity:g}; expected a fraction of zeros, at least 0 and below 1")
    if (found := source.sparsity()) > sparsity + 5e-4:
        raise ConfigError(
            f"--sparsity is {sparsity:g}, but {source.path} is {found:.4f} sparse already and its zeros "
            "are kept; give a higher total, or a denser model"
        )
