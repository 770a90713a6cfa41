"""`prune`: zeros in the decoder's linear weights, in one shot and without training."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.checkpoint.directory import Checkpoint
from gossamer.compress.hessian import hessians, inverse_factor, token_error, towards
from gossamer.compress.sparsegpt import sparsegpt
from gossamer.data.calibration import CalibrationOptions, calibration_ids, check_options
from gossamer.data.sources import manifest
from gossamer.decoder import Block, blocks, embed, perplexity, refuse_quantized, write_block
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
    """What rows say that were held out from calibration.

    `errors`: after each layer, how far the hidden states are from the parent's (see `token_error`);
    `parent_perplexity`, `perplexity`: of these rows, before and after.
    """

    output_dir: str
    sparsity: float
    parent_perplexity: float
    perplexity: float
    errors: list[float]
    num_tokens: int
    seconds: float

    def tables(self) -> list[Table]:
        """What was reached, and the errors of all layers."""
        before_after = f"{self.parent_perplexity:.2f} -> {self.perplexity:.2f}"
        row = (f"{self.sparsity:.2%}", before_after, f"{self.num_tokens:,}", f"{self.seconds:.1f}")
        columns = ("zeros", "held-out perplexity", "calibration tokens", "seconds")
        layers = [(f"{layer}", f"{error:.4f}") for layer, error in enumerate(self.errors)]
        return [
            Table(self.output_dir, columns, [row]),
            Table("error of hidden states, held-out rows", ("layer", "a token"), layers),
        ]


@dataclass(frozen=True)
class States:
    """Hidden states [rows, T, D] of the pruned model and of its parent, on their way through the layers."""

    ours_BTD: Tensor
    parent_BTD: Tensor

    def walk(
        self, block: Block, parent: Block
    ) -> Iterator[tuple[dict[str, nn.Linear], Iterable[tuple[Tensor, Tensor]]]]:
        """Through a layer, group by group, with pieces of both models' inputs; see `Block.walk`."""
        walks = zip(block.walk(self.ours_BTD), parent.walk(self.parent_BTD), strict=True)
        for (group, inputs), (_, parent_inputs) in walks:
            yield group, zip(inputs, parent_inputs, strict=True)


def prune(job: Prune, progress: Progress = quiet) -> PruneResult:
    """Prune layer by layer, two copies of the model in step: the one being pruned and the parent.

    Groups and layers see the earlier ones pruned, and aim at the outputs that they have in the parent. The
    last eighth of the rows is held out from calibration, and what the result says is measured there.
    """
    start, source = time.monotonic(), Checkpoint.open(job.model, offline=job.offline)
    check_options(job)
    refuse_quantized(source)
    check_sparsity(source, job.sparsity)
    num_held = num_held_out(job.num_calibration_samples)
    errors: list[float] = []
    done, total = 0, len(source.linears)
    with source.derive(job.output_dir, job, stage="prune", overwrite=job.overwrite) as target:
        target.data = [manifest(name) for name in job.dataset]
        ids_BT = calibration_ids(source, job)
        rows, held = (
            States(embed(source, part_BT), embed(source, part_BT))
            for part_BT in (ids_BT[:-num_held], ids_BT[-num_held:])
        )
        for block, parent in zip(blocks(source), blocks(source), strict=True):
            # A walk leaves the layer's output in its hidden states.
            walks = zip(rows.walk(block, parent), held.walk(block, parent), strict=True)
            for (group, inputs), _ in walks:
                prune_group(group, inputs, job)
                done += len(group)
                metrics = {"error": errors[-1]} if errors else {}
                progress(Event("prune", next(iter(group)), done, total, metrics))
            errors.append(token_error(held.ours_BTD, held.parent_BTD).item())
            write_block(target, block)
        target.copy_rest()
        before, after = (
            perplexity(source, hidden_BTD, ids_BT[-num_held:])
            for hidden_BTD in (held.parent_BTD, held.ours_BTD)
        )
        target.num_threads = torch.get_num_threads()
        target.metrics |= {"errors": errors, "parent_perplexity": before, "perplexity": after}
    seconds = time.monotonic() - start
    return PruneResult(job.output_dir, target.sparsity, before, after, errors, ids_BT.numel(), seconds)


def num_held_out(num_rows: int) -> int:
    """An eighth of the rows, at least one; ConfigError unless a row is left to calibrate on."""
    if num_rows < 2:
        raise ConfigError(
            f"--num-calibration-samples is {num_rows}; prune needs at least 2: an eighth of the rows, one or "
            "more, is held out from calibration to judge by"
        )
    return max(1, num_rows // 8)


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
